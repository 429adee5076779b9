"""Grades mathematical answers with math-verify in processes that can be killed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

from hdpo.errors import check_choice
from hdpo.rewards.base import Grade, Outcome, PendingGrades, check_pairs
from hdpo.rewards.boxed import boxes
from hdpo.rewards.rules import is_readable, judge
from hdpo.rewards.worker_verifier import WorkerVerifier


class MathVerifier(WorkerVerifier):
    r"""Grades final answers with math-verify (R(x, y) of the paper's section 2).

    Args:
        profile: ``strict``: the answer is what the completion's ``\boxed{}`` holds, several different boxes are no
            answer, and the rules of :mod:`hdpo.rewards.rules` come before math-verify; numbers need no worker.
            ``nemo``: NeMo-RL's rule, which the paper used: bare math-verify on the whole completion, boxed or not.
        workers: number and limits of the worker processes; see :class:`~hdpo.rewards.worker_verifier.WorkerVerifier`.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> with MathVerifier(num_workers=1) as verifier:
        ...     grades = verifier.grade([r"so it is \boxed{0.5}", r"\boxed{2}", "no idea"], [r"\frac{1}{2}"] * 3)
        >>> [(grade.outcome.value, grade.reward) for grade in grades]
        [('correct', 1.0), ('wrong', 0.0), ('no_answer', 0.0)]
    """

    def __init__(self, profile: Literal["strict", "nemo"] = "strict", **workers: Any) -> None:
        check_choice("verifier.profile", profile, ("strict", "nemo"))
        super().__init__(**workers)
        self.profile = profile

    def _grader(self) -> tuple[str, dict[str, Any]]:
        return "hdpo.rewards.mathematics:MathGrader", {"profile": self.profile}

    def submit(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> PendingGrades:
        """Begin to grade and return at once; see :meth:`WorkerVerifier.grade` for the errors. No column is read."""
        check_pairs(completions, references, **columns)
        return self._pending([self._item(c, r) for c, r in zip(completions, references, strict=True)])

    def _item(self, completion: str, reference: str) -> Grade | tuple[str, str, str]:
        """Return the grade where the texts decide it, else the request to a worker."""
        if self.profile == "nemo":
            return "grade", completion, reference
        answers = dict.fromkeys("".join(content.split()) for content in boxes(completion))
        if len(answers) != 1 or "" in answers:
            return Grade(Outcome.NO_ANSWER, 0.0, "several different boxes" if len(answers) > 1 else "")
        answer = boxes(completion)[-1]
        verdict = judge(answer, reference)
        if verdict is None:
            return "grade", answer, reference
        outcome, detail = verdict
        return Grade(outcome, float(outcome is Outcome.CORRECT), detail)

    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Whether answers can be judged against each reference; empty texts and None are not usable.

        A reference that takes longer than the deadline or crashes a worker is not usable.
        """
        return self._usable([self._usable_item(reference) for reference in references])

    def _usable_item(self, reference: str | None) -> bool | tuple[str, str]:
        if reference is None or not reference.strip():
            return False
        return (self.profile == "strict" and is_readable(reference)) or ("usable", reference)

    def identity(self) -> dict[str, Any]:
        """Return the profile and the limits, the code, and the versions of the libraries."""
        libraries = ("math-verify", "latex2sympy2_extended", "sympy")
        return super().identity() | {"versions": {name: importlib.metadata.version(name) for name in libraries}}
