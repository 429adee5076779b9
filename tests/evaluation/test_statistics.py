from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from hdpo.evaluation.intervals import log_odds, mean_interval, runs_interval
from hdpo.evaluation.statistics import (
    compare,
    compare_policies,
    detectable_difference,
    holm,
    not_lower,
    permutation_p,
    selection_bias,
    welch,
)

FIRST, SECOND = np.array([0.62, 0.70, 0.66, 0.61, 0.68]), np.array([0.71, 0.69, 0.80, 0.75, 0.74])


def test_welch_by_its_formula():
    a, b = log_odds(FIRST[:3]), log_odds(SECOND)
    parts = a.var(ddof=1) / 3, b.var(ddof=1) / 5
    t = (b.mean() - a.mean()) / np.sqrt(sum(parts))
    df = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 4)
    assert welch(FIRST[:3], SECOND) == pytest.approx((2 * stats.t.sf(abs(t), df), df))
    assert welch(SECOND, FIRST[:3]) == pytest.approx(welch(FIRST[:3], SECOND))
    assert welch([0.5] * 3, [0.5] * 3) == (1.0, np.inf)
    assert welch([0.5] * 3, [0.6] * 3) == (0.0, np.inf)


def test_not_lower_is_one_sided_and_about_the_margin():
    a, b = FIRST, FIRST[::-1] - 0.03
    t = (b.mean() - a.mean() + 0.05) / np.sqrt(2 * a.var(ddof=1) / 5)
    assert not_lower(a, b, 0.05) == pytest.approx(stats.t.sf(t, 8))
    assert not_lower(a, b, 0.1) < not_lower(a, b, 0.05) < 0.5 < not_lower(a, b, 0.0)
    assert not_lower([0.5] * 3, [0.5] * 3, 0.02) == 0.0


def test_permutations_by_enumeration():
    a, b = FIRST[:3], SECOND
    together, observed = log_odds(np.concatenate([a, b])), abs(log_odds(b).mean() - log_odds(a).mean())
    far = []
    for chosen in combinations(range(8), 5):
        rest = [i for i in range(8) if i not in chosen]
        far.append(abs(together[list(chosen)].mean() - together[rest].mean()) >= observed - 1e-12)
    assert permutation_p(a, b) == pytest.approx(np.mean(far))
    assert permutation_p(b, a) == pytest.approx(np.mean(far))
    assert permutation_p([0.1, 0.2, 0.3], [0.3, 0.1, 0.2]) == 1.0


def test_many_runs_are_permuted_at_random():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.4, 0.6, 15), rng.uniform(0.43, 0.63, 15)
    expected = stats.permutation_test(
        (log_odds(a), log_odds(b)), lambda x, y, axis: y.mean(axis=axis) - x.mean(axis=axis), rng=rng
    )
    assert permutation_p(a, b) == pytest.approx(expected.pvalue, abs=0.01)
    assert permutation_p(a / 10, b) == 1 / 100_001


