r"""Arithmetic stories in six tiers of difficulty, with OpenMathInstruct-2's columns.

A story of tier k applies k operations (plus, minus, double, triple) to a number and never leaves 1 to 99::

    Ben has 6 shells, triples them, loses 4. How many shells now?
    6*3=18. 18-4=14. So \boxed{14}

:func:`foreign_rows` has the same stories with references in another style than the policy's own: they name each result
first, or write each step in other signs::

    18=6*3. 14=18-4. So \boxed{14}
    6*3 makes 18; 18-4 makes 14; So \boxed{14}

Everything derives from the seed: row i of a split is the same on every machine and for every number of rows asked for.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from hdpo.errors import ConfigError

NUM_TIERS = 6
MAX_VALUE = 99
# Wide steps on purpose: with terms below ten, a story that is cut short still ends near the right answer, and a wrong
# solution of a hard tier is too often right by luck.
MAX_TERM = 20
MAX_START = 50

NAMES = ("Ana", "Ben", "Dan", "Eva", "Ida", "Kim", "Leo", "Mia", "Ned", "Pia", "Sam", "Tom")
THINGS = ("books", "cards", "coins", "eggs", "figs", "hats", "nuts", "pens", "pins", "rings", "shells", "toys")
VERBS = {"+": ("buys", "finds", "gets"), "-": ("gives", "loses", "sells")}
FACTORS = {2: "doubles them", 3: "triples them"}

Split = Literal["warmup", "train", "validation"]
Style = Literal["result_first", "other_signs"]
Story = Callable[[random.Random, int, Split], dict[str, str]]
"""Draws one row of a tier; it is drawn again until its problem is new and in the split."""

# Shares of the hash's range, in hundredths: the first bound is the warm-up's, the second also holds training's.
_WARMUP_BELOW, _TRAIN_BELOW = 45, 90

_EQUATION = re.compile(r"(\S+)=(\d+)\.")
_STYLES: Mapping[Style, str] = {"result_first": r"\2=\1.", "other_signs": r"\1 makes \2;"}

# A draw is new and in the right split with a probability of a few per cent at the very least while problems are left.
_MAX_DRAWS = 20_000


def split_of(problem: str) -> Split:
    """Return the split that a problem belongs to, a pure function of its text.

    Args:
        problem: the problem's text, compared without its case and with runs of white space as one blank.

    Returns:
        ``"warmup"`` for 45 % of all problems, ``"train"`` for 45 %, ``"validation"`` for 10 %.

    Example:
        >>> split_of("Ben has 6 shells, loses 4. How many shells now?")
        'warmup'
    """
    text = " ".join(problem.lower().split())
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % 100
    if bucket < _WARMUP_BELOW:
        return "warmup"
    return "train" if bucket < _TRAIN_BELOW else "validation"


def _operation(rng: random.Random, value: int, *, factors: bool) -> tuple[str, int]:
    """Draw an operator and its operand such that the result stays within 1 to ``MAX_VALUE``."""
    while True:
        operator = rng.choice("+-*" if factors else "+-")
        operand = rng.choice(tuple(FACTORS)) if operator == "*" else rng.randint(2, MAX_TERM)
        if 1 <= apply_operation(value, operator, operand) <= MAX_VALUE:
            return operator, operand


def apply_operation(value: int, operator: str, operand: int) -> int:
    """Return what ``+``, ``-`` or ``*`` makes of a value."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def _story(rng: random.Random, tier: int, split: Split) -> dict[str, str]:
    """Draw one row of a tier; the same in every split."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(2, MAX_START)
    clauses, steps = [f"{name} has {value} {thing}"], []
    for _ in range(tier):
        operator, operand = _operation(rng, value, factors=tier > 1)
        result = apply_operation(value, operator, operand)
        clauses.append(FACTORS[operand] if operator == "*" else f"{rng.choice(VERBS[operator])} {operand}")
        steps.append(f"{value}{operator}{operand}={result}.")
        value = result
    return {
        "problem": f"{', '.join(clauses)}. How many {thing} now?",
        "generated_solution": f"{' '.join(steps)} So \\boxed{{{value}}}",
        "expected_answer": str(value),
        "problem_source": f"tier{tier}",
    }


def _tier_rows(story: Story, tier: int, split: Split, seed: int) -> Iterator[dict[str, str]]:
    """Yield the distinct problems of one tier and split; the sequence does not depend on what other tiers yield."""
    rng = random.Random(f"{seed}/{split}/{tier}")
    seen: set[int] = set()
    while True:
        for _ in range(_MAX_DRAWS):
            row = story(rng, tier, split)
            key = _key(row["problem"])
            if key not in seen and split_of(row["problem"]) == split:
                break
        else:
            raise ConfigError(
                f"tier {tier} has no more than {len(seen)} distinct problems in the split {split!r}: "
                "ask for fewer rows, or for harder tiers"
            )
        seen.add(key)
        yield row


def _key(problem: str) -> int:
    """Return 64 bits that stand for a problem, to remember many of them in little memory."""
    return int.from_bytes(hashlib.blake2b(problem.encode(), digest_size=8, person=b"seen").digest())


def _tier_weights(tiers: Sequence[int] | Mapping[int, float]) -> dict[int, float]:
    """Check ``tiers`` and return tier -> weight, without the tiers whose weight is zero."""
    if len(set(tiers)) < len(tiers):
        raise ConfigError(f"tiers: {list(tiers)} names a tier twice; give weights instead, as in {{1: 1, 6: 2}}")
    given = {int(t): float(w) for t, w in tiers.items()} if isinstance(tiers, Mapping) else dict.fromkeys(tiers, 1.0)
    unknown = [t for t in given if t not in range(1, NUM_TIERS + 1)]
    if unknown:
        raise ConfigError(f"tiers: there are tiers 1 to {NUM_TIERS}, not {unknown}")
    if any(not 0 <= w < float("inf") for w in given.values()) or not any(given.values()):
        raise ConfigError(f"tiers: weights must be finite, not negative and not all zero, got {given}")
    return {t: w for t, w in given.items() if w}


def _interleave(weights: Mapping[int, float]) -> Iterator[int]:
    """Yield tiers in proportion to their weights, as evenly as possible and without chance; equal weights take turns.

    Smooth weighted round-robin: each turn every tier earns its weight, and the richest pays the total to be chosen.
    """
    credit = dict.fromkeys(weights, 0.0)
    total = sum(weights.values())
    while True:
        for tier, weight in weights.items():
            credit[tier] += weight
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= total
        yield chosen


def rows(
    num_problems: int | None = None,
    *,
    split: Split = "train",
    seed: int = 0,
    tiers: Sequence[int] | Mapping[int, float] = (1, 2, 3, 4, 5, 6),
) -> Iterator[dict[str, str]]:
    r"""Yield distinct problems with OpenMathInstruct-2's columns, in an order that only the arguments decide.

    Args:
        num_problems: how many rows; None for as many as are asked for.
        split: ``"warmup"`` (the embedded policy was trained on these), ``"train"`` or ``"validation"``. No problem is
            in two splits, whatever the seeds.
        seed: another seed draws other problems.
        tiers: tiers that take turns, or tier -> weight. A prefix of any length holds each tier in proportion.

    Yields:
        ``problem``, ``generated_solution`` (ends in ``\boxed{answer}``), ``expected_answer`` (an integer) and
        ``problem_source`` (``"tier1"`` to ``"tier6"``).

    Raises:
        ConfigError: an unknown split or tier, a bad weight or number, or a tier that has no distinct problem left (the
            training split of tier 1 holds about 300,000).

    Example:
        >>> row = next(rows(split="validation", tiers=[2]))
        >>> sorted(row)
        ['expected_answer', 'generated_solution', 'problem', 'problem_source']
        >>> row["problem_source"]
        'tier2'
    """
    return draw_rows(_story, num_problems, split, seed, tiers)


def draw_rows(
    story: Story,
    num_problems: int | None,
    split: Split,
    seed: int,
    tiers: Sequence[int] | Mapping[int, float],
) -> Iterator[dict[str, str]]:
    """Yield distinct problems that ``story`` draws; the other arguments and errors are those of :func:`rows`."""
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    if num_problems is not None and num_problems < 0:
        raise ConfigError(f"num_problems must not be negative, got {num_problems}")
    weights = _tier_weights(tiers)
    return _mixed_rows(num_problems, weights, {tier: _tier_rows(story, tier, split, seed) for tier in weights})


def _mixed_rows(
    num_problems: int | None, weights: Mapping[int, float], streams: Mapping[int, Iterator[dict[str, str]]]
) -> Iterator[dict[str, str]]:
    for count, tier in enumerate(_interleave(weights)):
        if count == num_problems:
            return
        yield next(streams[tier])


def foreign_rows(
    num_problems: int | None = None, *, style: Style = "result_first", **options: Any
) -> Iterator[dict[str, str]]:
    r"""Yield the rows of :func:`rows` with their references in another style than the policy's own.

    Args:
        num_problems: as for :func:`rows`.
        style: ``"result_first"`` (who writes so has to compute a step before writing it), or ``"other_signs"`` (which
            can be learnt: each result still follows from what stands before it).
        options: ``split``, ``seed`` and ``tiers`` of :func:`rows`.

    Yields:
        the columns of :func:`rows`; ``generated_solution`` is in the style, and ``own_solution`` is the solution as the
        policy writes it.

    Raises:
        ConfigError: an unknown style, or an error of :func:`rows`.

    Example:
        >>> row = next(foreign_rows(tiers=[2]))
        >>> row["generated_solution"], row["own_solution"]
        ('32=26+6. 35=32+3. So \\boxed{35}', '26+6=32. 32+3=35. So \\boxed{35}')
        >>> next(foreign_rows(tiers=[2], style="other_signs"))["generated_solution"]
        '26+6 makes 32; 32+3 makes 35; So \\boxed{35}'
    """
    if style not in _STYLES:
        raise ConfigError(f"style must be one of {', '.join(_STYLES)}; got {style!r}")
    return map(partial(_foreign, _STYLES[style]), rows(num_problems, **options))


def _foreign(equation: str, row: dict[str, str]) -> dict[str, str]:
    own = row["generated_solution"]
    return row | {"generated_solution": _EQUATION.sub(equation, own), "own_solution": own}
