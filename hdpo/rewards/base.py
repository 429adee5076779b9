"""The verifier's interface: completions and reference answers in, one grade per completion out."""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Outcome(StrEnum):
    """How the grading of one completion ended.

    ``CORRECT``, ``WRONG`` and ``NO_ANSWER`` are verdicts on the completion. With the others there is no verdict, so
    that a broken checker can never pass for a policy that answers wrongly.
    """

    CORRECT = "correct"
    """The completion solves the problem."""
    WRONG = "wrong"
    """There is an answer, and it does not solve the problem."""
    NO_ANSWER = "no_answer"
    """The completion commits itself to no final answer."""
    TIMEOUT = "timeout"
    """Grading did not end before its deadline."""
    ERROR = "error"
    """Grading failed: an exception, too much memory, or a worker that crashed."""
    INVALID_REFERENCE = "invalid_reference"
    """The reference cannot be understood, so that no answer can be judged against it."""


@dataclass(frozen=True)
class Grade:
    """The result for one completion.

    Attributes:
        outcome: how grading ended.
        reward: R(x, y) of the paper's section 2; 1 for ``CORRECT`` and 0 otherwise, unless the verifier says so.
        detail: for a person to read, mostly what went wrong; may be empty.
        parts: the named rewards that the reward is the weighted sum of; empty where it is one of its own.
    """

    outcome: Outcome
    reward: float
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


class VerifierError(RuntimeError):
    """The verifier itself cannot work (for example, no worker process starts). No grade was given."""


class PendingGrades:
    """Grades, some of which may still be on their way; see :meth:`Verifier.submit`.

    Args:
        grades: one per completion, in their order.
        owner: kept alive until the grades are; a verifier that is garbage ends its workers.
    """

    def __init__(self, grades: Sequence[Grade | Future[Grade]], owner: Verifier | None = None) -> None:
        self._grades = grades
        self._owner = owner

    def result(self) -> list[Grade]:
        """Wait until all are graded, and return them in the order of the completions.

        Raises:
            VerifierError: the verifier failed or was closed before all were graded.
        """
        return [grade if isinstance(grade, Grade) else grade.result() for grade in self._grades]

    def done(self) -> bool:
        """Whether :meth:`result` would return at once."""
        return all(isinstance(grade, Grade) or grade.done() for grade in self._grades)


class Verifier(ABC):
    """Decides whether completions solve their problems.

    A verifier of your own needs :meth:`grade` and :meth:`usable`; the rest has defaults. It is a context manager,
    starts at its first use and may be used again after :meth:`close`.

    ``columns`` are keyword arguments with one value per completion (per reference in :meth:`usable`): ``prompts``, the
    problem texts, and the columns that ``data.source.columns.extra`` names.

    Example:
        >>> class LastWord(Verifier):
        ...     def grade(self, completions, references, **columns):
        ...         check_pairs(completions, references, **columns)
        ...         right = [c.split()[-1] == r for c, r in zip(completions, references)]
        ...         return [Grade(Outcome.CORRECT, 1.0) if r else Grade(Outcome.WRONG, 0.0) for r in right]
        ...     def usable(self, references, **columns):
        ...         return [bool(r) for r in references]
        >>> with LastWord() as verifier:
        ...     [grade.reward for grade in verifier.grade(["so it is 5", "perhaps 6"], ["5", "5"])]
        [1.0, 0.0]
    """

    @abstractmethod
    def grade(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> list[Grade]:
        """Grade completions against their references.

        Args:
            completions: N completions, as decoded text.
            references: N reference answers.
            columns: N values each.

        Returns:
            N grades in the same order.
        """

    @abstractmethod
    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Which problems can be graded at all.

        The others have to be dropped before training: no completion could ever be right, and they would look like
        cliffs forever.

        Args:
            references: N reference answers; None where a row has none.
            columns: N values each.
        """

    def submit(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> PendingGrades:
        """Begin to grade, and return at once where the verifier can work beside its caller.

        ``submit(...).result()`` equals ``grade(...)``.
        """
        return PendingGrades(self.grade(completions, references, **columns))

    def identity(self) -> dict[str, Any]:
        """Return what the verdicts depend on, as plain JSON; it is part of the prepared data's cache key.

        By default the class, a hash of its module's and this package's code, and the public attributes that are JSON.
        """
        return {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "code": source_hash(type(self).__module__),
            "settings": {k: v for k, v in vars(self).items() if not k.startswith("_") and _is_json(v)},
        }

    def start(self) -> None:  # noqa: B027 - optional
        """Make everything ready now, so that the first :meth:`grade` does not have to. Optional."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release everything; may be called any number of times."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def source_hash(*modules: str) -> str:
    """Return a hash of the code of this package and of imported modules; one without a file adds nothing."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    files += [Path(file) for name in modules if (file := getattr(sys.modules[name], "__file__", None))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def check_pairs(completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> None:
    """Refuse what cannot be graded one by one.

    Raises:
        ValueError: the numbers of completions, references and values of a column differ.
        TypeError: a completion or reference is not a string.
    """
    for name, texts in (("completions", completions), ("references", references)):
        if isinstance(texts, str):
            raise TypeError(f"{name} must be a sequence of strings, got one string: put it into a list")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{i}] must be a string, got {type(text).__name__}")
    for name, values in {"references": references, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(f"got {len(completions)} completions and {len(values)} {name}: each needs its own")
