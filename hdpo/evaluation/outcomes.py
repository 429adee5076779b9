"""What is compared: outcomes of runs, grouped into settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdpo.errors import ConfigError
from hdpo.evaluation.records import Evaluation, metric_values
from hdpo.evaluation.runs import Run, is_within, name_settings


class Endpoint(NamedTuple):
    """A metric of the problems of some sources or named sets (none for all)."""

    metric: str
    sources: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``METRIC`` or ``METRIC:SOURCE+SOURCE``.

        Raises:
            ConfigError: a source is empty.
        """
        metric, colon, names = text.partition(":")
        sources = tuple(names.split("+")) if colon else ()
        if "" in sources:
            raise ConfigError(f"--primary {text}: name a source after the colon, and after each +")
        return cls(metric, sources)

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it."""
        return f"{self.metric}:{'+'.join(self.sources)}" if self.sources else self.metric


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seeds alone."""

    label: str
    values: dict[str, Any]
    runs: list[Run]


class OutcomeTable:
    """Values of evaluations, each computed once."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.of = cache(self._of)
        self._values = cache(lambda run, step, metric: metric_values(self.of(run)[step], metric))

    def _of(self, run: Run) -> dict[int, Evaluation]:
        """A run's evaluations by step, of the problems of its last one: a continued run may have been given others."""
        found = run.of_split(self.split)
        last = found[max(found)]
        return {step: one for step, one in found.items() if one.problems == last.problems}

    def steps(self, runs: Sequence[Run]) -> list[int]:
        """Steps at which all runs were evaluated; those after training began, if there are any."""
        common = sorted(set.intersection(*(set(self.of(run)) for run in runs)))
        return [step for step in common if step > 0] or common

    def sources(self, run: Run, step: int, endpoint: Endpoint) -> list[str]:
        """Where the endpoint's problems are from."""
        found = self.of(run)[step]
        return [source for source, is_wanted in zip(found.sources, _mask(found, endpoint), strict=True) if is_wanted]

    def problems(self, run: Run, steps: Sequence[int], endpoint: Endpoint) -> NDArray[np.float64]:
        """The endpoint's value of each problem, ``[steps, N]`` in [0, 1]."""
        first = self.of(run)[steps[0]]
        mask = _mask(first, endpoint)
        if not mask.any():
            known = ", ".join(first.groups())
            raise ConfigError(f"--primary {endpoint.name}: there are no problems of these sources; they are {known}")
        return np.stack([self._values(run, step, endpoint.metric)[mask] for step in steps])

    def outcome(self, run: Run, steps: Sequence[int], endpoint: Endpoint) -> float:
        """Mean over problems and evaluations."""
        return float(self.problems(run, steps, endpoint).mean())


def _mask(evaluation: Evaluation, endpoint: Endpoint) -> NDArray[np.bool_]:
    """Which of an evaluation's problems belong to an endpoint, ``[N]``."""
    masks = [mask for name, mask in evaluation.groups().items() if not endpoint.sources or name in endpoint.sources]
    return np.any(masks, axis=0) if masks else np.full(len(evaluation.rows), False)


def choose_split(runs: Sequence[Run], wanted: str | None) -> str:
    """The split that is asked for; by default test where all runs have it, else validation."""
    if wanted is None:
        return "test" if all(run.of_split("test") for run in runs) else "validation"
    if not any(run.of_split(wanted) for run in runs):
        known = ", ".join(sorted({split for run in runs for split, _ in run.evaluations}))
        raise ConfigError(f"--split {wanted}: no run was evaluated on it; there are evaluations on {known}")
    return wanted


def common_k(runs: Sequence[Run], table: OutcomeTable) -> list[int]:
    """The k of pass@k that all runs ask for, and have the samples for."""
    fewest = min((e.num_samples, str(run.folder)) for run in runs for e in table.of(run).values())
    usable = sorted(k for k in set.intersection(*(set(run.pass_k) for run in runs)) if k <= fewest[0])
    if not usable:
        raise ConfigError(
            f"the runs have no k of pass@k in common (model.pass_k; {fewest[1]} has {fewest[0]} samples per problem): "
            "report on them separately"
        )
    return usable


def group_runs(runs: Sequence[Run], aside: Sequence[str], table: OutcomeTable, notes: list[str]) -> list[Setting]:
    """The settings, each with one run per seed: the one that trained longest, then with most evaluations.

    Args:
        runs: all runs.
        aside: keys in which runs of one setting may differ, as in their seed.
        table: what was found at each evaluation.
        notes: what is left out is told here.

    Returns:
        By weight, then by label.
    """
    labels, values = name_settings(runs, aside)
    free = ("seed_everything", *aside)
    replicates = [str(sorted((k, v) for k, v in run.config.items() if is_within(k, free))) for run in runs]
    chosen: dict[tuple[str, str], tuple[Run, dict[str, Any]]] = {}
    for run, label, value, replicate in zip(runs, labels, values, replicates, strict=True):
        rival = chosen.get((label, replicate))
        if rival is not None:
            keep = max(rival[0], run, key=lambda r: (max(table.of(r)), len(table.of(r))))
            other = run if keep is rival[0] else rival[0]
            notes.append(f"{other.folder} repeats {keep.folder} (setting and seed) and is left out")
            run = keep
        chosen[label, replicate] = run, value
    settings: list[Setting] = []
    for label in dict.fromkeys(labels):
        own = [run for (name, _), (run, _) in chosen.items() if name == label]
        longest = max(max(table.of(run)) for run in own)
        done = [run for run in own if max(table.of(run)) == longest]
        for run in own:
            if run not in done:
                notes.append(
                    f"{run.folder} ends at step {max(table.of(run))}, other runs of {label} at {longest}: it is left "
                    "out (if it stopped for what the method does, the rest flatters the method)"
                )
        settings.append(Setting(label, next(v for (name, _), (_, v) in chosen.items() if name == label), done))
    return sorted(settings, key=lambda s: (s.runs[0].weight, s.label))
