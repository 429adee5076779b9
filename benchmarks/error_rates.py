"""How often `report`'s tests reject where there is no difference, and how often its intervals cover, by simulation.

A run is a policy whose log-odds of solving each problem differ from its method's by one normal number (the run-to-run
standard deviation, .25 to 1) and, from evaluation to evaluation, by another (.15). Its outcome is the mean of five
evaluations. Problems of a tier differ by a normal number of log-odds, too (1).

    python benchmarks/error_rates.py --experiments 4000

A test belongs into `report` if its error is within [.03, .06] at the level .05 and at most .015 at .01.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from common import add_arguments, check_arguments, environment, report
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.special import comb, expit

from hdpo.evaluation.intervals import mean_interval
from hdpo.evaluation.statistics import Comparison, compare, holm, welch

Array = NDArray[np.float64]

NUM_EVALUATIONS, DRIFT, NUM_SAMPLES = 5, 0.15, 16
SDS = (0.25, 0.5, 1.0)
RUNS = (2, 3, 5, 10)
MARGIN = 0.02
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS /= WEIGHTS.sum()
#: Metric, problems, mean log-odds of a problem: hard, middling and easy problems, and all tiers together.
ENDPOINTS: list[tuple[str, int, float | None]] = [
    *((metric, num, base) for metric in ("greedy", "pass@1") for num in (40, 240) for base in (-2.0, 0.0, 2.0)),
    *(("pass@8", num, base) for num in (40, 240) for base in (-4.0, -2.0, 0.0)),
    *((metric, 240, None) for metric in ("greedy", "pass@8")),
]
TIERS = (5.0, 4.5, 4.0, 3.0, -1.0, -4.0)


def centers(num: int, base: float | None) -> Array:
    """Log-odds of each problem for the typical run."""
    if base is None:
        return np.concatenate([t + stats.norm.ppf((np.arange(num // 6) + 0.5) / (num // 6)) for t in TIERS])
    return base + stats.norm.ppf((np.arange(num) + 0.5) / num)


def pass_at(num_samples: int, k: int) -> Array:
    """pass@k for each number of correct samples."""
    correct = np.arange(num_samples + 1)
    return 1 - comb(num_samples - correct, k) / comb(num_samples, k)


def values(rng: np.random.Generator, logits: Array, metric: str) -> Array:
    """One evaluation's value of each problem."""
    if metric == "greedy":
        return (logits + 0.5 * rng.normal(size=logits.shape) > 0).astype(np.float64)
    return pass_at(NUM_SAMPLES, int(metric.removeprefix("pass@")))[rng.binomial(NUM_SAMPLES, expit(logits))]


def runs(rng: np.random.Generator, num: int, num_runs: int, sd: float, problems: Array, metric: str) -> Array:
    """Outcomes ``[num, num_runs]``: means over problems and five evaluations."""
    outcome = np.zeros((num, num_runs))
    policy = problems + sd * rng.normal(size=(num, num_runs, 1))
    for _ in range(NUM_EVALUATIONS):
        moved = policy + DRIFT * rng.normal(size=(num, num_runs, 1))
        outcome += values(rng, moved, metric).mean(axis=-1) / NUM_EVALUATIONS
    return outcome


