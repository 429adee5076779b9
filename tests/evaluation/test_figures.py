import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdpo.evaluation.comparison import build_report
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


def test_the_trade_off_shows_every_setting_with_its_intervals(report, figures):
    plane, over_weight = figures["tradeoff"].axes
    found = points(plane)
    assert list(found) == [
        "weight 0 (2 runs)", "weight 0.1, JSD (2 runs)", "weight 1, ForwardKL (1 run)", "weight 1, JSD (1 run)"
    ]  # fmt: skip
    for (x, y, ends), setting in zip(found.values(), report["settings"], strict=True):
        outcome = setting["outcome"]
        assert (x, y) == pytest.approx((outcome["greedy_accuracy"]["value"], outcome["pass@8"]["value"]))
        if outcome["pass@8"]["low"] is not None:
            assert sorted(ends) == pytest.approx([outcome["pass@8"]["low"], outcome["pass@8"]["high"]])
    assert sum(s["outcome"]["pass@8"]["low"] is not None for s in report["settings"]) == 2
    assert [text.get_text() for text in plane.texts] == ["λ=0", "λ=0.1", "λ=1", "λ=1"]
    # One curve: 0, 0.1 and 1 differ in the weight alone; forward KL has one weight.
    assert [label.get_text() for label in over_weight.get_xticklabels()] == ["0", "0.1", "1"]
    curve = over_weight.containers[1][0]
    own = [s for s in report["settings"] if "ForwardKL" not in s["label"]]
    assert curve.get_ydata() == pytest.approx([s["outcome"]["pass@8"]["value"] for s in own])
    assert over_weight.containers[1].get_label() == "pass@8"


def test_sources_stand_apart(report, figures):
    _, axis = figures["sources"].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["gsm8k", "math"]
    for bars, setting in zip(axis.containers, report["settings"], strict=True):
        expected = [setting["by_source"][source]["pass@8"]["value"] for source in ("gsm8k", "math")]
        assert bars[0].get_ydata() == pytest.approx(expected)


def test_curves_stand_at_their_steps(report, figures):
    greedy, top, cliffs, privileged = figures["steps"].axes
    for axis, name in ((greedy, "greedy_accuracy"), (top, "pass@8")):
        for line, setting in zip(axis.lines, report["settings"], strict=True):
            assert line.get_xdata().tolist() == [0, 20, 40]
            assert line.get_ydata() == pytest.approx([setting["curves"][name][s]["value"] for s in (0, 20, 40)])
    assert [line.get_ydata() for line in cliffs.lines] == [pytest.approx([v] * 2) for v in (0.15, 0.15, 0.1, 0.1)]
    assert [line.get_label() for line in privileged.lines] == [line.get_label() for line in cliffs.lines[1:]]
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in figures["steps"].axes)


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
