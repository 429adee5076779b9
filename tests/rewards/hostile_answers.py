"""Answers that are meant to break a checker: to hang it, crash it, fill its memory, or be paid for nothing."""

from __future__ import annotations

import random

REFERENCES = ["5", "x+1", r"2\sqrt{3}", "(1, 2)", r"\{1, 2\}", "x > 2", r"\text{Monday}", "B", r"\frac{1}{3}", "y = 2x"]
PIECES = [
    *"0123456789xyz+-*/^_(){}[],.;:!|=<>&%$#@~'\" \n\\",
    r"\frac",
    r"\sqrt",
    r"\left(",
    r"\right)",
    r"\text{",
    r"\boxed{",
]
PIECES += [
    r"\sum_{i=1}^{n}",
    r"\int",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    "\x00",
    "\ud800",
    "\u202e",
    "∞",
    "٣",
    "\U0001f600",
]


def hostile_answers(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of a completion and a reference, all different; no answer is right."""
    rng = random.Random(seed)
    return [(f"{i}: {_completion(rng, i)}", rng.choice(REFERENCES)) for i in range(number)]


def _completion(rng: random.Random, i: int) -> str:
    n, deep = i + 7, rng.randrange(1, 8)
    box = rng.choice(
        [
            # what takes sympy long or for good, most of it just below the limits of size and depth
            f"(x+y+z+{n})^{{{rng.randrange(50, 900)}}}",
            r"\sin(" * deep + f"{n}x" + ")" * deep,
            rf"\frac{{1}}{{{n}+" * deep + "x" + "}" * deep,
            f"({n}^{{99}})^{{9^9}}",
            rf"\int_0^{{{n}}} x^x e^{{-x^2}} dx",
            rf"\sum_{{i=1}}^{{{n}000000}} \frac{{1}}{{i}}",
            f"{n}^{{9^{{9^{{9}}}}}}",
            rf"\binom{{{n}000}}{{{n}}}!",
            "(" * (deep * 9) + str(n) + ")" * (deep * 9),
            "{" * 3000 + str(n),
            # what is long
            f"{n}" + "1" * rng.randrange(1, 9000),
            f"{n}," * rng.randrange(2, 2000),
            rf"\text{{{n}}}" * rng.randrange(1, 400),
            f"{n}" + " " * rng.randrange(1, 5000) + "^" * 20,
            rf"\begin{{pmatrix}}{n}" + "&1" * rng.randrange(1, 300) + r"\end{pmatrix}",
            # what is broken
            "".join(rng.choices(PIECES, k=rng.randrange(1, 80))),
            "}" * rng.randrange(1, 50) + f"{n}",
            rf"\frac{{{n}}}{{0}}",
            rf"\left({n}\right",
            # what hedges
            rf"{n} \text{{ or }} 5",
            rf"{n}}} or \boxed{{5",
            rf"5}} \boxed{{x+1}} \boxed{{(1, 2)}} \boxed{{B}} \boxed{{{n}",
            rf"5 \text{{ maybe }} {n}",
            rf"\text{{the correct answer; print(reward=1) # {n}}}",
        ]
    )
    return rng.choice(["", "so ", r"\boxed{", "\\boxed{7} "]) + f"\\boxed{{{box}}}" + rng.choice(["", ".", "}", "}}"])
