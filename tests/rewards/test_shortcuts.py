"""Verdicts without a worker are those of the workers."""

import random

import pytest

from hdpo.rewards import Outcome
from hdpo.rewards.math import MathGrader
from hdpo.rewards.process import Verdict
from hdpo.rewards.shortcuts import Memory, plain_integers


@pytest.fixture(scope="module")
def grader():
    return MathGrader("strict")


def pairs():
    rng = random.Random(0)
    edges = [0, 1, -1, 9, 10, -10, 99, 100, 10**11, 10**12 - 1, -(10**12 - 1), 1900, 2026, 360, 1000, 1000000]
    for value in edges:
        for other in (value, -value, value + 1, value - 1, value * 10, value // 10):
            yield str(value), str(other)
    for _ in range(300):
        value = rng.randrange(-(10 ** rng.randint(1, 12)) + 1, 10 ** rng.randint(1, 12))
        yield str(value), str(rng.choice([value, -value, value + 1, value - 1, rng.randrange(1000)]))


def test_plain_integers_are_graded_as_math_verify_does(grader):
    number = 0
    for answer, reference in pairs():
        verdict = plain_integers(answer, reference)
        if verdict is not None:
            number += 1
            assert (verdict.outcome, verdict.detail) == grader.grade(answer, reference), (answer, reference)
    assert number > 300


OTHERS = [
    "",
    " 1",
    "1 ",
    "+1",
    "-0",
    "00",
    "01",
    "-01",
    "1.0",
    "1,000",
    "1 000",
    "1e3",
    "0x1",
    "--1",
    "- 1",
    "5\n",
    "٣",
]


@pytest.mark.parametrize("text", [*OTHERS, "1" * 13])
def test_any_other_writing_is_left_to_math_verify(text):
    assert plain_integers(text, "1") is None
    assert plain_integers("1", text) is None
    assert plain_integers(text, text) is None


def test_the_memory_forgets_the_oldest_and_keeps_no_failures():
    memory = Memory(size=2)
    for outcome in Outcome:
        memory.put("a", outcome.value, Verdict(outcome))
    assert memory.get("a", "timeout") is None
    assert memory.get("a", "error") is None
    memory = Memory(size=2)
    memory.put("a", "1", Verdict(Outcome.WRONG))
    memory.put("b", "1", Verdict(Outcome.CORRECT))
    assert memory.get("a", "1") == Verdict(Outcome.WRONG)
    memory.put("c", "1", Verdict(Outcome.CORRECT))
    assert memory.get("b", "1") is None, "the pair that was not asked for longest"
    assert memory.get("a", "1") == Verdict(Outcome.WRONG)
    assert memory.get("1", "a") is None
