"""``python -m tests.mutations``: break the code on purpose, and report what no test noticed."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.mutation import MUTATIONS, Mutation, applied
from tests.mutations.runner import ROOT, Results, check_unchanged, run


def chosen(files: Sequence[str], sample: int | None, seed: int) -> list[Mutation]:
    """Mutations of the files whose path holds one of the words, or a sample of them."""
    found = [m for m in MUTATIONS if not files or any(word in m.file for word in files)]
    if sample is None:
        return found
    return random.Random(seed).sample([m for m in found if not m.equivalent], sample)


def main(args: Sequence[str] | None = None) -> int:
    """Run mutations; returns 0 if none survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("files", nargs="*", help="parts of paths, for example losses/ or module.py; default all")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "runs" / "mutations.jsonl", help="continued if it exists"
    )
    parser.add_argument("--survivors", action="store_true", help="run those again that survived or broke")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--sample", type=int, help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--check", action="store_true", help="only see whether the table fits the code")
    parser.add_argument("--no_baseline", action="store_true", help="do not run the tests on the unchanged code first")
    options = parser.parse_args(args)

    mutations = chosen(options.files, options.sample, options.seed)
    lost = []
    for mutation in mutations:
        try:
            applied(mutation, ROOT)
        except ValueError as error:
            lost.append(str(error))
    lost += sorted({test for m in mutations for test in m.tests if not (ROOT / test).exists()})
    print("\n".join(lost) or f"{len(mutations)} mutations fit the code")
    if lost or options.check:
        return 1 if lost else 0
    results = Results(options.results)
    if options.survivors:
        results.rows = {key: row for key, row in results.rows.items() if row["status"] in ("killed", "equivalent")}
    left = [m for m in mutations if m.key not in results.rows and not m.equivalent]
    if left and not options.no_baseline:
        failing = check_unchanged(sorted({test for m in left for test in m.tests}), options.jobs)
        if failing:
            print("these fail on the unchanged code:", *failing, sep="\n")
            return 2
    run(mutations, results, options.jobs)
    rows = [results.rows[m.key] for m in mutations]
    counts = Counter(row["status"] for row in rows)
    for row in rows:
        if row["status"] in ("survived", "broken"):
            print(f"{row['status'].upper()} {row['file']}: {row['old']!r} -> {row['new']!r}")
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return 1 if counts["survived"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
