r"""The ``strict`` profile's own rules: where the texts decide, and where math-verify reads too much or too little.

A reward that can be had without the answer is worse than one that is missed: what is not plainly an answer is refused.
``tests/rewards/verdicts.py`` holds the judged examples, class by class.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from hdpo.rewards.base import Outcome
from hdpo.rewards.boxed import boxes

_MAX_CHARS = 1000
_MAX_DEPTH = 8
# What keeps sympy busy for seconds or forever: long exponents, towers of powers, nested factorials, large binomials.
_HUGE = re.compile(
    r"\^\s*\{?\s*\d{5}|\d\s*\^\s*\{?\s*\d+\s*\}?\s*\^\s*\{?\s*\d|\d{5}\s*!|!\s*\)*\s*!|binom\s*\{\s*\d{5}"
)

_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ",  # noqa: RUF001
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "∅": r"\emptyset ", "∪": r"\cup ", "½": r"\frac{1}{2}",  # noqa: RUF001
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "\u00a0": " ",
})  # fmt: skip
_FONT = re.compile(r"\\(?:(?:text|math)(?:bf|rm|it|sf|tt|normal|up)?|mbox|boldsymbol|operatorname)(?![a-zA-Z])\s*")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;: ]|~")
_BOX = re.compile(r"\s*\\+boxed\s*\{(.*)\}[\s.,;$]*", re.DOTALL)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
# The left side of "AB = 5" or "f(2) = 5"; also working without letters, as in "2 + 3 = 5".
_NAME = re.compile(r"[A-Za-z\\|{][A-Za-z\\|{}_' ]*\d*[}|]*(?:\([^()]*\))?\s*")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]|,")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_ARGUMENT = rf"\s*(?:\{{\s*([+-]?{_INTEGER})\s*\}}|(\d))"
_FRACTION = re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_RATIO = re.compile(rf"(?:({_INTEGER})\s+)?([+-]?{_INTEGER})\s*/\s*([+-]?{_INTEGER})")
_DECIMAL = re.compile(rf"({_INTEGER}|(?=\.\d))(?:\.(\d*)(?:\\overline\s*(\d+))?)?")
_SCALE = re.compile(
    r"\s*(?:\\times|\\cdot|\*)\s*10\^([+-]?\d{1,3})(?!\d)|[eE]([+-]?\d{1,3})(?!\d)|[@ ]*(thousand|million|billion)\b"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9}

# The first name of each unit is the one that is compared; words that are not here never contradict each other.
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram", "lb pound",
        "oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "yr year", "ml milliliter",
        "l liter litre", "mph", "km/h kmh", "m/s", "dollar", "cent", "degree deg", "radian rad", "am a.m", "pm p.m",
    )
    for name in names.split()
}  # fmt: skip
_UNIT = re.compile(r"(?:(square|sq\.?|cubic)\s+)?([a-z][a-z./' -]*?)\.?(?:\^(\d))?")
_NOT_A_UNIT = re.compile(r"\b(?:or|and|not|maybe)\b")

_WORDS = dict.fromkeys(("nosolution", "norealsolution", "emptyset"), r"\emptyset") | {"allrealnumber": r"\mathbb{R}"}
_CHOICE = re.compile(r"([A-Z])|\(([A-Z])\)\s*(.*)|([A-Z])[).:]\s*(.*)", re.DOTALL)
# Of "B. salt and pepper" the text of the choice is a part; of "B. or C" another letter.
_SECOND_CHOICE = re.compile(r"\([A-Z]\)|\b(?:or|and)\b.*\b[A-Z]\b|^[A-Z]\W*$")

# Operations that an answer must have carried out: always, and where the reference consists of numbers alone.
_UNDONE = re.compile(r"\\(?:sum|prod|i*int|lim|gcd|lcm)(?![a-z])|frac\s*\{\s*d\s*\}\s*\{\s*d")
_OPERATION = re.compile(
    r"[!*]|\^(?!\s*\{?\s*\\circ)|[\d)}]\s*[+-]|"
    r"\\(?:times|cdot|div|sqrt|d?binom|log|ln|lg|exp|sin|cos|tan|min|max|lfloor|lceil)(?![a-z])"
)
_NUMERIC = re.compile(
    r"(?:[\d\s.,;()\[\]|/&+{}-]|\\[\\{}]|\\[dtc]?frac|\\infty|\\cup|\\(?:begin|end)\{[a-zA-Z]*matrix\})*"
)


# Words between expressions, units apart: math-verify drops all that follows them.
_HEDGE = re.compile(r"[\w})]\s*\\text\s*\{(?!\s*,?\s*(?:and|or)\W*\})[^{}]*[a-z][^{}]*\}(?:\s*\^\s*\{?\d\}?)?.*[\d\\]")


class _Number(NamedTuple):
    value: Fraction
    is_ratio: bool
    is_percent: bool
    unit: str
    name: str


def _spell(text: str) -> str:
    """Return a text with the one spelling of signs that math-verify knows, and without a sentence's punctuation."""
    for other, usual in ((r"\varnothing", r"\emptyset"), (r"\langle", "("), (r"\rangle", ")")):
        text = text.replace(other, usual)
    return re.sub(r"(?<!\\)[.,;]\s*$", "", text.translate(_SYMBOLS))


