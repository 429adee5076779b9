"""Everything that a report shows, computed from records: settings, their runs, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hdpo.errors import ConfigError
from hdpo.evaluation.intervals import runs_interval
from hdpo.evaluation.outcomes import Endpoint, OutcomeTable, Setting, choose_split, common_k, group_runs
from hdpo.evaluation.records import recompute
from hdpo.evaluation.runs import Run
from hdpo.evaluation.statistics import compare, compare_policies, holm, selection_bias

__all__ = ["Question", "build_report"]

TRAINING_CURVES = ("cliff/fraction", "privileged/pass_rate")


@dataclass(frozen=True)
class Question:
    """What is asked of the runs; said before they are compared.

    Attributes:
        baseline: the setting that the others are compared with; None for the one with weight 0.
        primary: endpoints that decide, ``METRIC`` or ``METRIC:SOURCE+SOURCE`` (``pass@8:tier5+tier6``).
        family: settings whose primary endpoints are tested together, with Holm's adjustment.
        margin: how much lower an outcome may be and still count as not lower.
        last: a run's outcome is the mean of so many of its last evaluations (none before the first step).
        split: ``validation`` or ``test``; None for test where all runs have it.
        ignore: configuration keys (or sections) in which runs of one setting may differ, as in their seed.
        seeds: only runs with one of these, where older ones suggested the question; empty for all.

    Raises:
        ConfigError: a number out of its range.
    """

    baseline: str | None = None
    primary: list[str] = field(default_factory=list)
    family: list[str] = field(default_factory=list)
    margin: float | None = None
    last: int = 5
    split: str | None = None
    ignore: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"--last must be at least 1, got {self.last}")
        if self.margin is not None and not 0 <= self.margin < 1:
            raise ConfigError(f"--margin must be a number from 0 to 1, got {self.margin}")


def _mean(outcomes: Sequence[float]) -> dict[str, float | None]:
    """Mean over runs with its interval over runs; no interval where nothing tells how runs vary."""
    low, high = runs_interval(outcomes) if np.ptp(outcomes) > 0 else (None, None)
    return {"value": float(np.mean(outcomes)), "low": low, "high": high}


def _setting_entry(
    setting: Setting, endpoints: Sequence[Endpoint], question: Question, table: OutcomeTable
) -> dict[str, Any]:
    """All numbers of one setting."""
    runs, steps = setting.runs, table.steps(setting.runs)
    last = steps[-question.last :]
    sources = list(table.of(runs[0])[steps[0]].groups())
    whole = [e for e in endpoints if not e.sources]
    spent = [run.spent(table.split, steps[-1]) for run in runs]
    entry: dict[str, Any] = {
        "label": setting.label,
        "values": setting.values,
        "distillation_weight": runs[0].weight,
        "seeds": [run.seed for run in runs],
        "num_runs": len(runs),
        "steps": last,
        "outcome": {e.name: _mean([table.outcome(run, last, e) for run in runs]) for e in endpoints},
        "last": {e.name: _mean([table.outcome(run, steps[-1:], e) for run in runs]) for e in endpoints},
        "best": {},
        "by_source": {
            s: {e.metric: _mean([table.outcome(r, last, Endpoint(e.metric, (s,))) for r in runs]) for e in whole}
            for s in sources
        },
        "before": {
            s: {e.metric: _mean([table.outcome(r, [0], Endpoint(e.metric, (s,))) for r in runs]) for e in whole}
            for s in sources
            if all(0 in table.of(run) for run in runs)
        },
        "curves": {
            e.name: {step: _mean([table.outcome(run, [step], e) for run in runs]) for step in sorted(table.of(runs[0]))
                if all(step in table.of(run) for run in runs)}
            for e in endpoints
        },
        "training": _training_curves(runs, steps, table.split),
        "spent": {
            name: float(np.mean([s[name] for s in spent])) if all(name in s for s in spent) else None
            for name in ("train_seconds", "tokens", "completions", "solutions")
        },
    }  # fmt: skip
    for endpoint in endpoints:
        tables = [table.problems(run, steps, endpoint) for run in runs]
        best = [float(t.mean(axis=1).max()) for t in tables]
        entry["best"][endpoint.name] = {
            "value": float(np.mean(best)),
            "selection_bias": float(np.mean([selection_bias(t) for t in tables])),
        }
    return entry


def _training_curves(runs: Sequence[Run], steps: Sequence[int], split: str) -> dict[str, dict[int, Any]]:
    """Means over runs of what training logged in the steps before each evaluation."""
    curves: dict[str, dict[int, Any]] = {}
    for name in TRAINING_CURVES:
        for step in steps:
            found = [run.spent(split, step).get("recent", {}) for run in runs]
            values = [one[name] for one in found if name in one]
            if values:  # rates, so that their interval is one of outcomes
                curves.setdefault(name, {})[step] = _mean(values)
    return curves


def _run_entry(
    run: Run, label: str, ks: Sequence[int], endpoints: Sequence[Endpoint], question: Question, table: OutcomeTable
) -> Any:
    steps = table.steps([run])
    return {
        "folder": str(run.folder),
        "setting": label,
        "seed": run.seed,
        "step": steps[-1],
        "num_evaluations": len(table.of(run)),
        "outcome": {e.name: table.outcome(run, steps[-question.last :], e) for e in endpoints},
        "last": recompute(table.of(run)[steps[-1]], ks),
        "spent": {k: v for k, v in run.spent(table.split, steps[-1]).items() if k != "recent"},
        "processes": run.provenance.get("processes", []),
    }


def _baseline(settings: Sequence[Setting], wanted: str | None, notes: list[str]) -> Setting | None:
    known = "; ".join(setting.label for setting in settings)
    if wanted is not None:
        for setting in settings:
            if setting.label == wanted:
                return setting
        raise ConfigError(f"--baseline: there is no setting {wanted!r}; there are: {known}")
    found = [setting for setting in settings if setting.runs[0].weight == 0]
    found = [setting for setting in found if setting.label == "grpo"] or found  # others distil nothing either
    if len(found) == 1:
        return found[0]
    if len(settings) > 1:
        number = "several settings have" if found else "no setting has"
        notes.append(f"{number} weight 0, so nothing is compared: name one with --baseline ({known})")
    return None


def _comparable(base: Setting, other: Setting, question: Question, table: OutcomeTable, notes: list[str]) -> list[int]:
    """The steps at which two settings are compared; empty where they cannot be."""
    runs = [*base.runs, *other.runs]
    steps = table.steps(runs)[-question.last :] if set.intersection(*(set(table.of(r)) for r in runs)) else []
    if not steps:
        notes.append(f"{other.label} and {base.label} were never evaluated at the same steps, so are not compared")
    elif len({table.of(run)[step].problems for run in runs for step in steps}) > 1:
        notes.append(f"{other.label} and {base.label} were evaluated on different problems, so are not compared")
        return []
    elif steps[-1] < max(max(table.of(run)) for run in runs):
        notes.append(f"{other.label} and {base.label} are compared up to step {steps[-1]}, the last that all runs have")
    return steps


def _compared(
    base: Setting, other: Setting, endpoint: Endpoint, steps: Sequence[int], table: OutcomeTable, **options: Any
) -> dict[str, Any]:
    means = [[table.problems(run, steps, endpoint).mean(axis=0) for run in setting.runs] for setting in (base, other)]
    outcomes = [[float(values.mean()) for values in side] for side in means]
    problems = np.mean(means[0], axis=0), np.mean(means[1], axis=0)
    strata = table.sources(base.runs[0], steps[0], endpoint)
    result = compare(outcomes[0], outcomes[1], problems=problems, strata=strata, **options)
    row = {"setting": other.label, "endpoint": endpoint.name, "steps": list(steps)}
    return row | {"baseline": float(np.mean(outcomes[0])), "with": float(np.mean(outcomes[1]))} | asdict(result)


def _policies(
    base: Setting, other: Setting, endpoints: Sequence[Endpoint], table: OutcomeTable, step: int
) -> list[dict[str, Any]]:
    """One run of each setting on the same problems: these two policies, not their methods."""
    pairs = [(a, b) for a in base.runs for b in other.runs]
    first, second = next(((a, b) for a, b in pairs if a.seed == b.seed), pairs[0])
    rows = []
    for endpoint in endpoints:
        sides = [table.problems(run, [step], endpoint)[0] for run in (first, second)]
        value, low, high = compare_policies(sides[0], sides[1], table.sources(first, step, endpoint))
        row = {
            "setting": other.label,
            "endpoint": endpoint.name,
            "step": step,
            "value": value,
            "low": low,
            "high": high,
        }
        rows.append(row | {"first": str(first.folder), "second": str(second.folder)})
    return rows


def _against(
    base: Setting,
    other: Setting,
    endpoints: Sequence[Endpoint],
    question: Question,
    table: OutcomeTable,
    notes: list[str],
) -> dict[str, list[dict[str, Any]]]:
    """How a setting compares with the baseline: over runs, overall and by source, or as policies."""
    steps = _comparable(base, other, question, table, notes)
    if not steps:
        return {}
    if min(len(base.runs), len(other.runs)) == 1:
        return {"policies": _policies(base, other, endpoints, table, steps[-1])}
    whole = [e.metric for e in endpoints if not e.sources]
    by_source = []
    for source in table.of(base.runs[0])[steps[0]].groups():
        for metric in (whole[0], whole[-1]):
            row = _compared(base, other, Endpoint(metric, (source,)), steps, table, tests=False)
            kept = ("setting", "endpoint", "steps", "baseline", "with", "value", "low", "high", "num_runs")
            by_source.append({name: row[name] for name in kept} | {"source": source, "metric": metric})
    comparisons = [_compared(base, other, e, steps, table, margin=question.margin) for e in endpoints]
    return {"comparisons": comparisons, "by_source": by_source}


def _family(
    question: Question, base: Setting | None, others: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The comparisons that were named beforehand, with p-values adjusted among themselves."""
    if not question.primary:
        if question.family:
            raise ConfigError("--family needs --primary: name the endpoints that decide")
        return []
    if base is None:
        raise ConfigError("--primary needs a baseline to compare with: name it with --baseline")
    unknown = [label for label in question.family if label not in others]
    if unknown or (not question.family and len(others) > 1):
        wrong = (
            f"there is no setting {unknown[0]!r} besides the baseline" if unknown else "name the settings it is about"
        )
        raise ConfigError(f"--family: {wrong}; there are: {'; '.join(others)}")
    found = {(row["setting"], row["endpoint"]): row for row in rows}
    members = list(dict.fromkeys((label, name) for label in question.family or others for name in question.primary))
    adjusted = holm([found.get(member, {}).get("p_value") for member in members])
    return [
        {"setting": member[0], "endpoint": member[1], "p_value_holm": p, "tested": p is not None}
        for member, p in zip(members, adjusted, strict=True)
    ]


