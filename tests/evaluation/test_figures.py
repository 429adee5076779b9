from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdpo.evaluation.comparison import Question, build_report
from hdpo.evaluation.figures import draw, write_tensorboard
from hdpo.evaluation.runs import find_runs
from tests.evaluation.simulate import rates, rows, write_run

KL = {"model__divergence": {"class_path": "hdpo.losses.ForwardKL"}}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for number, (weight, seed, changes) in enumerate(
        [(0.0, 0, {}), (0.0, 1, {}), (0.1, 0, {}), (0.1, 1, {}), (1.0, 0, {}), (1.0, 0, KL)]
    ):
        rng = np.random.default_rng(100 + number)
        made = {step: rows(rates(20) ** 3, rng=rng, step=step) for step in (0, 20, 40)}
        recent = {"cliff/fraction": 0.1 + 0.1 * seed} | ({"privileged/pass_rate": 0.5} if weight else {})
        write_run(folder / str(number), weight=weight, seed=seed, evaluations=made, recent=recent, **changes)
    return build_report(find_runs([folder]))


@pytest.fixture
def figures(report, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    paths = draw(report, tmp_path)
    yield dict(zip((path.stem for path in paths), kept, strict=True))
    monkeypatch.undo()
    plt.close("all")


def points(axis):
    """Where each error bar of an axis stands, by label, with the ends of its vertical bar."""
    found = {}
    for bars in axis.containers:
        (x,), (y,) = bars[0].get_xdata(), bars[0].get_ydata()
        ends = [segment[:, 1] for collection in bars[2] for segment in collection.get_segments()]
        found[bars.get_label()] = x, y, max(ends, key=np.ptp) if ends else None
    return found


def by_label(report):
    return {setting["label"]: setting for setting in report["settings"]}


LABELS = ["weight 0", "weight 0.1, JSD", "weight 1, JSD", "weight 1, ForwardKL"]  # JSD's two weights are one curve


def outcomes(report, labels, metric):
    return [by_label(report)[label]["outcome"][metric]["value"] for label in labels]


def test_the_trade_off_shows_every_setting_with_its_intervals(report, figures):
    plane, over_weight = figures["tradeoff"].axes
    found = points(plane)
    assert list(found) == [f"{label} ({n} run{'s' * (n > 1)})" for label, n in zip(LABELS, (2, 2, 1, 1), strict=True)]
    for (x, y, ends), label in zip(found.values(), LABELS, strict=True):
        outcome = by_label(report)[label]["outcome"]
        assert (x, y) == pytest.approx((outcome["greedy_accuracy"]["value"], outcome["pass@8"]["value"]))
        if outcome["pass@8"]["low"] is not None:
            assert sorted(ends) == pytest.approx([outcome["pass@8"]["low"], outcome["pass@8"]["high"]])
    assert sum(s["outcome"]["pass@8"]["low"] is not None for s in report["settings"]) == 2
    notes = {text.xy: text.get_text() for text in plane.texts}
    weights = dict(zip(LABELS, ("λ=0", "λ=0.1", "λ=1", "λ=1"), strict=True))
    assert notes == {found[f"{label} ({n} run{'s' * (n > 1)})"][:2]: weights[label]
                     for label, n in zip(LABELS, (2, 2, 1, 1), strict=True)}  # fmt: skip
    # One curve: 0, 0.1 and 1 differ in the weight alone; forward KL has one weight.
    assert [label.get_text() for label in over_weight.get_xticklabels()] == ["0", "0.1", "1"]
    for bars, metric, style in zip(over_weight.containers, ("pass@8", "greedy_accuracy"), ("-", "--"), strict=True):
        assert bars[0].get_ydata() == pytest.approx(outcomes(report, LABELS[:3], metric))
        assert bars[0].get_linestyle() == style
    assert over_weight.containers[0].get_label() == "JSD"


def altered(report, outcomes=None, values=None):
    """The report with other outcomes of pass@8, or other values of the settings."""
    settings = []
    for setting in report["settings"]:
        new = (outcomes or {}).get(setting["label"])
        outcome = setting["outcome"] | (
            {"pass@8": {"value": new, "low": None, "high": None}} if new is not None else {}
        )
        more = (values or {}).get(setting["label"], {})
        settings.append(setting | {"outcome": outcome, "values": setting["values"] | more})
    return report | {"settings": settings}


@pytest.fixture
def axes_of(tmp_path, monkeypatch):
    """Draws a report, and returns the axes of its trade-off."""
    from matplotlib import pyplot as plt

    def drawn(report):
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", kept.append)
            draw(report, tmp_path)
        return kept[0].axes

    yield drawn
    plt.close("all")


def test_a_destroyed_policy_does_not_squeeze_the_others(report, axes_of):
    everything, near, _ = axes_of(altered(report, {LABELS[0]: 0.7, LABELS[1]: 0.8, LABELS[2]: 0.1, LABELS[3]: 0.51}))
    assert len(points(everything)) == 4
    assert [text.get_text() for text in everything.texts] == ["λ=1"]  # the other weights stand in the second panel
    assert [label.rpartition(" (")[0] for label in points(near)] == [LABELS[i] for i in (0, 1, 3)]
    assert near.get_ylim()[0] > 0.4


def test_a_curve_starts_at_the_run_that_differs_in_the_weight_alone(report, axes_of):
    over_weight = axes_of(altered(report, values={"weight 0": {"cliffs.resample": 4}}))[-1]
    assert [label.get_text() for label in over_weight.get_xticklabels()] == ["0.1", "1"]
    assert over_weight.containers[0][0].get_ydata() == pytest.approx(outcomes(report, LABELS[1:3], "pass@8"))


def test_a_curves_settings_share_its_colour_and_differ_in_their_markers(figures):
    lines = {line.get_label().rpartition(" (")[0]: line for line in figures["steps"].axes[0].lines}
    assert list(lines) == LABELS
    colors = [line.get_color() for line in lines.values()]
    assert colors == ["C0", "C1", "C1", "C2"]
    marks = [(line.get_marker(), line.get_linestyle()) for line in lines.values()]
    assert marks == [("o", "-"), ("o", "-"), ("s", "--"), ("o", "-")]


def test_sources_stand_apart(report, figures):
    _, axis = figures["sources"].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["gsm8k", "math"]
    for bars, setting in zip(axis.containers, map(by_label(report).get, LABELS), strict=True):
        expected = [setting["by_source"][source]["pass@8"]["value"] for source in ("gsm8k", "math")]
        assert bars[0].get_ydata() == pytest.approx(expected)


def test_curves_stand_at_their_steps(report, figures):
    greedy, top, cliffs, privileged = figures["steps"].axes
    for axis, name in ((greedy, "greedy_accuracy"), (top, "pass@8")):
        for line, setting in zip(axis.lines, map(by_label(report).get, LABELS), strict=True):
            assert line.get_xdata().tolist() == [0, 20, 40]
            assert line.get_ydata() == pytest.approx([setting["curves"][name][s]["value"] for s in (0, 20, 40)])
    assert [line.get_ydata() for line in cliffs.lines] == [pytest.approx([v] * 2) for v in (0.15, 0.15, 0.1, 0.1)]
    assert [line.get_label() for line in privileged.lines] == [line.get_label() for line in cliffs.lines[1:]]
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in figures["steps"].axes)


