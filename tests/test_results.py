"""What READMEs say of recorded runs is what ``report`` makes of the records under benchmarks/results.

A folder there has ``question.yaml`` (and ``question_*.yaml`` for further families), ``confirmatory/``, and perhaps
``tuning/``. In its README and in the project's, a table with the header ``arm`` is checked cell by cell, and so are
rows of "a against b". The project's README names the folder (benchmarks/results/NAME) before the table. A header says
what its column holds: ``pass@8`` or ``greedy``, of ``tiers 5 and 6``, of ``cliffs`` (the sources of the primary
endpoint) or of all problems; ``runs`` or ``n``; ``last``, the privileged pass rate before the last evaluation, run by
run. With a column ``weight`` or ``learning rate`` (1e-4 where there is none) the table is of the tuning runs:
``pass@8 at 40, 80, 120`` and ``mean``. Other columns are free, but hold no intervals.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from hdpo.evaluation.comparison import Question, build_report
from hdpo.evaluation.figures import draw
from hdpo.evaluation.runs import find_runs

ROOT = Path(__file__).parents[1]
FOLDERS = sorted({path.parents[1] for path in ROOT.glob("benchmarks/results/*/confirmatory/*.gz")})
NUMBER = r"[+-]?\d*\.\d+|[+-]?\d+"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\](?:, p = ({NUMBER}(?:e-\d+)?))?")

every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@cache
def runs(folder, part="confirmatory"):
    return find_runs([folder / part])


@cache
def reports(folder):
    """One for each question, the main one first; without those that were written down before their runs were made."""
    questions = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("question*.yaml"))]
    there = {run.arm for run in runs(folder)} | {run.seed for run in runs(folder)}
    answered = [
        q for i, q in enumerate(questions)
        # Where keys are ignored, settings have other names than the arms.
        if i == 0 or q.get("ignore") or {q["baseline"], *q["family"], *q.get("seeds", ())} <= there
    ]  # fmt: skip
    return [build_report(runs(folder), Question(**question)) for question in answered]


@cache
def tuning(folder):
    return build_report(runs(folder, "tuning"))


def agrees(text, value):
    """Whether a number is the value as printed, to its last digit."""
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent) if exponent else max(1, len(mantissa.partition(".")[2]))
    return value is not None and abs(float(text) - value) <= 0.5 * 10**-digits * (1 + 1e-6) + 1e-15


def same(found, estimate):
    """Whether ``(value, low, high)`` as printed are an estimate's."""
    return all(agrees(text, estimate[name]) for text, name in zip(found, ("value", "low", "high"), strict=True))


def negative(estimate):
    low, high = estimate["high"], estimate["low"]
    return {"value": -estimate["value"], "low": None if low is None else -low, "high": None if high is None else -high}


def tables(text):
    """``(position, header, rows)`` of each table; an empty first cell repeats the one above."""
    for match in re.finditer(r"^\|.*\|\n\|[-| :]+\|\n(?:\|.*\|\n)+", text, re.M):
        lines = [[cell.strip().replace("**", "") for cell in line[1:-1].split("|")] for line in match[0].splitlines()]
        header, rows = lines[0], lines[2:]
        for above, row in pairwise(rows):
            row[0] = row[0] or above[0]
        yield match.start(), header, rows


def names(cell):
    return re.findall(r"`(\w+)`", cell)


def endpoint(header, report):
    """What a column holds, as ``report`` calls it; None for something else."""
    metric = re.search(r"pass@\d+|greedy", header)
    if metric is None:
        return None
    name = metric[0].replace("greedy", "greedy_accuracy")
    hard = next((e.partition(":")[2] for e in report["question"]["primary"] if ":" in e), "")
    tiers = re.search(r"tiers? (\d(?:(?:, | and )\d)*)", header)
    if tiers:
        return f"{name}:" + "+".join(f"tier{n}" for n in re.findall(r"\d", tiers[1]))
    return f"{name}:{hard}" if "cliffs" in header else name


def outcome(setting, name):
    metric, _, source = name.partition(":")
    if name not in setting["outcome"] and source in setting["by_source"]:
        return setting["by_source"][source][metric]
    return setting["outcome"][name]