def build_report(runs: Sequence[Run], question: Question | None = None) -> dict[str, Any]:
    """Compute everything that a report shows.

    Args:
        runs: as :func:`hdpo.evaluation.runs.find_runs` returns them.
        question: what is asked of them; None for the defaults.

    Returns:
        JSON values: ``settings`` (outcomes with intervals over runs, last and best evaluations, curves), ``runs``,
        ``comparisons`` with the baseline (see :class:`~hdpo.evaluation.statistics.Comparison`), ``by_source`` (the
        same by source, intervals only), ``family`` (the comparisons named beforehand, Holm-adjusted), ``policies``
        (where a side has one run) and ``notes``, what limits all this.

    Raises:
        ConfigError: the runs have no k in common, or the question names what is not there.
    """
    question = question or Question()
    notes: list[str] = []
    if question.seeds:
        if missing := sorted(set(question.seeds) - {run.seed for run in runs}):
            raise ConfigError(f"--seeds: no run has seed {', '.join(map(str, missing))}")
        runs = [run for run in runs if run.seed in question.seeds]
        notes.append(f"only runs with seed {', '.join(map(str, question.seeds))}")
    split = choose_split(runs, question.split)
    usable = [run for run in runs if run.of_split(split)]
    if len(usable) < len(runs):
        notes.append(f"{len(runs) - len(usable)} of {len(runs)} runs have no evaluation on the {split} split")
    table = OutcomeTable(split)
    for run in usable:
        if absent := sorted(set(run.of_split(split)) - set(table.of(run))):
            steps = ", ".join(map(str, absent))
            notes.append(f"{run.folder}: evaluations at {steps} are of other problems than its last, so are left out")
    ks = common_k(usable, table)
    names = dict.fromkeys(["greedy_accuracy", *(f"pass@{k}" for k in ks), *question.primary])
    endpoints = [Endpoint.parse(name) for name in names]
    settings = group_runs(usable, question.ignore, table, notes)
    base = _baseline(settings, question.baseline, notes)
    found: dict[str, list[dict[str, Any]]] = {"comparisons": [], "by_source": [], "policies": []}
    for other in settings:
        if base is not None and other is not base:
            for name, rows in _against(base, other, endpoints, question, table, notes).items():
                found[name] += rows
    others = [setting.label for setting in settings if setting is not base]
    ungraded = sum(e.num_without_verdict for run in usable for e in table.of(run).values())
    if ungraded:
        notes.append(f"{ungraded} completions got no verdict (time-outs or errors of the verifier) and count as wrong")
    return {
        "question": asdict(question),
        "split": split,
        "pass_k": ks,
        "endpoints": list(names),
        "baseline": base.label if base else None,
        "settings": [_setting_entry(setting, endpoints, question, table) for setting in settings],
        "runs": [_run_entry(run, s.label, ks, endpoints, question, table) for s in settings for run in s.runs],
        "family": _family(question, base, others, found["comparisons"]),
        **found,
        "notes": notes,
    }