def test_the_endpoint_that_decides_is_drawn(report, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    runs = find_runs([path.parent for path in map(Path, {run["folder"] for run in report["runs"]})])
    named = build_report(runs, Question(primary=["greedy_accuracy", "pass@8:math"], family=["weight 0.1, JSD"]))
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        draw(named, tmp_path)
        greedy, top, *_ = plt.gcf().axes
    plt.close("all")
    assert (greedy.get_title(), top.get_title()) == ("greedy_accuracy", "pass@8:math")
    setting = by_label(named)["weight 0"]
    values = [setting["curves"]["pass@8:math"][step]["value"] for step in (0, 20, 40)]
    assert values != [setting["curves"]["pass@8"][step]["value"] for step in (0, 20, 40)]
    assert top.lines[0].get_ydata() == pytest.approx(values)


def test_bands_are_drawn_from_three_runs_on(report, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb

    runs = [2, 3, 2, 3]
    settings = [setting | {"num_runs": n} for setting, n in zip(report["settings"], runs, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        draw(report | {"settings": settings}, tmp_path)
        _, top, *_ = plt.gcf().axes
    plt.close("all")
    assert len(top.collections) == 2
    assert [tuple(band.get_facecolor()[0][:3]) for band in top.collections] == [
        to_rgb(line.get_color()) for line in top.lines if line.get_label().endswith("(3 runs)")
    ]
    curve = settings[1]["curves"]["pass@8"].values()
    ends = [[p["value"] if p[end] is None else p[end] for p in curve] for end in ("low", "high")]
    heights = top.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((min(ends[0]), max(ends[1])))


def test_one_setting_can_be_drawn(report, tmp_path):
    alone = {**report, "settings": report["settings"][:1]}
    assert [path.name for path in draw(alone, tmp_path)] == ["tradeoff.png", "sources.png", "steps.png"]


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard(report, tmp_path):
    images = draw(report, tmp_path)
    folder = tmp_path / "tensorboard"
    write_tensorboard(report, folder, images)
    write_tensorboard(report, folder, images)  # replaced, not mixed
    assert sorted(p.name for p in folder.iterdir()) == [
        "figures", "weight_0", "weight_0.1,_JSD", "weight_1,_ForwardKL", "weight_1,_JSD"
    ]  # fmt: skip
    means = read(folder / "weight_0")
    found = [(event.step, event.value) for event in means.Scalars("mean over runs/pass@8")]
    curve = report["settings"][0]["curves"]["pass@8"]
    assert found == [(step, pytest.approx(curve[step]["value"])) for step in (0, 20, 40)]
    assert sorted(read(folder / "figures").Tags()["images"]) == ["report/sources", "report/steps", "report/tradeoff"]


def test_every_setting_has_a_folder_of_its_own_in_tensorboard(report, tmp_path):
    labels = ["a" * 300 + "b", "a" * 300 + "c", "weight 0", "weight (0", "ü" * 200]
    settings = [{**report["settings"][0], "label": label} for label in labels]
    write_tensorboard({**report, "settings": settings}, tmp_path, [])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a" * 200, "a" * 200 + " #2", "weight_0", "weight_0 #4", "ü" * 100]
    assert all(read(tmp_path / name).Scalars("mean over runs/pass@8") for name in names)


def test_a_curve_that_begins_at_weight_0_itself_has_that_point_once(report, axes_of):
    jsd = [by_label(report)[label] for label in LABELS[:3]]
    alone = [s | {"values": {"model.distillation_weight": s["distillation_weight"]}} for s in jsd]
    _, over_weight = axes_of(report | {"settings": alone})
    assert [label.get_text() for label in over_weight.get_xticklabels()] == ["0", "0.1", "1"]
    assert over_weight.containers[0][0].get_ydata() == pytest.approx(outcomes(report, LABELS[:3], "pass@8"))