def test_holm_against_closed_testing():
    """Holm's p-value is the largest Bonferroni p-value over all families of hypotheses that hold this one."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p_values = rng.uniform(size=4) ** 3
        families = [family for size in range(1, 5) for family in combinations(range(4), size)]
        bonferroni = {family: min(1.0, len(family) * min(p_values[j] for j in family)) for family in families}
        expected = [max(p for family, p in bonferroni.items() if i in family) for i in range(4)]
        assert holm(p_values.tolist()) == pytest.approx(expected)
    assert holm([]) == []
    assert holm([0.5, None, 0.01]) == [1.0, None, pytest.approx(0.03)]


def test_a_comparison_prints_only_tests_that_hold():
    def tests(first, second):
        found = compare(first, second, margin=0.02)
        names = ("low", "p_value", "df", "p_permutation", "p_not_lower", "detectable")
        return {name for name in names if getattr(found, name) is not None}

    everything = {"low", "p_value", "df", "p_permutation", "p_not_lower", "detectable"}
    assert tests(FIRST, SECOND) == everything
    assert tests(FIRST[:4], SECOND) == everything - {"p_permutation"}
    assert tests(FIRST[:3], SECOND[:3]) == everything - {"p_permutation"}
    assert tests(FIRST[:2], SECOND) == {"low"}
    assert tests(FIRST[:1], SECOND) == set()
    # Three against seven: Welch's test is not to be trusted with so unequal numbers.
    assert tests(FIRST[:3], np.resize(SECOND, 7)) == {"low"}
    # Near the ends: no test against a margin, then none at all; without any variation, not even an interval.
    assert tests(FIRST * 0.1, SECOND * 0.1) == everything - {"p_not_lower"}
    assert tests(FIRST * 0.01, SECOND * 0.01) == {"low"}
    assert tests(np.ones(5), np.ones(5)) == set()


def test_the_numbers_of_a_comparison():
    found = compare(FIRST, SECOND, margin=0.02)
    assert found.value == pytest.approx(SECOND.mean() - FIRST.mean())
    assert (found.p_value, found.df) == welch(FIRST, SECOND)
    assert found.p_permutation == permutation_p(FIRST, SECOND)
    assert found.p_not_lower == not_lower(FIRST, SECOND, 0.02)
    assert found.num_runs == (5, 5)
    # MOVER: from the interval of each side, with Welch's quantile.
    (low_1, high_1), (low_2, high_2) = (runs_interval(side, stats.t.ppf(0.975, found.df)) for side in (FIRST, SECOND))
    below = np.hypot(SECOND.mean() - low_2, high_1 - FIRST.mean())
    above = np.hypot(high_2 - SECOND.mean(), FIRST.mean() - low_1)
    assert (found.low, found.high) == pytest.approx((found.value - below, found.value + above))
    back = compare(SECOND, FIRST)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert compare(FIRST, SECOND, tests=False).p_value is None


def test_other_problems_widen_the_interval():
    rng = np.random.default_rng(0)
    problems = rng.uniform(size=60), rng.uniform(size=60)
    found = compare(FIRST, SECOND, problems=problems)
    assert found.low_problems < found.low < found.high < found.high_problems
    error = (problems[1] - problems[0]).std() / np.sqrt(60)
    below = np.hypot(found.value - found.low, 1.96 * error)
    assert found.value - found.low_problems == pytest.approx(below, rel=0.05)


def test_the_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    sides = rng.normal(size=(2, 5)) * 0.3
    sides = (sides - sides.mean(1, keepdims=True)) / sides.std(1, ddof=1, keepdims=True) * 0.3
    first = 1 / (1 + np.exp(-sides[0]))
    rise = detectable_difference(first, 1 / (1 + np.exp(-sides[1])))
    center, higher = log_odds(first.mean()), log_odds(first.mean() + rise)
    found = []
    for _ in range(2000):
        noise = rng.normal(size=(2, 5)) * 0.3
        found.append(stats.ttest_ind(noise[0] + center, noise[1] + higher, equal_var=False).pvalue < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert detectable_difference([0.9, 0.99, 0.2], [0.9, 0.99, 0.2]) is None
    assert detectable_difference(first, first) < rise * 1.2


def test_two_policies_are_compared_problem_by_problem():
    rng = np.random.default_rng(0)
    first = rng.uniform(size=80)
    second = np.clip(first + rng.normal(0.05, 0.02, 80), 0, 1)
    value, low, high = compare_policies(first, second)
    assert value == pytest.approx((second - first).mean())
    assert (low, high) == pytest.approx(tuple(2 * np.array(mean_interval((second - first + 1) / 2)) - 1))
    assert low < value < high < 0.1
    assert compare_policies(second, first) == pytest.approx((-value, -high, -low))


def test_selection_bias_of_evaluations_that_are_all_alike():
    """The best of 20 evaluations of one policy is above its rate by what choosing it adds, and by nothing else."""
    rng = np.random.default_rng(0)
    bias, excess = [], []
    for _ in range(300):
        table = (rng.random((20, 100)) < 0.6).astype(float)
        bias.append(selection_bias(table))
        excess.append(table.mean(axis=1).max() - 0.6)
    assert np.mean(bias) == pytest.approx(np.mean(excess), abs=4 * np.std(bias) / np.sqrt(300))
    assert 0.06 < np.mean(excess) < 0.12
    # Where one evaluation is better on every problem, choosing it flatters nobody.
    table = np.tile([[0.2], [0.9], [0.5]], (1, 30))
    assert selection_bias(table) == pytest.approx(0.0)
    assert selection_bias(table[:1]) == 0.0


@pytest.mark.parametrize("num_runs", [3, 5])
def test_groups_that_differ_in_seeds_alone(num_runs):
    """Seeded, 1500 experiments; the bounds are four standard errors around [.03, .05]. benchmarks/ has the table."""
    rng = np.random.default_rng(0)
    outcomes = 1 / (1 + np.exp(-(1.0 + 0.7 * rng.normal(size=(1500, 2, num_runs)))))
    found = [compare(*sides) for sides in outcomes]
    for name in ("p_value",) if num_runs < 5 else ("p_value", "p_permutation"):
        rejected = np.mean([getattr(result, name) <= 0.05 for result in found])
        assert 0.015 < rejected < 0.07
    assert 0.93 < np.mean([result.low <= 0 <= result.high for result in found]) < 0.99
