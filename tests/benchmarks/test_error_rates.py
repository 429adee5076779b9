"""What `report` prints errs as seldom as it should, and its intervals cover; the script has the whole table."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("error_rates", FOLDER / "error_rates.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def within(rate, low, high, num):
    """Whether a simulated rate is within bounds, up to four standard errors."""
    error = 4 * math.sqrt(0.05 * 0.95 / num)
    return low - error <= rate <= high + error


def test_errors_of_the_first_kind(script, monkeypatch):
    monkeypatch.setattr(script, "ENDPOINTS", [e for e in script.ENDPOINTS if e[1] == 40])
    rows = script.error_rates(np.random.default_rng(0), 200) + script.not_lower_rates(np.random.default_rng(1), 500)
    assert {(row["test"], row["runs a side"]) for row in rows} == {
        *(("Welch", n) for n in (3, 5, 10)),
        *(("permutation", n) for n in (5, 10)),
        *(("Welch, not lower", n) for n in (3, 5, 10)),
    }, "and nothing is tested with two runs a side"
    for row in rows:
        assert within(row["at .05"], 0.03, 0.06, row["experiments"]), row
        assert within(row["at .01"], 0.0, 0.015, row["experiments"]), row


def test_a_family_is_wrong_in_at_most_five_percent(script):
    rows = [row for row in script.other_rates(np.random.default_rng(0), 150) if row["test"] == "any of 3, Holm"]
    assert len(rows) == 3
    for row in rows:
        assert within(row["at .05"], 0.0, 0.05, row["experiments"]), row


def test_intervals_over_runs_cover(script):
    for row in script.run_coverage(np.random.default_rng(0), 100):
        for kind in ("these problems", "other problems too"):
            assert within(row[kind], 0.93, 1.0, 100), row


def test_intervals_over_problems_cover(script):
    rows = script.problem_coverage(np.random.default_rng(0), 300)
    assert {row["problems"] for row in rows} == {40, 240}
    for row in rows:
        assert within(row["covered"], 0.94, 1.0, 300), row
    ends = [row for row in rows if row["true value"] in (0.0, 1.0) and row["problems"] == 40]
    assert all(0.05 < row["width"] < 0.12 for row in ends), "all solved does not mean certainly all"
