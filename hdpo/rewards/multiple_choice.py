"""Grades multiple-choice answers by their letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hdpo.rewards.base import Grade, Outcome, Verifier, check_pairs
from hdpo.rewards.boxed import boxes
from hdpo.rewards.rules import choice

_PREFIX = re.compile(r".*\banswer\s*(?:is\s*:?|:)\s*", re.IGNORECASE)


class MultipleChoiceVerifier(Verifier):
    r"""Compares letters, in spellings such as ``B``, ``(B)``, ``B. 12``, ``\boxed{B}`` and ``The answer is (B)``.

    The answer is what the completion's ``\boxed{}`` holds, or else its last line. Several different letters, or one
    that is not among the choices, are no answer.

    Args:
        choices: the letters that there are.

    Example:
        >>> verifier = MultipleChoiceVerifier("ABCD")
        >>> [grade.outcome.value for grade in verifier.grade([r"so \boxed{B}", "Answer: C. 12", "B or C"], ["B"] * 3)]
        ['correct', 'wrong', 'no_answer']
    """

    def __init__(self, choices: str = "ABCDEFGHIJ") -> None:
        self.choices = choices

    def grade(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> list[Grade]:
        """Grade completions against the letters; no column is read."""
        check_pairs(completions, references, **columns)
        return [self._grade(c, r) for c, r in zip(completions, references, strict=True)]

    def _grade(self, completion: str, reference: str) -> Grade:
        if not self.usable([reference])[0]:
            return Grade(Outcome.INVALID_REFERENCE, 0.0)
        letters = {choice(content) for content in boxes(completion) or [_last_line(completion)]}
        letter = letters.pop()
        if letters or letter is None or letter not in self.choices:
            return Grade(Outcome.NO_ANSWER, 0.0)
        return Grade(Outcome.CORRECT, 1.0) if letter == choice(reference) else Grade(Outcome.WRONG, 0.0)

    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Whether each reference is one of the letters."""
        return [(choice(reference or "") or " ") in self.choices for reference in references]


def _last_line(text: str) -> str:
    lines = text.replace("*", "").strip().splitlines()
    return _PREFIX.sub("", lines[-1]) if lines else ""
