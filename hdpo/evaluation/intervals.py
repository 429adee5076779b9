"""Confidence intervals of numbers between 0 and 1 that hold near 0 and 1: over problems, and over runs.

How often they cover is simulated by ``benchmarks/error_rates.py``. scipy is imported where it is needed: training needs
none of this, and ``benchmarks/gpu_check.py`` runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["from_log_odds", "log_odds", "mean_interval", "mean_variance", "runs_interval"]

_MARGIN = 1e-3
"""Outcomes are pulled from 0 and 1 by this much, so that their log-odds are finite."""


def log_odds(outcome: ArrayLike) -> NDArray[np.float64]:
    """Log-odds (nats) of outcomes in [0, 1], finite at both ends; monotone."""
    value = np.asarray(outcome, dtype=np.float64)
    return np.log((value + _MARGIN) / (1 - value + _MARGIN))


def from_log_odds(value: ArrayLike) -> NDArray[np.float64]:
    """The inverse of :func:`log_odds`, clipped to [0, 1]."""
    from scipy import special

    return np.clip(special.expit(value) * (1 + 2 * _MARGIN) - _MARGIN, 0.0, 1.0)


def _strata(num: int, strata: Sequence[str] | None) -> list[NDArray[np.intp]]:
    """Positions of each stratum."""
    _, inverse = np.unique(np.zeros(num) if strata is None else np.asarray(strata), return_inverse=True)
    return [np.flatnonzero(inverse == i) for i in range(inverse.max() + 1)]


def mean_variance(values: ArrayLike, strata: Sequence[str] | None = None) -> tuple[float, float]:
    """Variance of the mean of values in [0, 1], and a mean for it, both from smoothed values.

    Each stratum gets half a value of 0 and half a value of 1 more (as in Jeffreys' prior): twenty failures in twenty
    tries do not prove that there is no variance.

    Args:
        values: ``[N]`` in [0, 1].
        strata: N names; the numbers of values in each count as fixed. None for one stratum.

    Returns:
        The variance and the smoothed mean.
    """
    vector, variance, mean = np.asarray(values, dtype=np.float64), 0.0, 0.0
    for rows in _strata(len(vector), strata):
        part, num, share = vector[rows], len(rows), len(rows) / len(vector)
        center = (part.sum() + 0.5) / (num + 1)
        squares = ((part - center) ** 2).sum() + 0.5 * center**2 + 0.5 * (1 - center) ** 2
        variance += share**2 * squares / num**2
        mean += share * center
    return float(variance), float(mean)


def mean_interval(values: ArrayLike, strata: Sequence[str] | None = None, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over problems of values in [0, 1]: pass@k, or verdicts.

    Wilson's interval for as many successes and failures as would have the values' variance (Korn and Graubard's
    effective sample size, 1998), widened where it is narrower than the exact interval of Clopper and Pearson with
    twice the error: Wilson's has dips near 0 and 1.

    Args:
        values: ``[N]``, one per problem.
        strata: N names where the set is stratified, by source for example: the interval is then about other problems
            with as many of each source.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: there are no values.

    Example:
        >>> low, high = mean_interval([1.0] * 40)
        >>> round(low, 2), high
        (0.91, 1.0)
    """
    from scipy import stats

    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"expected a non-empty list of numbers, got shape {list(vector.shape)}")
    variance, smoothed = mean_variance(vector, strata)
    mean, size = float(vector.mean()), smoothed * (1 - smoothed) / variance
    z = float(stats.norm.ppf((1 + level) / 2))
    center = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2))
    hits, misses = mean * size, (1 - mean) * size
    low = stats.beta.ppf(1 - level, hits, misses + 1) if hits > 0 else 0.0
    high = stats.beta.ppf(level, hits + 1, misses) if misses > 0 else 1.0
    return max(0.0, min(float(center - half), float(low))), min(1.0, max(float(center + half), float(high)))


def runs_interval(outcomes: ArrayLike, quantile: float | None = None, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean outcome of runs: Student's t on the log-odds, around the log-odds of the mean.

    Runs vary evenly in log-odds; near 0 and 1 their outcomes are skewed, and Student's interval of the outcomes
    themselves covers as little as .86 where it should .95.

    Args:
        outcomes: ``[R]`` in [0, 1], one per run, R >= 2.
        quantile: of Student's t; None for that of R - 1 degrees of freedom.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: there are fewer than two runs.
    """
    from scipy import stats

    values = np.asarray(outcomes, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError("an interval over runs needs at least two of them")
    if quantile is None:
        quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    half = quantile * float(log_odds(values).std(ddof=1)) / math.sqrt(len(values))
    center = float(log_odds(values.mean()))
    return float(from_log_odds(center - half)), float(from_log_odds(center + half))
