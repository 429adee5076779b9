r"""The laboratory of transfer: what helps is one formula, so that the steps have still to be worked out.

Stories of two or three operations in six tiers: two (1) or three (2) in order; a pair told in reverse (3); a pair whose
order the text leaves open (4), done in the order of telling in 70 % of cases; one (5) or two (6) amounts that are words
with a fixed size which only the hint tells::

    Ben has 6 shells, finds a sack, triples them. How many shells now?
    (6+8)*3                                  the column ``context``
    6+8=14. 3*14=42. The answer is \boxed{42}

In the split ``"warmup"`` these words are others, each with another size in every story: the policy learns to read the
hint, and not what a sack holds. Solutions are not unique: operands of sums and products and the last words vary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from hdpo.lab.problems import (
    FACTORS,
    MAX_START,
    MAX_TERM,
    MAX_VALUE,
    NAMES,
    THINGS,
    VERBS,
    Split,
    apply_operation,
    draw_rows,
)

SIZES = {"barrel": 20, "basket": 15, "crate": 12, "sack": 8}
DECOYS = ("bag", "box", "dozen", "jar", "pack", "stack")
DECOY_SIZES = range(5, 25)
SHARE_IN_ORDER = 0.7
FINALS = ("So", "The answer is")

Operation = tuple[str, int]


def _operations(rng: random.Random, tier: int, sizes: Sequence[int]) -> list[Operation]:
    """Draw a story's operations, in the order in which they are told; the first are those of the words."""
    operators = [rng.choice("+-") for _ in sizes]
    operators += ["*", rng.choice("+-")] if tier in (3, 4) else []
    operators += [rng.choice("+-*") for _ in range((2 if tier == 1 else 3) - len(operators))]
    terms = iter(sizes)
    return [
        (o, rng.choice(tuple(FACTORS)) if o == "*" else next(terms, None) or rng.randint(2, MAX_TERM))
        for o in operators
    ]


def _clause(rng: random.Random, operation: Operation, word: str | None) -> str:
    operator, operand = operation
    if operator == "*":
        return FACTORS[operand]
    return f"{rng.choice(VERBS[operator])} {f'a {word}' if word else operand}"


def _told(
    rng: random.Random, tier: int, operations: list[Operation], words: Sequence[str]
) -> tuple[list[str], list[Operation]]:
    """Return the story's clauses, and its operations in the order in which they are done."""
    named = [*words, *[None] * (len(operations) - len(words))]
    parts = list(zip(operations, named, strict=True))
    if tier not in (3, 4):
        rng.shuffle(parts)
        return [_clause(rng, *part) for part in parts], [operation for operation, _ in parts]
    pair, rest = operations[:2], operations[2:]
    rng.shuffle(pair)
    first, second = (_clause(rng, operation, None) for operation in pair)
    in_order = tier == 4 and rng.random() < SHARE_IN_ORDER
    done = pair if in_order else pair[::-1]
    clause = f"{first} and {second}" if tier == 4 else f"{first}, but first {second}"
    return [_clause(rng, rest[0], None), clause], [*rest, *done]


def _story(rng: random.Random, tier: int, split: Split) -> dict[str, str]:
    """Draw one row of a tier."""
    words = rng.sample(DECOYS if split == "warmup" else tuple(SIZES), max(0, tier - 4))
    while True:
        name, thing, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, MAX_START)
        sizes = [rng.choice(DECOY_SIZES) if split == "warmup" else SIZES[word] for word in words]
        clauses, operations = _told(rng, tier, _operations(rng, tier, sizes), words)
        values = list(accumulate(operations, lambda value, told: apply_operation(value, *told), initial=start))
        if all(1 <= value <= MAX_VALUE for value in values):
            break
    formula, steps = str(start), []
    for (operator, operand), (value, result) in zip(operations, pairwise(values), strict=True):
        formula = f"({formula}{operator}{operand})"
        pair = [value, operand]
        if operator != "-":
            rng.shuffle(pair)
        steps.append(f"{pair[0]}{operator}{pair[1]}={result}.")
    return {
        "problem": f"{', '.join([f'{name} has {start} {thing}', *clauses])}. How many {thing} now?",
        "generated_solution": f"{' '.join(steps)} {rng.choice(FINALS)} \\boxed{{{values[-1]}}}",
        "expected_answer": str(values[-1]),
        "problem_source": f"tier{tier}",
        "context": formula[1:-1],
    }


def rows(
    num_problems: int | None = None,
    *,
    split: Split = "train",
    seed: int = 0,
    tiers: Sequence[int] | Mapping[int, float] = (1, 2, 3, 4, 5, 6),
) -> Iterator[dict[str, str]]:
    """Yield distinct problems; arguments, columns and errors are those of :func:`hdpo.lab.problems.rows`.

    The column ``context`` holds the hint.

    Example:
        >>> row = next(rows(tiers=[5]))
        >>> row["problem"]
        'Kim has 9 hats, doubles them, finds a sack, doubles them. How many hats now?'
        >>> row["context"]
        '((9*2)+8)*2'
    """
    return draw_rows(_story, num_problems, split, seed, tiers)