def check_outcomes(folder, header, rows):
    """A table of confirmatory runs; returns the settings in it."""
    report = reports(folder)[0]
    settings = {setting["label"]: setting for setting in report["settings"]}
    of_run = {run["folder"]: run["setting"] for run in report["runs"]}
    for row in rows:
        (label,) = names(row[0])
        setting = settings[label]
        for title, cell in zip(header[1:], row[1:], strict=True):
            where, name = f"{folder.name}, {label}, {title}: {cell}", endpoint(title, report)
            if name:
                found = INTERVAL.fullmatch(cell)
                expected = outcome(setting, name)
                assert same(found.groups()[:3], expected) if found else agrees(cell, expected["value"]), where
            elif title in ("runs", "n"):
                assert int(cell) == setting["num_runs"], where
            elif title == "last" and cell:
                own = [r for r in runs(folder) if of_run.get(str(r.folder)) == label]
                rates = [r.spent(report["split"], setting["steps"][-1])["recent"]["privileged/pass_rate"] for r in own]
                assert all(map(agrees, cell.split(), rates)), where
                assert len(cell.split()) == len(rates), where
            else:
                assert "[" not in cell, f"what column is this? {where}"
    return [names(row[0])[0] for row in rows]


COLUMNS = (
    ("weight", "model.distillation_weight", "model.privileged_policy_weight"),  # the latter where nothing is distilled
    ("learning rate", "model.optimizer.lr"),
)


def varied(setting, keys):
    """The first value that is not 0; None where the keys do not vary, and so are in no setting's values."""
    return next((setting["values"][key] for key in keys if setting["values"].get(key)), None)


def check_tuning(folder, header, rows):
    """A table of tuning runs: values at steps, and their mean."""
    for row in rows:
        (arm,), named = names(row[0]), dict(zip(header, row, strict=True))
        found = [s for s in tuning(folder)["settings"] if s["label"].split(", ")[0] == arm]
        for title, *keys in COLUMNS:
            chosen = re.match(r"[\d.e-]*\d", named.get(title, "1e-4" if title == "learning rate" else ""))
            found = [s for s in found if not chosen or varied(s, keys) in (float(chosen[0]), None)]
        (setting,) = found
        name = None
        for title, cell in named.items():
            where = f"{folder.name}, {setting['label']}, {title}: {cell}"
            if endpoint(title, tuning(folder)):
                name = endpoint(title, tuning(folder))
                steps = [int(step) for step in re.findall(r"\d+", title.partition(" at ")[2])]
                curve, printed = setting["curves"][name], re.findall(NUMBER, cell)
                expected = [curve[step]["value"] for step in steps if step in curve]
                assert printed, where
                assert len(printed) == len(expected), where
                assert all(map(agrees, printed, expected)), where
            elif title == "mean":
                assert agrees(re.match(NUMBER, cell)[0], setting["outcome"][name]["value"]), where


def check_differences(folder, header, rows):
    """Rows of "a against b": difference, interval, and p after Holm in the family of the question with baseline b."""
    for row in rows:
        other, base = names(row[0])
        report = next(r for r in reports(folder) if r["baseline"] == base and other in r["question"]["family"])
        for title, cell in zip(header[1:], row[1:], strict=True):
            where, name = f"{folder.name}, {row[0]}, {title}: {cell}", endpoint(title, report)
            (found,) = [c for c in report["comparisons"] if (c["setting"], c["endpoint"]) == (other, name)]
            *printed, p = INTERVAL.fullmatch(cell).groups()
            assert same(printed, found), where
            if p:
                (holm,) = [f for f in report["family"] if (f["setting"], f["endpoint"]) == (other, name)]
                assert agrees(p, holm["p_value_holm"]), where


def kind(header, rows):
    if header[0] == "arm" and all(names(row[0]) for row in rows):
        return check_tuning if {"weight", "learning rate"} & set(header) else check_outcomes
    return check_differences if all(re.fullmatch(r"`\w+` against `\w+`", row[0]) for row in rows) else None


