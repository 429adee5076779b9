"""Answers per second of MathVerifier, cold and warm, against bare math-verify in one process.

    python benchmarks/verifier.py --num-answers 2000 --workers 1 2 --json verifier.json

The answers are what a step grades: K rollouts per problem, a share of them equal, LaTeX of all kinds. "cold" includes
the start of the workers, "warm" does not. "distinct" makes all answers different, so that grading equal pairs once
saves nothing. Three sevenths of the references are numbers, which need no worker. The two methods do not agree on every
answer: see `verdicts.py`.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from common import environment, report

from hdpo.rewards import MathVerifier

KINDS = (
    lambda n: (f"{n}", f"{n}", f"{n + 1}"),
    lambda n: (f"\\frac{{{n}}}{{7}}", f"\\dfrac{{{2 * n}}}{{14}}", f"\\frac{{{n + 1}}}{{7}}"),
    lambda n: (f"{n}.5", f"\\frac{{{2 * n + 1}}}{{2}}", f"{n}.25"),
    lambda n: (f"{n}\\sqrt{{2}}", f"\\sqrt{{{2 * n * n}}}", f"{n}\\sqrt{{3}}"),
    lambda n: (f"[{n}, \\infty)", f"x \\ge {n}", f"({n}, \\infty)"),
    lambda n: (f"{n}, {n + 1}", f"{n + 1}, {n}", f"{n}, {n + 2}"),
    lambda n: (f"{n}x^2 + 1", f"1 + {n}x^2", f"{n}x^2 - 1"),
)


def make_answers(num_answers: int, rollouts: int, distinct: bool, seed: int) -> tuple[list[str], list[str]]:
    """Return completions with a boxed answer and their references; about half of the answers are right."""
    rng = random.Random(seed)
    completions: list[str] = []
    references: list[str] = []
    while len(completions) < num_answers:
        number = len(completions) + 2 if distinct else rng.randrange(2, 500)
        reference, right, wrong = KINDS[rng.randrange(len(KINDS))](number)
        for _ in range(1 if distinct else rollouts):
            answer = rng.choice([reference, right, wrong])
            completions.append(f"Let us work it out step by step. Therefore the answer is \\boxed{{{answer}}}.")
            references.append(reference)
    return completions[:num_answers], references[:num_answers]


def bare(completions: list[str], references: list[str]) -> tuple[int, float]:
    """Grade with math-verify itself in this process; returns the number of right answers and the seconds."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    config = (LatexExtractionConfig(),)

    def grade(completion: str, reference: str) -> bool:
        gold = parse(f"\\boxed{{{reference}}}", config, parsing_timeout=None)
        return verify(gold, parse(completion, config, parsing_timeout=None), timeout_seconds=None)

    grade("\\boxed{\\frac{1}{2}}", "1")  # compiles the regular expressions
    start = time.perf_counter()
    correct = sum(grade(c, r) for c, r in zip(completions, references, strict=True))
    return correct, time.perf_counter() - start


def timed(verifier: MathVerifier, completions: list[str], references: list[str]) -> tuple[int, float]:
    """Grade with the verifier; returns the number of right answers and the seconds."""
    start = time.perf_counter()
    grades = verifier.grade(completions, references)
    return sum(grade.outcome == "correct" for grade in grades), time.perf_counter() - start


def main() -> None:
    """Run the comparison, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-answers", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=16, help="completions per problem (default: 16)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    env = environment()

    rows = []
    for data in ("rollouts", "distinct"):
        answers = make_answers(args.num_answers, args.rollouts, data == "distinct", args.seed)
        results = {"math-verify, one process": bare(*answers)}
        for workers in args.workers:
            with MathVerifier(num_workers=workers) as verifier:
                results[f"MathVerifier, {workers} workers, cold"] = timed(verifier, *answers)
            with MathVerifier(num_workers=workers) as verifier:
                verifier.start()
                results[f"MathVerifier, {workers} workers, warm"] = timed(verifier, *answers)
        for method, (correct, seconds) in results.items():
            rate = args.num_answers / seconds
            rows.append({"data": data, "method": method, "correct": correct, "seconds": seconds, "answers_per_s": rate})

    report(rows, args, env)


if __name__ == "__main__":
    main()
