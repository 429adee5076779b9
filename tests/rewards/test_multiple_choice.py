import pytest

from hdpo.rewards import MultipleChoiceVerifier
from tests.rewards.helpers import outcomes

LONG = "Since 3 < 4, A is too small.\n"


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("B", "correct"),
        ("(B)", "correct"),
        ("B. 12", "correct"),
        ("B) 12", "correct"),
        (r"\boxed{B}", "correct"),
        (r"So it is $\boxed{\text{(B)}}$.", "correct"),
        (r"\boxed{B}, that is \boxed{\textbf{(B)}\ 12}", "correct"),
        (LONG + "The answer is (B).", "correct"),
        (LONG + "**Answer:** B", "correct"),
        (LONG + "Final answer: B", "correct"),
        (LONG + "The correct answer is: (B).", "correct"),
        (LONG + "**The answer is:** B", "correct"),
        ("B. salt and pepper", "correct"),
        (LONG + "Answer: (B) either red or blue", "correct"),
        ("(B) I and II only", "correct"),
        ("C", "wrong"),
        (LONG + "The answer is C: 12", "wrong"),
        (r"The answer is B. \boxed{C}", "wrong"),
        (r"\boxed{B} or \boxed{C}", "no_answer"),
        (r"\boxed{B or C}", "no_answer"),
        ("(B) or (C)", "no_answer"),
        ("B. or C.", "no_answer"),
        ("(B) and perhaps C", "no_answer"),
        ("The answer is: B or C", "no_answer"),
        ("E", "no_answer"),
        ("b", "no_answer"),
        ("12", "no_answer"),
        (LONG + "I cannot tell.", "no_answer"),
        ("", "no_answer"),
        ("\n", "no_answer"),
    ],
)
def test_letters(completion, outcome):
    assert outcomes(MultipleChoiceVerifier("ABCD").grade([completion], ["B"])) == [outcome]
    assert outcomes(MultipleChoiceVerifier("ABCD").grade([completion], ["(B) 12"])) == [outcome]


def test_usable():
    references = ["A", "(D)", "E", "B. 12", "12", "", None, "A or B", "C. black or white"]
    expected = [True, True, False, True, False, False, False, False, True]
    assert MultipleChoiceVerifier("ABCD").usable(references) == expected
    assert outcomes(MultipleChoiceVerifier("ABCD").grade(["A", "E"], ["E", "E"])) == ["invalid_reference"] * 2
    assert outcomes(MultipleChoiceVerifier("ABCDE").grade(["A", "E"], ["E", "E"])) == ["wrong", "correct"]


def test_identity():
    assert MultipleChoiceVerifier("ABCD").identity()["settings"] == {"choices": "ABCD"}
