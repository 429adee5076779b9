"""Statistics in which the run is the unit: two trainings with different seeds are one step apart, whatever they share.

Tests and intervals compare the OUTCOMES of runs (one number in [0, 1] per run). Problems enter only where a statement
is about other problems too. Which test is printed when follows from simulations (``benchmarks/error_rates.py``): a test
whose error of the first kind is not within [.03, .06] at the level .05, or above .015 at .01, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from hdpo.evaluation.intervals import from_log_odds, log_odds, mean_interval, mean_variance, runs_interval

__all__ = [
    "Comparison",
    "compare",
    "compare_policies",
    "detectable_difference",
    "holm",
    "not_lower",
    "permutation_p",
    "selection_bias",
    "welch",
]

MIN_RUNS = 3
"""Runs a side below which no p-value is given."""

MIN_RUNS_PERMUTATION = 5
"""Runs a side below which the permutation test has too few permutations: with four, no p-value is below .028."""

MAX_RATIO = 2
"""How many times as many runs one side may have as the other: with 3 against 10, Welch's error is .067 at .05."""

TESTABLE = (0.02, 0.98)
"""Mean outcomes between which tests are given; beyond, most runs tie, and errors of the first kind nearly vanish."""

NOT_LOWER_TESTABLE = (0.1, 0.9)
"""The same for the test against a margin, whose errors exceed .06 where outcomes are skewed."""


@dataclass
class Comparison:
    """How much higher the outcomes of one setting's runs are than the baseline's.

    Attributes:
        value: difference of the mean outcomes.
        num_runs: runs of the baseline, and of the setting.
        low: lower end of the 95 % interval for other runs on these problems; None with one run on a side, or where
            no run differs from the others of its setting.
        high: upper end.
        low_problems: lower end of the 95 % interval for other runs on other problems of the same sources.
        high_problems: upper end.
        df: Welch's degrees of freedom; None where there is no test.
        p_value: Welch's t of the log-odds, two-sided; None where it is not valid.
        p_permutation: exact permutation test of the log-odds, two-sided; None below five runs a side.
        p_not_lower: Welch's t of the outcomes, one-sided, for "lower by the margin or more"; None without a margin.
        detectable: the smallest rise of the mean outcome that Welch's test finds at the level .05 in 80 % of
            experiments of this size; None where there is no test, or no such rise.
    """

    value: float
    num_runs: tuple[int, int]
    low: float | None = None
    high: float | None = None
    low_problems: float | None = None
    high_problems: float | None = None
    df: float | None = None
    p_value: float | None = None
    p_permutation: float | None = None
    p_not_lower: float | None = None
    detectable: float | None = None