def batches(num: int, num_runs: int, num_problems: int) -> Iterator[int]:
    """Sizes that add up to ``num`` and fit into memory."""
    most = max(1, 4_000_000 // (num_runs * num_problems))
    while num > 0:
        yield min(most, num)
        num -= most


def experiments(
    rng: np.random.Generator, num: int, num_runs: tuple[int, ...], sds: Sequence[float], endpoint: tuple
) -> Iterator[list[Array]]:
    """The outcomes of each group of runs, for each of ``num`` experiments; all groups have the same typical run."""
    metric, num_problems, base = endpoint
    problems = centers(num_problems, base)
    for size in batches(num, max(num_runs), num_problems):
        groups = [runs(rng, size, n, sd, problems, metric) for n, sd in zip(num_runs, sds, strict=True)]
        yield from ([group[i] for group in groups] for i in range(size))


def printed(first: Array, second: Array) -> Comparison:
    """What `report` prints for these runs, by its rules."""
    return compare(first, second, margin=MARGIN)


def error_rates(rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    """Errors of the first kind of Welch's and the permutation test, over all endpoints and at the extreme one."""
    rows = []
    for num_runs in RUNS:
        for sd in SDS:
            found: dict[str, list[list[float]]] = {}
            for endpoint in ENDPOINTS:
                pairs = [printed(*pair) for pair in experiments(rng, num, (num_runs,) * 2, (sd,) * 2, endpoint)]
                for test, name in (("Welch", "p_value"), ("permutation", "p_permutation")):
                    ps = [p for p in (getattr(pair, name) for pair in pairs) if p is not None]
                    if len(ps) >= num / 2:
                        found.setdefault(test, []).append(ps)
            rows += [row(test, num_runs, sd, ps) for test, ps in found.items()]
    return rows


def shifted_base(sd: float, mean: float) -> float:
    """Log-odds of the typical run whose setting has this mean outcome."""
    return float(optimize.brentq(lambda base: float(expit(base + sd * NODES) @ WEIGHTS) - mean, -15, 15))


def not_lower_rates(rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    """The test of "lower by the margin", where it is lower by exactly that; outcomes without noise of evaluations."""
    rows = []
    for num_runs in (3, 5, 10):
        for sd in SDS:
            parts = []
            for mean in (0.1, 0.2, 0.5, 0.8, 0.88):
                bases = shifted_base(sd, mean + MARGIN), shifted_base(sd, mean)
                sides = [expit(base + sd * rng.normal(size=(num, num_runs))) for base in bases]
                ps = [printed(*pair).p_not_lower for pair in zip(*sides, strict=True)]
                parts.append([p for p in ps if p is not None])
            rows.append(row("Welch, not lower", num_runs, sd, parts))
    return rows


def row(test: str, num_runs: int | str, sd: float | str, by_endpoint: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Rates at both levels, pooled over endpoints and at the extreme ones."""
    rates = {level: [float(np.mean(np.array(ps) <= level)) for ps in by_endpoint] for level in (0.05, 0.01)}
    pooled = np.concatenate([np.asarray(ps) for ps in by_endpoint])
    return {
        "test": test,
        "runs a side": num_runs,
        "sd": sd,
        "at .05": round(float(np.mean(pooled <= 0.05)), 4),
        "lowest": min(rates[0.05]),
        "highest": max(rates[0.05]),
        "at .01": round(float(np.mean(pooled <= 0.01)), 4),
        "highest at .01": max(rates[0.01]),
        "experiments": len(pooled),
    }


def other_rates(rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    """Unequal numbers of runs, unequal spreads, and Holm's adjustment, at some endpoints."""
    rows = []
    chosen = [ENDPOINTS[0], ENDPOINTS[5], ENDPOINTS[12], ENDPOINTS[-1]]
    cases = [((3, 6), (0.5, 0.5)), ((5, 10), (0.5, 0.5)), *(((n, n), (0.25, 1.0)) for n in (3, 5, 10))]
    for sizes, sds in cases:
        parts = []
        for endpoint in chosen:
            found = [printed(*pair).p_value for pair in experiments(rng, num, sizes, sds, endpoint)]
            parts.append([p for p in found if p is not None])
        rows.append(row("Welch", "{} and {}".format(*sizes), "{} and {}".format(*sds), parts))
    for num_runs in (3, 5, 10):
        parts = []
        for endpoint in chosen:
            groups = experiments(rng, num, (num_runs,) * 4, (0.5,) * 4, endpoint)
            parts.append([min(p or 0.0 for p in holm([welch(base, g)[0] for g in rest])) for base, *rest in groups])
        rows.append(row("any of 3, Holm", num_runs, 0.5, parts))
    return rows


def run_coverage(rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    """Coverage of the intervals over runs of a difference that is there, and of its extension to other problems."""
    rows = []
    for num_runs in RUNS:
        for sd in SDS:
            for base, lift in ((0.0, 0.0), (-2.0, 1.0), (1.0, 1.0)):
                covered = simulate_crossed(rng, num, num_runs, sd, base, lift)
                rows.append(
                    {
                        "interval": "difference over runs",
                        "runs a side": num_runs,
                        "sd": sd,
                        "typical": f"{expit(base):.2f}, {expit(base + lift):.2f}",
                        "these problems": covered[0],
                        "other problems too": covered[1],
                    }
                )
    return rows


def simulate_crossed(
    rng: np.random.Generator, num: int, num_runs: int, sd: float, base: float, lift: float
) -> tuple[float, float]:
    """Coverage of both intervals; 120 problems, on which methods differ (sd .7) and each run too (sd .5)."""
    num_problems, hits, crossed = 120, 0, 0

    def expected(centre: Array | float, spread: float) -> Array:
        return expit(np.asarray(centre)[..., None] + spread * NODES) @ WEIGHTS

    # Over all problems the log-odds of a run vary by the run's own number, the problem's and both interactions.
    truth = float(np.diff(expected(np.array([base, base + lift]), np.sqrt(sd**2 + 1 + 0.7**2 + 0.5**2)))[0])
    for _ in range(num):
        common = rng.normal(size=num_problems)
        own = [centre + common + 0.7 * rng.normal(size=num_problems) for centre in (base, base + lift)]
        here = float(np.mean(expected(own[1], np.hypot(sd, 0.5)) - expected(own[0], np.hypot(sd, 0.5))))
        shape = num_runs, num_problems
        rates = [expit(o + sd * rng.normal(size=(num_runs, 1)) + 0.5 * rng.normal(size=shape)) for o in own]
        tables = [rng.binomial(NUM_SAMPLES, rate) / NUM_SAMPLES for rate in rates]
        result = compare(
            tables[0].mean(axis=1), tables[1].mean(axis=1), problems=(tables[0].mean(axis=0), tables[1].mean(axis=0))
        )
        hits += result.low <= here <= result.high
        crossed += result.low_problems <= truth <= result.high_problems
    return hits / num, crossed / num


def problem_coverage(rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    """Coverage of the interval over problems of one evaluation, at rates from 0 to 1."""
    rows = []
    for num_problems in (40, 240):
        for metric, n, k in (("pass@1", 16, 1), ("pass@8", 16, 8), ("greedy", 1, 1)):
            table = pass_at(n, k)
            for mean in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 1.0):
                for concentration in (0.3, 2.0, None):
                    if concentration is None or mean in (0.0, 1.0):
                        rates = np.full((num, num_problems), mean)
                        truth = float(table @ stats.binom.pmf(np.arange(n + 1), n, mean))
                    else:
                        a, b = mean * concentration, (1 - mean) * concentration
                        rates = rng.beta(a, b, size=(num, num_problems))
                        truth = float(table @ stats.betabinom.pmf(np.arange(n + 1), n, a, b))
                    found = [mean_interval(v) for v in table[rng.binomial(n, rates)]]
                    rows.append(
                        {
                            "metric": metric,
                            "problems": num_problems,
                            "rate": mean,
                            "spread": "none" if concentration is None else f"beta, {concentration:g}",
                            "true value": truth,
                            "covered": float(
                                np.mean([low <= truth + 1e-12 and truth - 1e-12 <= high for low, high in found])
                            ),
                            "width": float(np.mean([high - low for low, high in found])),
                        }
                    )
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "tests": error_rates,
        "margin": not_lower_rates,
        "more": other_rates,
        "runs": run_coverage,
        "problems": problem_coverage,
    }
    add_arguments(parser)
    parser.add_argument("--experiments", type=int, default=2000, help="of each kind (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts), help="what to simulate")
    args = parser.parse_args()
    check_arguments(parser, args)
    env, everything, path = environment(), [], args.json
    for i, name in enumerate(args.parts):
        rows = parts[name](np.random.default_rng([args.seed, i]), args.experiments)
        everything += rows
        args.json = None
        report(rows, args, env)
    if path:
        args.json = path
        report(everything, args, env)


if __name__ == "__main__":
    main()
