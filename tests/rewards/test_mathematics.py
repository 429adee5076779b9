"""What the workers run, in this process, against bare math-verify."""

import logging
import random

import pytest
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.metric import math_metric

import hdpo.rewards.mathematics as mathematics
from hdpo.rewards import Grade, Outcome
from hdpo.rewards.mathematics import MathGrader
from tests.rewards.verdicts import VERDICTS

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# Every eighth row of the table, and rows put together at random.
ROWS = [row[:2] for name, rows in VERDICTS.items() if name not in ("boxes", "too large") for row in rows]
SHUFFLED = random.Random(0).sample([answer for _, answer in ROWS], 20)
PARITY = [*ROWS[::8], *((reference, answer) for (reference, _), answer in zip(ROWS[::20], SHUFFLED, strict=False))]


@pytest.fixture(scope="module")
def strict():
    return MathGrader("strict")


@pytest.fixture(scope="module")
def nemo():
    return MathGrader("nemo")


@pytest.mark.parametrize(("reference", "answer"), PARITY)
def test_nemo_profile_is_nemo_rls_metric(nemo, reference, answer):
    # NeMo-RL's worker: this metric over ["\\boxed{" + ground_truth + "}"] and the response.
    metric = math_metric((LatexExtractionConfig(),), (ExprExtractionConfig(), LatexExtractionConfig()))
    for completion in (f"Thus the answer is $\\boxed{{{answer}}}$.", f"The answer is {answer}", f"${answer}$ it is"):
        reward, _ = metric([f"\\boxed{{{reference}}}"], [completion])
        expected = ["correct"] if reward else ["wrong", "no_answer", "invalid_reference"]
        assert nemo.grade(completion, reference).outcome in expected


def test_nemo_profile_has_none_of_the_rules_of_strict(nemo):
    for reference, answer in [
        (r"\frac{1}{3}", "0.333333"),
        ("0.333333", r"\frac{1}{3}"),
        ("391", r"17 \cdot 23"),
        (r"5 \text{ m}", r"5 \text{ cm}"),
    ]:
        assert nemo.grade(f"\\boxed{{{answer}}}", reference).outcome is Outcome.CORRECT
    assert nemo.grade(r"\boxed{4}. That cannot be. It is \boxed{5}", "5").outcome is Outcome.CORRECT
    assert nemo.grade(r"\boxed{x > 2}", r"(2, \infty)").outcome is Outcome.WRONG


def test_nemo_profile_finds_answers_outside_boxes(nemo):
    assert nemo.grade("I think the answer is 14", "14").outcome is Outcome.CORRECT
    assert nemo.grade("so $x = \\frac{1}{2}$", "0.5").outcome is Outcome.CORRECT
    assert nemo.grade("I cannot tell.", "14").outcome is Outcome.NO_ANSWER
    # NeMo-RL does not see LaTeX without dollar signs or a box, be it the very reference.
    assert nemo.grade(r"\sqrt{8}", r"\sqrt{8}").outcome is Outcome.NO_ANSWER


def test_the_order_of_gold_and_prediction_matters(nemo):
    relation, interval = r"x \le 3", r"(-\infty, 3]"
    assert nemo.grade(f"\\boxed{{{interval}}}", relation).outcome is Outcome.CORRECT
    assert nemo.grade(f"\\boxed{{{relation}}}", interval).outcome is Outcome.WRONG


def test_texts_are_parsed_not_compared(strict):
    assert strict.grade("1/2", "0.5").outcome is Outcome.CORRECT
    assert verify("0.5", "1/2", timeout_seconds=None) is False  # what raw strings would give


@pytest.mark.parametrize("reference", ["", " ", r"\frac{1}{0}", "}", "a_{x}^{", r"\begin{cases} 1 & x>0 \end{cases}"])
@pytest.mark.parametrize("profile", ["strict", "nemo"])
def test_a_reference_without_a_reading_makes_no_answer_wrong(profile, reference):
    grader = MathGrader(profile)
    assert not grader.usable(reference)
    for answer in ("5", r"\boxed{5}", reference):
        assert grader.grade(answer, reference).outcome is Outcome.INVALID_REFERENCE


def test_a_reference_that_is_too_large_is_not_read(strict):
    assert not strict.usable("9^{9^{9}} x")
    assert strict.grade("5x", "9^{9^{9}} x").outcome is Outcome.INVALID_REFERENCE


def test_an_empty_answer_is_no_answer(strict):
    assert strict.grade("", "5").outcome is Outcome.NO_ANSWER


def test_an_answer_without_a_reading_says_so(strict):
    assert strict.grade("a_{x}^{", "5") == Grade(Outcome.WRONG, 0.0, "the answer has no mathematical reading")


def test_a_failure_to_read_is_an_error_not_a_missing_answer(nemo):
    # int() refuses more than 4300 digits; math-verify alone would return "nothing found".
    completion = "the answer is " + "1" * 5000
    assert parse(completion, (ExprExtractionConfig(),), parsing_timeout=None) == []
    grade = nemo.grade(completion, "5")
    assert grade.outcome is Outcome.ERROR
    assert grade.detail.startswith("SympifyError")
    assert len(grade.detail) < 300


def test_a_failure_to_compare_is_an_error_not_wrong(strict, monkeypatch):
    def broken(gold, prediction, **_):
        raise ZeroDivisionError("boom")

    assert strict.grade("6", "5").outcome is Outcome.WRONG
    monkeypatch.setattr(mathematics, "verify", broken)
    assert strict.grade("6", "5") == Grade(Outcome.ERROR, 0.0, "ZeroDivisionError: boom")
    assert strict.grade("5.0", "5").outcome is Outcome.ERROR  # a right answer is not lost in silence either


def test_references_are_parsed_once(strict, monkeypatch):
    parsed = []

    def counting(text, *args, **kwargs):
        parsed.append(text)
        return parse(text, *args, **kwargs)

    monkeypatch.setattr(mathematics, "parse", counting)
    for answer in ("271", "272", "273", "31415"):
        strict.grade(answer, "31415")
    assert parsed == [f"\\boxed{{{text}}}" for text in ("31415", "271", "272", "273")]
