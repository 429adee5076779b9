"""Rewards as plain Python functions, with the signature that TRL's trainers use."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hdpo.errors import ConfigError, check_choice
from hdpo.files import import_object
from hdpo.rewards.base import Grade, Outcome, PendingGrades, check_pairs, source_hash
from hdpo.rewards.worker_verifier import WorkerVerifier

__all__ = ["FunctionGrader", "FunctionVerifier", "RewardFunction"]

RewardFunction = Callable[..., Sequence[float]]
"""``reward(prompts, completions, references, **columns) -> list[float]``; it is given what it names of these."""

_KEY = "verifier.function"


def _arguments(function: RewardFunction, names: Sequence[str]) -> list[str]:
    """Return the columns that a function takes.

    Raises:
        ConfigError: it needs one that is not there.
    """
    parameters = inspect.signature(function).parameters
    single = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, parameter in single.items():
        if parameter.default is parameter.empty and name not in names:
            raise ConfigError(f"{_KEY}: the reward needs the column {name!r}: name it in data.source.columns.extra")
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if takes_all or name in single]


class FunctionGrader:
    """Calls reward functions, in a worker or in the trainer; see :class:`FunctionVerifier` for the arguments."""

    def __init__(
        self,
        functions: Mapping[str, str | RewardFunction],
        weights: Mapping[str, float],
        success: str,
        threshold: float,
    ) -> None:
        self.functions = {n: import_object(_KEY, f) if isinstance(f, str) else f for n, f in functions.items()}
        self._weights, self._success, self._threshold = weights, success, threshold

    def grade_all(self, columns: Mapping[str, Sequence[Any]]) -> list[Grade]:
        """Grade N completions; what a function raises is the caller's.

        Args:
            columns: N values each: ``completions``, ``references`` and all others.
        """
        rewards = []
        for name, function in self.functions.items():
            values = function(**{key: list(columns[key]) for key in _arguments(function, list(columns))})
            if len(values) != len(columns["completions"]):
                raise ValueError(f"{name}: got {len(values)} rewards for {len(columns['completions'])} completions")
            rewards.append([math.nan if value is None else float(value) for value in values])
        return [self._grade(dict(zip(self.functions, row, strict=True))) for row in zip(*rewards, strict=True)]

    def grade(self, columns: Mapping[str, Any]) -> Grade:
        """Grade one completion from its value of each column."""
        return self.grade_all({name: [value] for name, value in columns.items()})[0]

    def _grade(self, rewards: Mapping[str, float]) -> Grade:
        detail = ", ".join(f"{name} {value:g}" for name, value in rewards.items())
        if not all(map(math.isfinite, rewards.values())):
            return Grade(Outcome.ERROR, 0.0, detail)
        outcome = Outcome.CORRECT if rewards[self._success] >= self._threshold else Outcome.WRONG
        return Grade(outcome, sum(self._weights.get(name, 1.0) * value for name, value in rewards.items()), detail)


class FunctionVerifier(WorkerVerifier):
    """Rewards from Python functions ``reward(prompts, completions, **columns) -> list[float]``.

    A function is given what it names of ``prompts``, ``completions``, ``references`` and the columns of
    ``data.source.columns.extra``, or all of them as keywords. A problem is usable if it has a value in each column that
    the functions name. None and values that are not finite are an ``ERROR``, as are exceptions in a worker.

    In the workers, each call is about one completion, has a deadline, and cannot hold up or crash the trainer. In the
    trainer's process a call is about the whole batch, without a deadline, and an exception ends the run.

    Args:
        function: ``package.module:name`` or a function; several by name.
        threshold: a completion is correct, in every sense of this project (cliffs, pass@k, the R = 1 filter), if its
            reward, or the one that ``success`` names, is at least this.
        success: name of the reward that decides about success; by default the first.
        weights: of the rewards in their sum, which is what training maximises; by default 1 each.
        in_process: call the functions in the trainer's process.
        batch_timeout: seconds that the answers of one call may take together; null for no limit.
        workers: number and limits of the worker processes; see :class:`~hdpo.rewards.worker_verifier.WorkerVerifier`.

    Raises:
        ConfigError: a function that cannot be imported, or a name that is none of theirs.

    Example:
        >>> def short(completions, **columns):
        ...     return [1.0 if len(text) < 10 else 0.0 for text in completions]
        >>> verifier = FunctionVerifier(short, in_process=True)
        >>> [grade.outcome.value for grade in verifier.grade(["so 5", "it may be 5 or 6"], ["5", "5"])]
        ['correct', 'wrong']
    """

    def __init__(
        self,
        function: str | RewardFunction | dict[str, str | RewardFunction],
        threshold: float = 1.0,
        success: str | None = None,
        weights: dict[str, float] | None = None,
        in_process: bool = False,
        batch_timeout: float | None = 600.0,
        **workers: Any,
    ) -> None:
        super().__init__(batch_timeout=batch_timeout, **workers)
        self.functions = function if isinstance(function, dict) else {"reward": function}
        self.threshold = threshold
        self.success = success or next(iter(self.functions), "")
        self.weights = weights or {}
        self.in_process = in_process
        for name in (self.success, *self.weights):
            check_choice("verifier.success and verifier.weights", name, tuple(self.functions))
        self._here()
        if not in_process:
            self._grader()

    def _here(self) -> FunctionGrader:
        return FunctionGrader(self.functions, self.weights, self.success, self.threshold)

    def _grader(self) -> tuple[str, dict[str, Any]]:
        paths = {name: _path(function) for name, function in self.functions.items()}
        for path in paths.values():
            if path.startswith("__main__:") or "<" in path:  # <lambda>, <locals>
                raise ConfigError(f"{_KEY}: workers cannot import {path}: move it to a module, or set in_process: true")
        arguments = {"weights": self.weights, "success": self.success, "threshold": self.threshold}
        return f"{__name__}:{FunctionGrader.__name__}", {"functions": paths, **arguments}

    def submit(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> PendingGrades:
        """Begin to grade; see :meth:`WorkerVerifier.grade` for the errors.

        Raises:
            ConfigError: a function needs a column that is not there.
        """
        check_pairs(completions, references, **columns)
        table = {"completions": completions, "references": references, **columns}
        grader = self._here()
        if self.in_process:
            return PendingGrades(grader.grade_all(table))
        for function in grader.functions.values():
            _arguments(function, list(table))
        rows = zip(*table.values(), strict=True)
        return self._pending([("grade", dict(zip(table, row, strict=True))) for row in rows])

    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Whether each problem has a value in each of the columns that the functions name."""
        table = {"references": references, **columns}
        named = {
            name for function in self._here().functions.values() for name in inspect.signature(function).parameters
        }
        needed = [values for name, values in table.items() if name in named]
        return [all(values[i] not in (None, "", []) for values in needed) for i in range(len(references))]

    def identity(self) -> dict[str, Any]:
        """Return the functions by name, with the code of their modules."""
        paths = {name: _path(function) for name, function in self.functions.items()}
        code = source_hash(*(path.partition(":")[0] for path in paths.values()))
        return super().identity() | {"functions": paths, "functions_code": code}


def _path(function: str | RewardFunction) -> str:
    return function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
