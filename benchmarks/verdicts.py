"""The verifier's verdicts: agreement with a person, class by class, and what thousands of hostile answers do to it.

    python benchmarks/verdicts.py --num-hostile 10000 --json verdicts.json

"strict" and "bare" are the share of a class's rows (tests/rewards/verdicts.py) on which MathVerifier's `strict` profile
and math-verify by itself agree with the person; "paid" counts wrong answers that earn a reward. The hostile answers
(tests/rewards/hostile_answers.py) are graded in batches of 500, about a step's; each batch's time is compared with the
bound that MathVerifier states: its `batch_timeout`, and the start of a worker that was replaced at the end of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT, environment, report

from hdpo.rewards import MathVerifier, Outcome

sys.path.insert(0, str(ROOT))
from tests.rewards.helpers import child_processes
from tests.rewards.hostile_answers import hostile_answers
from tests.rewards.verdicts import VERDICTS, completions

BATCH = 500
START_OF_A_WORKER = 5.0


def bare(reference: str, completion: str) -> bool:
    """The verdict of math-verify by itself, with the time limits that it has."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    config = (LatexExtractionConfig(),)
    return verify(parse(f"\\boxed{{{reference}}}", config), parse(completion, config))


def agreement() -> list[dict[str, Any]]:
    """One row per class, and one for all of them."""
    rows = []
    judged: list[tuple[bool, bool, bool]] = []
    with MathVerifier() as verifier:
        for name, pairs in VERDICTS.items():
            texts, references, right = completions(pairs), [pair[0] for pair in pairs], [pair[2] for pair in pairs]
            strict = [grade.outcome is Outcome.CORRECT for grade in verifier.grade(texts, references)]
            triples = list(zip(right, strict, map(bare, references, texts), strict=True))
            rows.append({"class": name, **summary(triples)})
            judged += triples
    return [*rows, {"class": "all", **summary(judged)}]


def summary(verdicts: list[tuple[bool, bool, bool]]) -> dict[str, float]:
    """Shares of agreement and numbers of wrong answers that were paid, from (person, strict, bare)."""
    return {
        "pairs": len(verdicts),
        "strict": sum(person == strict for person, strict, _ in verdicts) / len(verdicts),
        "bare": sum(person == bare for person, _, bare in verdicts) / len(verdicts),
        "strict_paid": sum(strict and not person for person, strict, _ in verdicts),
        "bare_paid": sum(bare and not person for person, _, bare in verdicts),
    }


def hostile(number: int, timeout: float, batch_timeout: float, workers: int) -> dict[str, Any]:
    """Grade hostile answers, and check that all are accounted for, in time, and that no process is left."""
    answers = hostile_answers(number)
    before, outcomes, slowest = child_processes(), Counter[str](), 0.0
    bound = batch_timeout + START_OF_A_WORKER
    with MathVerifier(num_workers=workers, timeout=timeout, batch_timeout=batch_timeout) as verifier:
        verifier.start()
        started = time.perf_counter()
        for i in range(0, number, BATCH):
            texts, references = zip(*answers[i : i + BATCH], strict=True)
            begun = time.perf_counter()
            grades = verifier.grade(texts, references)
            slowest = max(slowest, time.perf_counter() - begun)
            assert len(grades) == len(texts)
            outcomes.update(grade.outcome.value for grade in grades)
            assert not any(grade.reward for grade in grades), "a hostile answer was paid"
        seconds = time.perf_counter() - started
        respawns = verifier.respawns
    assert sum(outcomes.values()) == number
    assert slowest < bound, f"a batch took {slowest:.1f} s; the bound is {bound:.1f} s"
    assert child_processes() == before, "a worker was left"
    return {
        "class": "hostile",
        "pairs": number,
        **{outcome.value: outcomes[outcome.value] for outcome in Outcome},
        "respawns": respawns,
        "seconds": seconds,
        "slowest_batch": slowest,
        "bound": bound,
    }


def main() -> None:
    """Print both tables, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-hostile", type=int, default=10_000, help="hostile answers (default: 10,000)")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds per answer (default: 1)")
    parser.add_argument("--batch-timeout", type=float, default=20.0, help="seconds per batch (default: 20)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="worker processes")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    env = environment()
    report([*agreement(), hostile(args.num_hostile, args.timeout, args.batch_timeout, args.workers)], args, env)


if __name__ == "__main__":
    main()