def _spread(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Standard error of the difference of two means, and Welch's degrees of freedom (inf without any variance)."""
    parts = [(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in (first, second)]
    total = sum(variance for variance, _ in parts)
    if total < 1e-16:  # outcomes that differ at all differ by far more
        return 0.0, math.inf
    return math.sqrt(total), total**2 / sum(variance**2 / df for variance, df in parts)


def welch(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Welch's t test of the log-odds of two settings' outcomes.

    On the log-odds since runs vary evenly there: on outcomes near 0 or 1 the same test rejects in as little as .015 of
    experiments without a difference.

    Args:
        first: outcomes of the baseline's runs, each in [0, 1].
        second: outcomes of the other setting's runs.

    Returns:
        Two-sided p-value of "no difference", and degrees of freedom.

    Example:
        >>> p_value, df = welch([0.70, 0.72, 0.69], [0.80, 0.83, 0.79])
        >>> round(p_value, 4), round(df, 1)
        (0.0073, 3.1)
    """
    before, after = log_odds(first), log_odds(second)
    if _spread(before, after)[0] == 0:
        return float(np.allclose(before.mean(), after.mean())), math.inf
    result = stats.ttest_ind(after, before, equal_var=False)
    return float(result.pvalue), float(result.df)


def not_lower(first: ArrayLike, second: ArrayLike, margin: float) -> float:
    """Welch's t test, one-sided, of "the second's mean outcome is lower than the first's by the margin or more".

    On the outcomes themselves, of which the margin is one.

    Args:
        first: outcomes of the baseline's runs, each in [0, 1].
        second: outcomes of the other setting's runs.
        margin: how much lower still counts as not lower, at least 0.
    """
    lowered, after = np.asarray(first, dtype=np.float64) - margin, np.asarray(second, dtype=np.float64)
    if _spread(lowered, after)[0] == 0:
        return float(after.mean() <= lowered.mean())
    return float(stats.ttest_ind(after, lowered, equal_var=False, alternative="greater").pvalue)


@lru_cache(maxsize=4)
def _splits(size: int, chosen: int) -> tuple[NDArray[np.float64], bool]:
    """Ways to put ``chosen`` of ``size`` runs on one side, and whether these are all.

    Returns:
        ``[splits, size]``, 1 / ``chosen`` for a run on that side and 0 for the others: all ways, or 100,000 at random.
    """
    if is_exact := math.comb(size, chosen) <= 200_000:
        flat = np.fromiter(chain.from_iterable(combinations(range(size), chosen)), dtype=np.int64)
        rows = flat.reshape(-1, chosen)
    else:
        rows = np.random.default_rng(0).random((100_000, size)).argsort(axis=1)[:, :chosen]
    weights = np.zeros((len(rows), size))
    np.put_along_axis(weights, rows, 1 / chosen, axis=1)
    return weights, is_exact


def permutation_p(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided permutation test of the difference of mean log-odds; exact up to 200,000 ways to split the runs.

    Args:
        first: outcomes of the baseline's runs, each in [0, 1].
        second: outcomes of the other setting's runs.

    Example:
        >>> round(permutation_p([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.0]) * 252)
        2
    """
    before, after = log_odds(first), log_odds(second)
    together = np.concatenate([before, after])
    splits, is_exact = _splits(len(together), len(after))
    # The mean of one side determines the other's; a mean that rounding moved still ties.
    distance = np.abs(splits @ together - together.mean())
    num_as_far = int((distance >= abs(after.mean() - together.mean()) - 1e-9).sum())
    return num_as_far / len(splits) if is_exact else (num_as_far + 1) / (len(splits) + 1)


def _difference_interval(first: NDArray[np.float64], second: NDArray[np.float64], half: float) -> tuple[float, float]:
    """Interval of the difference of two mean outcomes, from the interval of each (MOVER: Zou and Donner, 2008).

    Args:
        first: outcomes of the baseline's runs.
        second: of the other setting's.
        half: half the width that another, independent source of variation adds.
    """
    df = _spread(log_odds(first), log_odds(second))[1]
    quantile = float(stats.t.ppf(0.975, df))
    (low_1, high_1), (low_2, high_2) = (runs_interval(side, quantile) for side in (first, second))
    mean_1, mean_2 = float(first.mean()), float(second.mean())
    below = math.sqrt((mean_2 - low_2) ** 2 + (high_1 - mean_1) ** 2 + half**2)
    above = math.sqrt((high_2 - mean_2) ** 2 + (mean_1 - low_1) ** 2 + half**2)
    return max(-1.0, mean_2 - mean_1 - below), min(1.0, mean_2 - mean_1 + above)


def detectable_difference(first: ArrayLike, second: ArrayLike, power: float = 0.8) -> float | None:
    """The smallest rise of the mean outcome that Welch's test finds at the level .05 with the given power.

    For as many runs as there are, varying as these do: what an experiment of this size could have found.

    Args:
        first: outcomes of the baseline's runs, each in [0, 1].
        second: outcomes of the other setting's runs.
        power: in (0, 1).

    Returns:
        The rise above the baseline's mean outcome; None where not even a rise to 1 would be found.
    """
    before = np.asarray(first, dtype=np.float64)
    error, df = _spread(log_odds(before), log_odds(second))
    if error == 0:
        return 0.0
    critical = float(stats.t.ppf(0.975, df))
    shift = optimize.brentq(lambda x: float(stats.nct.sf(critical, df, x)) - power, 0.0, critical + 10)
    center = float(before.mean())
    reached = float(from_log_odds(log_odds(center) + shift * error))
    return reached - center if reached < 1 else None


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    problems: tuple[ArrayLike, ArrayLike] | None = None,
    strata: Sequence[str] | None = None,
    margin: float | None = None,
    tests: bool = True,
) -> Comparison:
    """Compare two settings by the outcomes of their runs.

    Args:
        first: outcomes of the baseline's runs, ``[R]`` in [0, 1].
        second: outcomes of the other setting's runs.
        problems: mean value of each problem over the runs of either setting, ``[N]`` each and in the same order, where
            all runs were evaluated on the same problems.
        strata: N sources of the problems.
        margin: how much lower the second may be and still count as not lower.
        tests: whether to test, too.
    """
    before, after = (np.asarray(side, dtype=np.float64) for side in (first, second))
    num_runs = len(before), len(after)
    found = Comparison(float(after.mean() - before.mean()), num_runs)
    if min(num_runs) < 2 or _spread(log_odds(before), log_odds(after))[0] == 0:
        return found
    found.low, found.high = _difference_interval(before, after, 0.0)
    if problems is not None:
        halves = (np.asarray(problems[1]) - np.asarray(problems[0]) + 1) / 2  # to [0, 1]
        half = 2 * 1.96 * math.sqrt(mean_variance(halves, strata)[0])
        found.low_problems, found.high_problems = _difference_interval(before, after, half)
    few, mean = min(num_runs), (before.mean() + after.mean()) / 2
    if tests and few >= MIN_RUNS and max(num_runs) <= MAX_RATIO * few:
        if TESTABLE[0] <= mean <= TESTABLE[1]:
            found.p_value, found.df = welch(before, after)
            found.detectable = detectable_difference(before, after)
            if few >= MIN_RUNS_PERMUTATION:
                found.p_permutation = permutation_p(before, after)
        if margin is not None and NOT_LOWER_TESTABLE[0] <= mean <= NOT_LOWER_TESTABLE[1]:
            found.p_not_lower = not_lower(before, after, margin)
    return found


def compare_policies(first: ArrayLike, second: ArrayLike, strata: Sequence[str] | None = None) -> tuple[float, ...]:
    """Difference between two policies on the same problems, with its 95 % interval over problems.

    It says nothing about the methods that trained them: two seeds of one method differ as well.

    Args:
        first: one policy's values, ``[N]`` in [0, 1].
        second: the other's, in the same order.
        strata: N sources of the problems.

    Returns:
        The mean difference, and the lower and upper end.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    low, high = mean_interval((differences + 1) / 2, strata)
    return float(differences.mean()), 2 * low - 1, 2 * high - 1


def selection_bias(values: ArrayLike, num_folds: int = 10) -> float:
    """How much the best of several evaluations flatters: its value less that on problems that did not choose it.

    The best evaluation is chosen on nine tenths of the problems and read on the rest, for each tenth in turn.

    Args:
        values: ``[evaluations, N]``, the values of the same N problems at each evaluation.
        num_folds: parts of the problems; neighbours go to different parts.

    Returns:
        The bias of the largest mean; 0 where there is one evaluation, or fewer problems than parts.
    """
    table = np.asarray(values, dtype=np.float64)
    num_evaluations, num_problems = table.shape
    if num_evaluations < 2 or num_problems < num_folds:
        return 0.0
    fold, honest = np.arange(num_problems) % num_folds, 0.0
    for part in range(num_folds):
        best = table[:, fold != part].mean(axis=1).argmax()
        honest += float(table[best, fold == part].sum())
    return float(table.mean(axis=1).max()) - honest / num_problems


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of a family that was named beforehand (Holm, 1979): its error rate stays at the level.

    Args:
        p_values: one per comparison; None for one that could not be tested, which counts as a member all the same.

    Returns:
        Adjusted p-values in the same order; compare each with the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
        >>> holm([0.01, None])
        [0.02, None]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[i] = largest
    return adjusted
