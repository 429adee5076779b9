"""The rules that come before math-verify, against numbers whose value is known and against bare math-verify."""

import logging
import random
import string
import time
from fractions import Fraction

import pytest
from math_verify import LatexExtractionConfig, parse, verify

from hdpo.rewards import Outcome
from hdpo.rewards.rules import choice, for_math_verify, is_readable, is_too_large, judge

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def correct(answer, reference):
    verdict = judge(answer, reference)
    return None if verdict is None else verdict[0] is Outcome.CORRECT


def spellings(value):
    """Ways to write a rational number, each exact."""
    sign, size = "-" if value < 0 else "", abs(value)
    top, bottom = size.numerator, size.denominator
    if bottom == 1:
        yield from (f"{sign}{top}", f"{sign}{top:,}", f"{sign}{top}.0", f"{sign}{top}e0", f"x = {sign}{top}")
        yield f"{sign}{top:,}".replace(",", "{,}")
        yield f"{sign}{top} \\text{{ cm}}"
        yield f"{sign}{Fraction(top, 1000).numerator}e3" if top % 1000 == 0 else f"${sign}{top}$"
    else:
        yield from (
            f"{sign}{top}/{bottom}",
            f"{sign}\\frac{{{top}}}{{{bottom}}}",
            f"\\dfrac{{{sign}{top}}}{{{bottom}}}",
        )
        if top > bottom:
            yield f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"
            yield f"{sign}{top // bottom} {top % bottom}/{bottom}"
    if 10**6 % bottom == 0:
        places = f"{size.numerator * (10**6 // bottom):07d}"
        decimal = f"{places[:-6]}.{places[-6:]}".rstrip("0")
        yield from (sign + decimal, sign + decimal + "0", f"{sign}{decimal}\\times 10^{{0}}")
    hundredfold = 100 * size
    if hundredfold.denominator == 1:
        yield f"{sign}{hundredfold.numerator}\\%"


def test_numbers_are_equal_where_their_values_are():
    rng = random.Random(0)
    values = [
        Fraction(rng.randrange(-2000, 2000) * rng.choice([1, 1, 1000]), rng.choice([1, 1, 2, 3, 7, 8, 125]))
        for _ in range(30)
    ]
    values += [Fraction(n) for n in (0, 1, -1, 1000, 1234567, 10**12)] + [Fraction(1, 3), Fraction(1, 2)]
    pairs = right = 0
    for value in values:
        for reference in spellings(value):
            other = rng.choice([value, value + 1, -value, value / 2, value + Fraction(1, 10**6), rng.choice(values)])
            for answer in (*spellings(value), *spellings(other)):
                if "\\%" in reference + answer:
                    continue  # 50 and 0.5 may both stand for 50 %: see the table
                equal = value == (value if answer in spellings(value) else other)
                assert correct(answer, reference) is equal, (answer, reference)
                pairs, right = pairs + 1, right + equal
    assert pairs > 2500
    assert 0.3 < right / pairs < 0.9


def test_plain_integers_are_judged_as_math_verify_does():
    config, rng = (LatexExtractionConfig(),), random.Random(1)
    for _ in range(60):
        value = rng.randrange(-(10 ** rng.randint(1, 12)) + 1, 10 ** rng.randint(1, 12))
        answer, reference = str(value), str(rng.choice([value, -value, value + 1, value * 10]))
        parsed = [parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (reference, answer)]
        assert correct(answer, reference) is verify(*parsed, timeout_seconds=None)


@pytest.mark.parametrize(
    "reference", [r"\frac{1}{0}", "5x", "3 + 4", "x^2 = 4", "a = 2, b = 3", "3, 5", "1/2/3", "5m", ""]
)
def test_what_is_no_number_is_left_to_math_verify(reference):
    assert not is_readable(reference)
    assert judge("5", reference) is None


@pytest.mark.parametrize("answer", [r"\boxed{1}+{2}", r"\boxed{4x} or \boxed{5x}", r"5 \boxed{5}", r"\boxed{5"])
def test_a_box_inside_the_box_is_all_of_it_or_no_answer(answer):
    assert judge(answer, "5x") == judge(answer, "5") == (Outcome.NO_ANSWER, "a box inside the box")
    assert correct(r"\boxed{ 5 }.", "5") is True


def test_a_reference_that_is_too_large_is_not_readable():
    assert is_readable("1" * 1000)
    assert not is_readable("1" * 1001)
    assert judge("1", "1" * 1001) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) 12", "B"),
        ("B: because 3 > 2", "B"),
        (r"\textbf{(B)}\ 12", "B"),
        (r"\text{B}", "B"),
        ("b", None),
        ("BC", None),
        ("B 12", None),
        ("(B) and (C)", None),
        ("B. C", None),
        ("", None),
    ],
)
def test_choice(text, letter):
    assert choice(text) == letter


@pytest.mark.parametrize(
    ("text", "large"),
    [
        ("x" * 1000, False),
        ("x" * 1001, True),
        ("(" * 8 + "x" + ")" * 8, False),
        ("(" * 9 + "x" + ")" * 9, True),
        ("{" * 9 + "x", True),
        ("()" * 50, False),
        ("10^{9999}", False),
        ("10^{10000}", True),
        ("10^{10^{2}}", True),
        ("2^{2^n}", False),
        ("e^{-x^2}", False),
        ("9999!", False),
        ("10000!", True),
        ("(5!)!", True),
        (r"\binom{10000}{5}", True),
    ],
)
def test_is_too_large(text, large):
    assert is_too_large(text) is large


def test_decimals_become_fractions_and_nothing_else_changes():
    assert for_math_verify(r"(0.5, 12.250x)") == r"(\frac{5}{10}, \frac{12250}{1000}x)"
    assert for_math_verify(r"\frac{1}{2} + x_1") == r"\frac{1}{2} + x_1"
    assert for_math_verify(r"\text{No real solutions}") == r"\emptyset"


def test_no_text_takes_long_or_fails():
    rng = random.Random(0)
    pieces = [
        *string.printable,
        "12",
        "1,000",
        r"\frac",
        r"\text{",
        "cm",
        "^",
        r"\circ",
        r"\%",
        r"\$",
        r"\times",
        "or",
        "(B)",
    ]
    pieces += [r"\overline{", "million", "²", "٣", "\ud800", "\x00", r"\boxed{", r"\left", " " * 50, "\\\\"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(1500)]
    texts += [((start + piece * 1000)[:999]) for piece in pieces for start in ("", "5", "5 ")]
    start = time.perf_counter()
    for text, other in zip(texts, reversed(texts), strict=True):
        judge(text, other)
        judge(text, "5")
        for_math_verify(text)
        is_readable(text)
    assert time.perf_counter() - start < 20
