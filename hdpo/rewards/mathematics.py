r"""Grades one answer with math-verify. Imported by worker processes only: it loads sympy.

math-verify's own time limits are switched off: they are built on ``SIGALRM``, which works in a main thread only and
cannot interrupt C code. The deadline is kept by the process that waits for the worker.

Both profiles read the reference as LaTeX in a ``\boxed{}``, always compare parsed expressions, and call
``verify(gold, prediction)`` in this order: the comparison is not symmetric.

* ``strict``: the answer is the content of the completion's box (found before it comes here), read as LaTeX. Decimals
  are exact, and a relation may stand for an interval, as in ``x > 2`` for ``(2, \infty)``.
* ``nemo``: as in NeMo-RL's math environment, which the paper used: the answer is searched in the whole completion,
  as a plain expression or as LaTeX, boxed or not.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import product

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase, Set
from sympy.core.relational import Relational, _Inequality
from sympy.logic.boolalg import Boolean

from hdpo.rewards.base import Grade, Outcome
from hdpo.rewards.rules import for_math_verify, is_too_large
from hdpo.rewards.worker_main import describe

# Every answer without a time limit of its own logs a warning, and its level is the library's only switch.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

_LATEX = (LatexExtractionConfig(),)
_ANYTHING = (ExprExtractionConfig(), LatexExtractionConfig())

Parsed = list[Basic | MatrixBase | str]
"""What math-verify makes of a text: the expression, if it has one, and the text that it was read from."""


def _parse(text: str, config: tuple[ExprExtractionConfig | LatexExtractionConfig, ...]) -> Parsed:
    # raise_on_error: else a failure inside the library returns [], which is what "no answer" looks like.
    return parse(text, config, parsing_timeout=None, raise_on_error=True)


@lru_cache(maxsize=8192)
def _parse_boxed(latex: str) -> Parsed:
    """Read LaTeX as the content of a box; references return for each of their rollouts."""
    return _parse(f"\\boxed{{{latex}}}", _LATEX)


def _is_expression(value: Basic | MatrixBase | str) -> bool:
    return isinstance(value, Basic | MatrixBase)


def _is_solved(value: Basic | MatrixBase, kind: type[Relational]) -> bool:
    """Whether each relation of a kind that it holds has a symbol on one side and none on the other."""
    sides = [relation.args for relation in value.atoms(kind)]
    return all(
        any(side.is_Symbol for side in pair) and {len(side.free_symbols) for side in pair} == {0, 1} for pair in sides
    )


def _equivalent(gold: Basic | MatrixBase, prediction: Basic | MatrixBase, strict: bool) -> bool:
    """``strict``: a relation may stand for a set of numbers, and a solution must be solved (2x > 4 is not x > 2)."""
    kind = Relational if isinstance(gold, Boolean) else _Inequality
    if strict and isinstance(gold, Boolean | Set) and _is_solved(gold, kind) and not _is_solved(prediction, kind):
        return False
    return verify([gold], [prediction], allow_set_relation_comp=strict, timeout_seconds=None, raise_on_error=True)


def _compare(gold: Parsed, prediction: Parsed, strict: bool) -> tuple[bool, str]:
    """Whether any reading of the prediction equals any reading of the gold, and the first failure on the way.

    The verdict is that of ``verify(gold, prediction)``, which takes ``any`` over the same pairs and counts a failure as
    False. Done pair by pair here to keep the failures, and to try the free comparison of texts before the costly one.
    """
    texts = {value.strip() for value in gold if isinstance(value, str)}
    if any(isinstance(value, str) and value.strip() in texts and value.strip() for value in prediction):
        return True, ""
    failure = ""
    for reference, answer in product(filter(_is_expression, gold), filter(_is_expression, prediction)):
        try:
            if _equivalent(reference, answer, strict):
                return True, ""
        except MemoryError:
            raise  # the worker's to handle
        except Exception as error:
            failure = failure or describe(error)
    return False, failure


class MathGrader:
    """Grades answers one at a time, in the process that it is called in.

    Args:
        profile: ``strict`` or ``nemo``; see the module's docstring.
    """

    def __init__(self, profile: str) -> None:
        self._strict = profile == "strict"
        # Compiles the regular expressions and loads the grammar, so that the first answer does not pay for it.
        self.grade(r"\boxed{\frac{1}{2}}", "0.5")

    def grade(self, answer: str, reference: str) -> Grade:
        r"""Grade one answer.

        Args:
            answer: content of the completion's ``\boxed{}`` (``strict``) or the whole completion (``nemo``).
            reference: the expected answer, as it stands in the data.

        Returns:
            The grade. A failure of the library in reading or comparing is an ``ERROR``, never ``WRONG``.

        Raises:
            MemoryError: the process should not go on.
        """
        if not self.usable(reference):
            return _grade(Outcome.INVALID_REFERENCE, "the reference has no mathematical reading")
        if self._strict and answer == reference:
            return _grade(Outcome.CORRECT)  # the same text has the same reading, and `usable` saw it equal itself
        try:
            prediction = self._read(answer) if self._strict else _parse(answer, _ANYTHING)
        except MemoryError:
            raise
        except Exception as error:
            return _grade(Outcome.ERROR, describe(error))
        if not prediction:
            return _grade(Outcome.NO_ANSWER)
        equal, failure = _compare(self._read(reference), prediction, self._strict)
        if equal:
            return _grade(Outcome.CORRECT)
        if failure:
            return _grade(Outcome.ERROR, failure)
        readable = any(_is_expression(value) for value in prediction)
        return _grade(Outcome.WRONG, "" if readable else "the answer has no mathematical reading")

    def usable(self, reference: str) -> bool:
        """Whether the reference has a mathematical reading that equals itself (``1/0`` does not)."""
        if self._strict:
            return not is_too_large(reference) and _equals_itself(for_math_verify(reference))
        return _equals_itself(reference)

    def _read(self, latex: str) -> Parsed:
        return _parse_boxed(for_math_verify(latex) if self._strict else latex)


def _grade(outcome: Outcome, detail: str = "") -> Grade:
    return Grade(outcome, float(outcome is Outcome.CORRECT), detail)


@lru_cache(maxsize=8192)
def _equals_itself(latex: str) -> bool:
    try:
        expressions = [value for value in _parse_boxed(latex) if _is_expression(value)]
        return any(_equivalent(expression, expression, strict=False) for expression in expressions)
    except Exception:
        return False  # the answer to the question, and counted by whoever asks
