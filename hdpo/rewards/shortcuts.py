"""Verdicts that need no worker: on plain integers, and on pairs that were graded before."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict

from hdpo.rewards.base import Outcome
from hdpo.rewards.process import Verdict

__all__ = ["Memory", "plain_integers"]

# One way to write each (no plus sign, no leading zero, no "-0"), and few enough digits to be compared exactly.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,11}")

#: What may be different another time is asked again.
_LASTING = {Outcome.CORRECT, Outcome.WRONG, Outcome.NO_ANSWER, Outcome.INVALID_REFERENCE}


def plain_integers(answer: str, reference: str) -> Verdict | None:
    """The verdict where both texts are plain integers, else None. It is the one that math-verify gives.

    Example:
        >>> plain_integers("12", "12").outcome.value, plain_integers("-12", "12").outcome.value
        ('correct', 'wrong')
        >>> plain_integers("12.0", "12") is None
        True
    """
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
        return Verdict(Outcome.CORRECT if answer == reference else Outcome.WRONG)
    return None


class Memory:
    """Verdicts of the pairs that were graded last; safe to use from several threads.

    Args:
        size: number of pairs.
    """

    def __init__(self, size: int = 16_384) -> None:
        self._size = size
        self._verdicts: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, answer: str, reference: str) -> Verdict | None:
        """The verdict on a pair, or None."""
        with self._lock:
            verdict = self._verdicts.get((answer, reference))
            if verdict is not None:
                self._verdicts.move_to_end((answer, reference))
            return verdict

    def put(self, answer: str, reference: str, verdict: Verdict) -> None:
        """Keep a verdict, unless it is a failure or a missed deadline."""
        if verdict.outcome not in _LASTING:
            return
        with self._lock:
            self._verdicts[answer, reference] = verdict
            self._verdicts.move_to_end((answer, reference))
            if len(self._verdicts) > self._size:
                self._verdicts.popitem(last=False)