def _clean(text: str) -> str:
    r"""Return an answer with one spelling of fonts (all ``\text``), signs and spaces."""
    while (box := _BOX.fullmatch(text)) and boxes(text) == [box[1].strip()]:
        text = box[1]
    text = _spell(text).replace(r"\$", r"\dollar ").replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,; ]|[~ ])(?=\d{3}(?!\d))", ",", _FONT.sub(r"\\text", text))
    return " ".join(_LAYOUT.sub(" ", text).split()).strip("$ ")


def _number(text: str) -> _Number | None:
    r"""Read cleaned text that is one number: an integer, decimal, fraction or mixed number, in %, with a unit or not.

    Example:
        >>> _number(r"x = 3\frac{1}{2} \text{ cm}")
        _Number(value=Fraction(7, 2), is_ratio=True, is_percent=False, unit='cm', name='x')
        >>> _number("3 + 4") is None
        True
    """
    *names, text = re.split(r"(?<![<>!\\])=", text)
    if any(_LETTERS.search(name) and not _NAME.fullmatch(name) for name in names):
        return None
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"[{}]|\\text", " ", _TEXT.sub(r" @\1 ", re.sub(r"^(?:\\\{|\()(.*)(?:\\\}|\))$", r"\1", text)))
    text = re.sub(r"\s*\^\s*", "^", " ".join(text.split())).lstrip("@ ")
    prefix = re.match(r"([+-]?)\s*(\\dollar|[€£])?\s*([+-]?)\s*(10(?=\^))?", text)
    assert prefix is not None  # all of it is optional
    body = ("1*10" if prefix[4] else "") + text[prefix.end() :]
    if ratio := _RATIO.match(body):
        whole, top, bottom = (int((group or "0").replace(",", "")) for group in ratio.groups())
        if bottom == 0 or (whole and not 0 < top < bottom):
            return None
        value, end = whole + Fraction(top, bottom), ratio.end()
    elif decimal := _DECIMAL.match(body):
        places = decimal[2] or ""
        value = Fraction(f"{(decimal[1] or '0').replace(',', '')}.{places or 0}")
        if decimal[3]:
            value += Fraction(int(decimal[3]), (10 ** len(decimal[3]) - 1) * 10 ** len(places))
        end = decimal.end()
        if scale := _SCALE.match(body, end):
            value *= Fraction(10) ** (_SCALES[scale[3]] if scale[3] else int(scale[1] or scale[2]))
            end = scale.end()
    else:
        return None
    rest = body[end:]
    is_percent = re.fullmatch(r" ?\\?%| ?@? ?(?:percent|percentage)", rest) is not None
    unit = "" if is_percent else _unit(f"{rest} dollar" if prefix[2] == r"\dollar" else rest)
    if unit is None or (prefix[1] and prefix[3]):
        return None
    value = -value if "-" in (prefix[1], prefix[3]) else value
    if any((side := _number(name)) is not None and side.value != value for name in names):
        return None
    return _Number(value, ratio is not None, is_percent, unit, "".join(names[:1]).strip())


def _unit(text: str) -> str | None:
    """Return the name that a unit is compared by, empty where it cannot contradict another; None for no unit at all."""
    if not text.strip():
        return ""
    if base := re.fullmatch(r" ?_ ?\(?(\d+)\)?", text):
        return f"base {base[1]}"
    words = re.sub(r"\^ ?\\circ(?: ?@? ?[CFK]\b)?", " degree", text).replace("@", " ").replace(r"\dollar", "dollar")
    words = " ".join(words.lower().split())
    match = _UNIT.fullmatch(words)
    if match is None or _NOT_A_UNIT.search(words):
        return None
    name = _UNITS.get(match[2]) or _UNITS.get(match[2].removesuffix("s"))
    if "@" not in text:  # without a font, letters may be variables: 5m, 3abcd, 2 xy
        apart = text[0] == " "
        if not (apart and len(match[2]) > 3 if name is None else apart or len(match[2]) > 1):
            return None
    if name is None:
        return ""
    power = match[3] or {"c": "3", "s": "2"}.get((match[1] or " ")[0], "1")
    return name if power == "1" else f"{name}^{power}"


def _last_unit(text: str) -> str | None:
    match = re.search(r"\\text\s*\{([^{}]*)\}\s*((?:\^\s*\{?\d\}?)?)$", text)
    return _unit("@ " + match[1] + re.sub(r"[{} ]", "", match[2])) if match else None


