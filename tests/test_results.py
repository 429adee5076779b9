"""The README's table of results is what ``report`` makes of the records under benchmarks/results."""

from pathlib import Path

import pytest
import yaml

from hdpo.evaluation.comparison import Question, build_report
from hdpo.evaluation.runs import find_runs

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT / "benchmarks/results/foreign"
ENDPOINTS = ("pass@8:tier5+tier6", "pass@8", "greedy_accuracy")


def number(value):
    return f"{value:.3f}".lstrip("0") if value >= 0 else f"-{-value:.3f}".replace("-0", "-")


def interval(entry):
    return f"{number(entry['value'])} [{number(entry['low'])}, {number(entry['high'])}]"


def row(setting):
    cells = [f"`{setting['label']}`", str(setting["num_runs"]), *(interval(setting["outcome"][e]) for e in ENDPOINTS)]
    return f"| {' | '.join(cells)} |"


def compared(**changes):
    question = yaml.safe_load((FOREIGN / "question.yaml").read_text(encoding="utf-8"))
    return build_report(find_runs([FOREIGN / "confirmatory"]), Question(**question | changes))


@pytest.fixture(scope="module")
def report():
    return compared()


def test_the_readmes_table_is_that_of_the_records(report):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.endswith("] |") and line.startswith("| `")]
    assert sorted(rows) == sorted(map(row, report["settings"]))


@pytest.mark.parametrize(
    ("baseline", "family"), [("grpo", ["hdpo", "sft_on_cliffs", "joint"]), ("sft_on_cliffs", ["hdpo", "joint"])]
)
def test_the_readmes_differences_are_those_of_the_records(baseline, family):
    found = compared(baseline=baseline, family=family)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for endpoint in ENDPOINTS[::2]:
        (c,) = [c for c in found["comparisons"] if (c["setting"], c["endpoint"]) == ("hdpo", endpoint)]
        (test,) = [t for t in found["family"] if (t["setting"], t["endpoint"]) == ("hdpo", endpoint)]
        change = f"+{number(c['value'])} [+{number(c['low'])}, +{number(c['high'])}]"
        p = f"{test['p_value_holm']:.2g}".lstrip("0")
        assert f"{change}, p = {p}" in readme


def test_the_runs_are_those_of_the_protocol(report):
    assert report["split"] == "test"
    assert {setting["steps"][-1] for setting in report["settings"]} == {200}
    assert all(len(set(s["seeds"])) == s["num_runs"] for s in report["settings"])
