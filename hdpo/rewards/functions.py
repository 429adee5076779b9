"""Rewards as plain Python functions, with the signature that TRL's trainers use, alone or beside verifiers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hdpo.errors import ConfigError, check_choice
from hdpo.files import import_object
from hdpo.rewards.base import Grade, Outcome, PendingGrades, Verifier, check_pairs, source_hash
from hdpo.rewards.worker_verifier import WorkerVerifier

RewardFunction = Callable[..., Sequence[float]]
"""``reward(prompts, completions, references, **columns) -> list[float]``; it is given what it names of these.

In a union it stands last: config.yaml is written by the first type that takes a value, and this one takes any."""

_KEY = "verifier.function"
_VERDICTS = (Outcome.CORRECT, Outcome.WRONG, Outcome.NO_ANSWER)


def _imported(function: str | RewardFunction) -> RewardFunction:
    found: Any = import_object(_KEY, function) if isinstance(function, str) else function
    if isinstance(found, type) and issubclass(found, Verifier):
        path = f"{found.__module__}.{found.__qualname__}"
        raise ConfigError(f"{_KEY}: {path} is no function: a verifier is named as {{class_path: {path}}}")
    return found


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
    """Calls reward functions by name, in a worker or in the trainer; what becomes of the rewards is decided there."""

    def __init__(self, functions: Mapping[str, str | RewardFunction]) -> None:
        self.functions = {name: _imported(function) for name, function in functions.items()}

    def grade_all(self, columns: Mapping[str, Sequence[Any]]) -> list[Grade]:
        """Return the named rewards of N completions, in ``parts``; what a function raises is the caller's.

        Args:
            columns: N values each: ``completions``, ``references`` and all others.
        """
        rewards = []
        for name, function in self.functions.items():
            values = function(**{key: list(columns[key]) for key in _arguments(function, list(columns))})
            if len(values) != len(columns["completions"]):
                raise ValueError(f"{name}: got {len(values)} rewards for {len(columns['completions'])} completions")
            rewards.append([math.nan if value is None else float(value) for value in values])
        return [_named(dict(zip(self.functions, row, strict=True))) for row in zip(*rewards, strict=True)]

    def grade(self, columns: Mapping[str, Any]) -> Grade:
        """Return the named rewards of one completion from its value of each column."""
        return self.grade_all({name: [value] for name, value in columns.items()})[0]


def _named(rewards: dict[str, float]) -> Grade:
    if not all(map(math.isfinite, rewards.values())):
        return Grade(Outcome.ERROR, 0.0, _listed(rewards))
    # A worker does not believe a wrong answer that took much memory; nor is a reward of 0 believed.
    return Grade(Outcome.CORRECT if min(rewards.values()) > 0 else Outcome.WRONG, 0.0, parts=rewards)


def _listed(rewards: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in rewards.items())


class _Combined(PendingGrades):
    """Grades of several members, each of all completions, made one for each completion when they are there."""

    def __init__(self, members: Sequence[PendingGrades], combine: Callable[[tuple[Grade, ...]], Grade]) -> None:
        self._members, self._combine = members, combine

    def result(self) -> list[Grade]:
        return [self._combine(row) for row in zip(*(member.result() for member in self._members), strict=True)]

    def done(self) -> bool:
        return all(member.done() for member in self._members)


class FunctionVerifier(WorkerVerifier):
    """Rewards from Python functions ``reward(prompts, completions, **columns) -> list[float]``, and from verifiers.

    A function is given what it names of ``prompts``, ``completions``, ``references`` and the columns of
    ``data.source.columns.extra``, or all of them as keywords. None and values that are not finite are an ``ERROR``, as
    are exceptions in a worker.

    Several rewards have names, and a verifier may be one of them, such as
    ``{correct: {class_path: hdpo.rewards.MathVerifier}, short: my_rewards:short}``. Where one of them comes to no
    verdict on a completion, there is none. A problem is usable if each verifier among them can use it, and if it has a
    value in each column that the functions name. The mean of each is logged as ``reward/NAME``.

    In the workers, each call is about one completion, has a deadline, and cannot hold up or crash the trainer. In the
    trainer's process a call is about the whole batch, without a deadline, and an exception ends the run.

    Args:
        function: ``package.module:name`` or a function; several by name, verifiers among them.
        threshold: a completion is correct, in every sense of this project (cliffs, pass@k, the filter of privileged
            rollouts), if its reward, or the one that ``success`` names, is at least this.
        success: name of the reward that decides about success; by default the first.
        weights: of the rewards in their sum, which is what training maximises; by default 1 each.
        in_process: call the functions in the trainer's process; verifiers work where they do otherwise.
        batch_timeout: seconds that the functions may take for one call together; null for no limit.
        workers: number and limits of the worker processes; see :class:`~hdpo.rewards.worker_verifier.WorkerVerifier`.

    Raises:
        ConfigError: a function that cannot be imported, or a name that is none of theirs.

    Example:
        >>> def short(completions, **columns):
        ...     return [1.0 if len(text) < 10 else 0.0 for text in completions]
        >>> verifier = FunctionVerifier(short, in_process=True)
        >>> [grade.outcome.value for grade in verifier.grade(["so 5", "it may be 5 or 6"], ["5", "5"])]
        ['correct', 'wrong']
        >>> from hdpo.rewards import MultipleChoiceVerifier
        >>> both = {"choice": MultipleChoiceVerifier(), "short": short}
        >>> verifier = FunctionVerifier(both, weights={"short": 0.5}, in_process=True)
        >>> [(g.outcome.value, g.reward) for g in verifier.grade(["B", "C", "Answer: (B)"], ["B"] * 3)]
        [('correct', 1.5), ('wrong', 0.5), ('correct', 1.0)]
    """

    def __init__(
        self,
        function: str | dict[str, str | Verifier | RewardFunction] | RewardFunction,
        threshold: float = 1.0,
        success: str | None = None,
        weights: dict[str, float] | None = None,
        in_process: bool = False,
        batch_timeout: float | None = 600.0,
        **workers: Any,
    ) -> None:
        super().__init__(batch_timeout=batch_timeout, **workers)
        self.function = members = function if isinstance(function, dict) else {"reward": function}
        self.verifiers = {name: member for name, member in members.items() if isinstance(member, Verifier)}
        self.functions = {name: member for name, member in members.items() if not isinstance(member, Verifier)}
        self.threshold = threshold
        self.success = success or next(iter(members), "")
        self.weights = weights or {}
        self.in_process = in_process
        for name in (self.success, *self.weights):
            check_choice("verifier.success and verifier.weights", name, tuple(members))
        FunctionGrader(self.functions)
        if not in_process:
            self._grader()

    def _grader(self) -> tuple[str, dict[str, Any]]:
        paths = {name: _path(function) for name, function in self.functions.items()}
        for path in paths.values():
            if path.startswith("__main__:") or "<" in path:  # <lambda>, <locals>
                raise ConfigError(f"{_KEY}: workers cannot import {path}: move it to a module, or set in_process: true")
        return f"{__name__}:{FunctionGrader.__name__}", {"functions": paths}

    def submit(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> PendingGrades:
        """Begin to grade; see :meth:`WorkerVerifier.grade` for the errors.

        Raises:
            ConfigError: a function needs a column that is not there.
        """
        check_pairs(completions, references, **columns)
        table = {"completions": completions, "references": references, **columns}
        members = [v.submit(completions, references, **columns) for v in self.verifiers.values()]
        return _Combined([*members, *([self._rewards(table)] if self.functions else [])], self._combine)

    def _rewards(self, table: Mapping[str, Sequence[Any]]) -> PendingGrades:
        """The functions' rewards."""
        grader = FunctionGrader(self.functions)
        if self.in_process:
            return PendingGrades(grader.grade_all(table))
        for function in grader.functions.values():
            _arguments(function, list(table))
        rows = zip(*table.values(), strict=True)
        return self._pending([("grade", dict(zip(table, row, strict=True))) for row in rows])

    def _combine(self, grades: tuple[Grade, ...]) -> Grade:
        """One grade of what the verifiers and then the functions say: the one place where success is decided."""
        members = dict(zip((*self.verifiers, None)[: len(grades)], grades, strict=True))
        for name, grade in members.items():
            if grade.outcome not in _VERDICTS:
                return Grade(grade.outcome, 0.0, ": ".join(filter(None, (name, grade.detail))))
        parts = {n: members[n].reward if n in self.verifiers else members[None].parts[n] for n in self.function}
        decisive = members.get(self.success)
        outcome = Outcome.NO_ANSWER if decisive and decisive.outcome is Outcome.NO_ANSWER else Outcome.WRONG
        if parts[self.success] >= self.threshold:
            outcome = Outcome.CORRECT
        reward = sum(self.weights.get(name, 1.0) * value for name, value in parts.items())
        return Grade(outcome, reward, _listed(parts), parts)

    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Whether each verifier can use a problem, and it has a value in each column that the functions name."""
        table = {"references": references, **columns}
        functions = FunctionGrader(self.functions).functions.values()
        named = {name for function in functions for name in inspect.signature(function).parameters}
        needed = [values for name, values in table.items() if name in named]
        able = [verifier.usable(references, **columns) for verifier in self.verifiers.values()]
        return [
            all(values[i] not in (None, "", []) for values in needed) and all(answers[i] for answers in able)
            for i in range(len(references))
        ]

    def identity(self) -> dict[str, Any]:
        """Return the functions by name, with the code of their modules, and the identities of the verifiers."""
        paths = {name: _path(function) for name, function in self.functions.items()}
        code = source_hash(*(path.partition(":")[0] for path in paths.values()))
        verifiers = {name: verifier.identity() for name, verifier in self.verifiers.items()}
        return super().identity() | {"functions": paths, "functions_code": code, "verifiers": verifiers}

    def start(self) -> None:
        """Start all workers, those of the verifiers too; see :meth:`WorkerVerifier.start`."""
        for verifier in self.verifiers.values():
            verifier.start()
        if self.functions and not self.in_process:
            super().start()

    def close(self) -> None:
        """End all workers, those of the verifiers too."""
        for verifier in self.verifiers.values():
            verifier.close()
        super().close()


def _path(function: str | RewardFunction) -> str:
    return function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
