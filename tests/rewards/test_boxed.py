import random
from collections import Counter

import pytest

from hdpo.rewards.boxed import boxes, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{4}, no: \boxed{5}.", "5"),
        (r"\boxed {5}", "5"),
        ("\\boxed\n{ 5 }", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\text{if } x \in \{1, 2\}}", r"\text{if } x \in \{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),  # one escaped brace
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"a line \\\boxed{5}", "5"),  # a line break before the box
        (r"$\\boxed{5}$", "5"),  # escaped twice
        (r"\boxed{4} and then \boxed{5", "4"),  # cut off by the token limit
        (r"\boxed{x_{1} so that \boxed{5}.", "5"),  # a box that was never closed
        (r"{ } } \boxed{5} }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{4} \boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        (r"\boxed", None),
        (r"boxed{5}", None),
        (r"\fbox{5}", None),
        ("the answer is 5", None),
        ("", None),
        ("\\boxed{\x00\ud800}", "\x00\ud800"),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{4} no, \boxed{ 5 }", ["4", "5"]),
        (r"\boxed{4}, again \boxed{4}", ["4", "4"]),
        (r"\boxed{1 + \boxed{2} + \boxed{3}} and \boxed{4}", [r"1 + \boxed{2} + \boxed{3}", "4"]),
        (r"\boxed{4} and \boxed{x + \boxed{5}", ["4", "5"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{4", []),
        (r"\boxed{4} and $\\boxed{5}$", ["4", "5"]),
    ],
)
def test_boxes(text, contents):
    assert boxes(text) == contents


def quadratic_boxes(text):
    """For each box, walk to its closing brace; those inside another one do not count."""
    spans = []
    for start in range(len(text)):
        if not text.startswith("\\boxed{", start):
            continue
        depth, i = 1, start + len("\\boxed{")
        while i < len(text) and depth:
            if text[i] == "\\" and text[i + 1 : i + 2] in ("{", "}"):
                i += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if depth == 0:
            spans.append((start, i))
    outer = [(a, b) for a, b in spans if not any(c < a and b < d for c, d in spans)]
    return [text[a + len("\\boxed{") : b - 1].strip() for a, b in sorted(outer)]


def test_agrees_with_a_walk_from_each_box():
    rng = random.Random(0)
    pieces = ["\\boxed{", "{", "}", "\\{", "\\}", "5", " ", "x"]
    found = Counter()
    for _ in range(5000):
        text = "".join(rng.choices(pieces, [3, 2, 5, 1, 1, 2, 1, 1], k=rng.randrange(1, 15)))
        expected = quadratic_boxes(text)
        found.update([len(expected)])
        assert boxes(text) == expected, text
        assert last_boxed(text) == (expected[-1] if expected else None)
    assert found[1] > 1000
    assert found[2] > 100


@pytest.mark.timeout(60)  # a quadratic scan of these takes hours
@pytest.mark.parametrize("text", ["\\boxed{" * 300_000, "{" * 2_000_000 + "\\boxed{5}", "\\boxed{" + "{" * 2_000_000])
def test_is_linear(text):
    assert last_boxed(text) == ("5" if text.endswith("5}") else None)