def _same_number(answer: _Number, reference: _Number) -> bool:
    if reference.unit and answer.unit and answer.unit != reference.unit:
        return False
    if len(answer.name) == len(reference.name) == 1 and answer.name != reference.name:
        return False
    if answer.is_ratio and answer.value.denominator == 1 and not reference.is_ratio:
        return False  # a division that was not carried out
    if answer.is_percent == reference.is_percent:
        return answer.value == reference.value
    percent, plain = (answer, reference) if answer.is_percent else (reference, answer)
    # The sign may be left out. It may be added where the reference can only be a percentage: 1 is not 1 %.
    sign_optional = reference.is_percent or abs(reference.value) > 1
    return plain.value == percent.value / 100 or (sign_optional and plain.value == percent.value)


def choice(text: str) -> str | None:
    r"""Return the letter of a multiple-choice answer: ``B``, ``(B)``, ``B. 12``, ``\textbf{(B)}\ 12``.

    Example:
        >>> choice(r"\text{(B)}"), choice("B. 12"), choice("B or C"), choice("x")
        ('B', 'B', None, None)
    """
    match = _CHOICE.fullmatch(_words(_clean(text)))
    if match is None or _SECOND_CHOICE.search(match[3] or match[5] or ""):
        return None
    return match[1] or match[2] or match[4]


def _words(text: str) -> str:
    r"""Return cleaned text without ``\text`` and its braces."""
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def _word(text: str) -> str | None:
    """Return letters only, in lower case, where cleaned text is words; None where it may be mathematics."""
    words = re.sub(r"[ '-]", "", _words(text)).lower()
    return words if len(words) > 3 and words.isalpha() and words.isascii() else None


def _meaning(word: str) -> str:
    return _WORDS.get(word.removesuffix("s"), word)


def _brackets(text: str) -> str | None:
    r"""Return how cleaned text groups several elements: ``(`` for a point or interval, ``{`` for a set or bare list."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    depth, commas, first_end = 0, set(), -1
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == ",":
            commas.add(depth)
        elif character in ")]}" and depth == 0 and first_end < 0:
            first_end = position
    enclosed = text[:1] in ("(", "[", "{") and first_end == len(text) - 1
    if "=" in text or int(enclosed) not in commas:
        return None
    return "(" if enclosed and text[0] != "{" else "{"


def is_too_large(text: str) -> bool:
    """Whether a text is too long, too deeply nested or stands for too large a number to be worth a reading."""
    if len(text) > _MAX_CHARS:
        return True
    depths = accumulate((character in "([{") - (character in ")]}") for character in text)
    return max(depths, default=0) > _MAX_DEPTH or _HUGE.search(text) is not None


def is_readable(reference: str) -> bool:
    """Whether :func:`judge` can judge answers to this reference without math-verify."""
    if is_too_large(reference):
        return False
    reference = _clean(reference)
    return _number(reference) is not None or choice(reference) is not None or _word(reference) is not None


def judge(answer: str, reference: str) -> tuple[Outcome, str] | None:
    """Return the verdict where the two texts decide it, with a detail; None where it takes mathematics.

    Args:
        answer: content of the completion's box.
        reference: the expected answer.
    """
    if is_too_large(answer):
        return Outcome.NO_ANSWER, "too long, too deeply nested or too large to be an answer"
    if is_too_large(reference):
        return None
    answer, reference = _clean(answer), _clean(reference)
    if "\\boxed" in answer:
        return Outcome.NO_ANSWER, "a box inside the box"
    if (number := _number(reference)) is not None:
        given = _number(answer)
        return _verdict(given is not None and _same_number(given, number), "" if given else "not a number")
    if (letter := choice(reference)) and (chosen := choice(answer)):
        return _verdict(chosen == letter)
    if (word := _word(reference)) and (given_word := _word(answer)):
        return _verdict(_meaning(given_word) == _meaning(word))
    numeric = _NUMERIC.fullmatch(reference) and not _OPERATION.search(reference)
    if any(p.search(answer) and not p.search(reference) for p in (_UNDONE, _OPERATION)[: 2 if numeric else 1]):
        return _verdict(False, "not carried out")
    if _HEDGE.search(answer) and not _HEDGE.search(reference):
        return _verdict(False, "more than one expression")
    units = [_last_unit(text) for text in (answer, reference)]
    if all(units) and units[0] != units[1]:
        return _verdict(False, "another unit")
    if {_brackets(answer), _brackets(reference)} == {"(", "{"}:
        return _verdict(False, "a point or interval is not a set or a list")
    return None


def _verdict(correct: bool, detail: str = "") -> tuple[Outcome, str]:
    return (Outcome.CORRECT if correct else Outcome.WRONG), detail


def for_math_verify(text: str) -> str:
    r"""Return a text that math-verify reads exactly: decimals as fractions, since it rounds them to six places.

    Example:
        >>> for_math_verify(r"(0.5, \\sqrt{2})")
        '(\\frac{5}{10}, \\\\sqrt{2})'
    """
    text = _spell(text)
    if (word := _word(_clean(text))) and _meaning(word) != word:
        return _meaning(word)
    return re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
