import numpy as np
import pytest
from scipy import stats

from hdpo.evaluation.intervals import from_log_odds, log_odds, mean_interval, mean_variance, runs_interval


def test_log_odds_are_finite_and_come_back():
    values = np.array([0.0, 1e-4, 0.3, 0.5, 1.0])
    assert np.isfinite(log_odds(values)).all()
    assert from_log_odds(log_odds(values)) == pytest.approx(values, abs=1e-12)
    assert log_odds(0.3) == pytest.approx(np.log(0.301 / 0.701))
    assert from_log_odds([-50.0, 50.0]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_verdicts_get_wilsons_interval_in_the_middle(level):
    """Of nearly as many verdicts: half a success and half a failure add to their variance."""
    ones = np.array([1.0] * 170 + [0.0] * 230)
    expected = stats.binomtest(170, 400).proportion_ci(level, method="wilson")
    assert mean_interval(ones, level=level) == pytest.approx((expected.low, expected.high), abs=2e-3)


def test_at_the_ends_it_is_exact_with_twice_the_error():
    low, high = mean_interval([1.0] + [0.0] * 39)
    size = 40 * (1.5 / 41 * (1 - 1.5 / 41)) / ((1 - 1.5 / 41) ** 2 * 1.5 + (1.5 / 41) ** 2 * 39.5) * 40
    assert low == pytest.approx(stats.binomtest(1, 40).proportion_ci(0.9, method="exact").low, rel=0.1)
    assert low == pytest.approx(stats.beta.ppf(0.05, size / 40, 39 * size / 40 + 1))
    assert high == pytest.approx(stats.binomtest(1, 40).proportion_ci(0.95, method="wilson").high, rel=0.03)
    all_solved = mean_interval([1.0] * 40)
    assert all_solved[1] == 1.0
    assert all_solved[0] == pytest.approx(stats.binomtest(40, 40).proportion_ci(0.95, method="wilson").low, abs=0.003)
    # The same from the other end.
    assert mean_interval([0.0] * 40) == pytest.approx((0.0, 1 - all_solved[0]))


def test_values_with_less_spread_are_known_better():
    rates = np.full(240, 0.5) + np.random.default_rng(0).normal(0, 0.1, 240)
    low, high = mean_interval(rates)
    assert (low + high) / 2 == pytest.approx(rates.mean(), abs=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * rates.std() / np.sqrt(240), rel=0.1)


def test_strata_take_the_differences_between_sources_out():
    values = np.array([1.0] * 40 + [0.0] * 40)
    sources = ["easy"] * 40 + ["hard"] * 40
    variance, mean = mean_variance(values, sources)
    # Each stratum: 40 equal values, half a 0 and half a 1.
    center = 40.5 / 41
    within = (40 * (1 - center) ** 2 + 0.5 * (1 - center) ** 2 + 0.5 * center**2) / 40**2
    assert variance == pytest.approx(2 * 0.25 * within)
    assert mean == pytest.approx(0.5)
    low, high = mean_interval(values, sources)
    assert high - low < 0.4 * (np.subtract(*mean_interval(values)[::-1]))
    shuffled = np.random.default_rng(0).permutation(80)
    assert mean_interval(values[shuffled], [sources[i] for i in shuffled]) == pytest.approx((low, high))


def test_one_value_says_little_and_none_nothing():
    low, high = mean_interval([1.0])
    assert (low < 0.25, high) == (True, 1.0)
    with pytest.raises(ValueError, match="non-empty"):
        mean_interval([])


def test_runs_interval_is_students_in_log_odds():
    outcomes = np.array([0.62, 0.66, 0.60, 0.71])
    half = stats.t.ppf(0.975, 3) * log_odds(outcomes).std(ddof=1) / 2
    expected = from_log_odds(log_odds(outcomes.mean()) + np.array([-half, half]))
    assert runs_interval(outcomes) == pytest.approx(tuple(expected))
    flipped = runs_interval(1 - outcomes)
    assert flipped == pytest.approx((1 - expected[1], 1 - expected[0]))
    low, high = runs_interval([0.97, 0.99, 0.985])
    assert low < 0.95 < 0.99 < high < 1
    with pytest.raises(ValueError, match="at least two"):
        runs_interval([0.5])


@pytest.mark.parametrize(("num_problems", "rate"), [(40, 0.003), (40, 0.03), (40, 0.98), (240, 0.01), (240, 0.997)])
@pytest.mark.parametrize("concentration", [0.3, 3.0])
def test_mean_interval_covers_near_the_ends(num_problems, rate, concentration):
    """2000 evaluations of problems whose rates vary; three standard errors below .95 is .935."""
    rng = np.random.default_rng(0)
    rates = rng.beta(rate * concentration, (1 - rate) * concentration, size=(2000, num_problems))
    covered = []
    for values in rng.binomial(8, rates) / 8:
        low, high = mean_interval(values)
        covered.append(low <= rate <= high)
    assert np.mean(covered) > 0.935