@every_folder
def test_the_tables_are_those_of_the_records(folder):
    shown = []
    for _, header, rows in tables((folder / "README.md").read_text(encoding="utf-8")):
        check = kind(header, rows)
        if check is not None:
            shown += check(folder, header, rows) or []
    assert set(shown) == {setting["label"] for setting in reports(folder)[0]["settings"]}  # no arm is left out


def test_a_first_look_has_its_tuning_runs_tables():
    folder = ROOT / "benchmarks/results/learnable"
    (checked,) = [t for t in tables((folder / "README.md").read_text(encoding="utf-8")) if kind(*t[1:]) is check_tuning]
    check_tuning(folder, *checked[1:])
    assert len(checked[2]) == len(runs(folder, "tuning"))


def test_the_projects_tables_are_those_of_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    checked = 0
    for start, header, rows in tables(text):
        if kind(header, rows) is check_outcomes:
            folder = ROOT / re.findall(r"benchmarks/results/\w+", text[:start])[-1]
            shown = check_outcomes(folder, header, rows)
            assert sorted(shown) == sorted(setting["label"] for setting in reports(folder)[0]["settings"])
            checked += 1
    assert checked


def test_the_projects_figure_is_that_of_the_records(tmp_path):
    """Words and lines alike; coordinates to a hundredth of a point, since machines round differently."""
    matplotlib = pytest.importorskip("matplotlib")
    path = ROOT / "benchmarks/figures/foreign.svg"
    shown = path.read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in shown:
        pytest.skip("drawn by another version of matplotlib")
    draw(reports(ROOT / "benchmarks/results/foreign")[0], tmp_path)
    drawn = (tmp_path / "steps.svg").read_text(encoding="utf-8")
    decimals = re.compile(r"-?\d+\.\d+")
    assert decimals.sub("", shown) == decimals.sub("", drawn)
    pairs = zip(decimals.findall(shown), decimals.findall(drawn), strict=True)
    assert all(abs(float(a) - float(b)) <= 0.01 for a, b in pairs)
    assert f"]({path.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", *(f"benchmarks/results/{f.name}/README.md" for f in FOLDERS)])
def test_every_interval_that_is_stated_is_one_of_the_reports(page):
    """In prose, too, where the sign may be in the words; a p-value is that of the same comparison."""
    known = []
    for folder in FOLDERS:
        if page in ("README.md", f"benchmarks/results/{folder.name}/README.md"):
            for report in reports(folder):
                holm = {(f["setting"], f["endpoint"]): f["p_value_holm"] for f in report["family"]}
                known += [(e, ()) for s in report["settings"] for e in s["outcome"].values()]
                known += [(e, ()) for s in report["settings"] for g in s["by_source"].values() for e in g.values()]
                known += [(e, ()) for s in report["settings"] for c in s["curves"].values() for e in c.values()]
                known += [(row, ()) for row in report["by_source"]]
                known += [(c, (c["p_value"], holm.get((c["setting"], c["endpoint"])))) for c in report["comparisons"]]
    stated = INTERVAL.findall(" ".join((ROOT / page).read_text(encoding="utf-8").split()))
    assert stated
    for *printed, p in stated:
        fitting = [ps for estimate, ps in known if same(printed, estimate) or same(printed, negative(estimate))]
        assert fitting, f"{page}: no report has {printed}"
        assert not p or any(agrees(p, value) for ps in fitting for value in ps), f"{page}: p of {printed} is not {p}"


@every_folder
def test_the_runs_are_those_of_a_protocol(folder):
    report = reports(folder)[0]
    assert report["split"] == "test"
    assert len({setting["steps"][-1] for setting in report["settings"]}) == 1
    assert all(len(set(s["seeds"])) == s["num_runs"] for s in report["settings"])
    assert {run.arm for run in runs(folder)} <= {path.stem for path in (folder / "arms").glob("*.yaml")}


def test_the_papers_standard_errors():
    """Of its own row of GRPO, over 2,048 problems."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (rows,) = [rows for _, header, rows in tables(text) if header[0] == "paper"]
    for rate, error in zip(rows[0][1:], rows[-1][1:], strict=True):
        assert agrees(error, (float(rate) * (1 - float(rate)) / 2048) ** 0.5)
