"""From the start of ``fit`` to the end of its first step, on a file of 100,000 rows that no cache knows.

    python benchmarks/first_step.py --rows 100000 --json first_step.json

A JSONL file of GSM8K's form is generated first (not timed): questions of about 240 characters, worked answers of about
290 with GSM8K's calculator marks, the number after ``####``; every hundredth row repeats the one before, every
thousandth has no number. ``python -m hdpo fit --config lab`` trains on all of it, with the laboratory's policy and the
README's mapping for GSM8K, without an evaluation before the first step, 4 prompts of 2 rollouts of 8 tokens.
``cpu_s`` is what the process and its workers took of all cores together, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, add_arguments, check_arguments, environment, report

NAMES = ["Ana", "Ben", "Carla", "Dmitri", "Esi", "Farid", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena"]
THINGS = ["apples", "books", "candles", "drums", "engines", "flowers", "gloves", "hammers", "jars", "kites", "lamps"]


def rows(number: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield rows with GSM8K's two columns."""
    rng = random.Random(seed)
    row = {"question": "", "answer": ""}
    for i in range(number):
        if i % 100 != 99:  # else the last one again
            first, each, days, price = rng.randrange(10, 9000), rng.randrange(2, 90), rng.randrange(2, 30), i % 17 + 2
            name, other, thing = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS)
            made, total = each * days, first + each * days
            row = {
                "question": f"{name} owns {first} {thing} and makes {each} more of them every day for {days} days. "
                f"Then {other} comes to the market and wants to buy all of the {thing} that {name} has by now, for "
                f"${price} each. How many dollars does {other} have to pay {name} in total?",
                "answer": f"In {days} days {name} makes {each} * {days} = <<{each}*{days}={made}>>{made} {thing}.\n"
                f"Together with those of the beginning that is {made} + {first} = <<{made}+{first}={total}>>{total} "
                f"{thing}.\nAt ${price} for each one {other} has to pay {total} * {price} = "
                f"$<<{total}*{price}={total * price}>>{total * price} for all of them.\n"
                + (f"#### {total * price:,}" if i % 1000 != 500 else "Nobody knows."),
            }
        yield row


def fit(folder: Path) -> dict[str, Any]:
    """Run ``fit`` on the file in the folder, and return when it said what, in seconds from its start."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (mapping,) = (block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "openai/gsm8k" in block)
    mapping = mapping.replace("openai/gsm8k\n    name: main", "gsm8k.jsonl")
    (folder / "gsm8k.yaml").write_text(mapping, encoding="utf-8")
    options = {
        "data.selection.num_train_problems": "null",
        "data.source.kwargs": "{}",  # the laboratory's are for a Python function
        "data.prompts_per_step": 4,
        "rollouts.num_generations": 2,
        "rollouts.max_new_tokens": 8,
        "distillation.max_new_tokens": 8,
        "evaluation.before_fit": "false",
        "evaluation.after_fit": "false",
        "trainer.max_steps": 1,
    }
    command = [sys.executable, "-m", "hdpo", "fit", "--config", "lab", "--config", "gsm8k.yaml"]
    command += [f"--{key}={value}" for key, value in options.items()]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started, seconds, lines = time.perf_counter(), {}, []
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = used.ru_utime + used.ru_stime
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            for name, words in (("prepared_s", "Data preparation"), ("first_step_s", "step 1/1 ")):
                if line.startswith(words):
                    seconds[name] = time.perf_counter() - started
    if process.returncode or len(seconds) < 2:
        raise RuntimeError(f"fit failed with status {process.returncode}:\n{''.join(lines)[-2000:]}")
    reports = [json.loads(file.read_text()) for file in (folder / ".hdpo_cache").glob("*.json")]
    kept = max(found["report"]["kept"] for found in reports)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"problems": kept, **seconds, "cpu_s": used.ru_utime + used.ru_stime - before}


def main() -> None:
    """Run it, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the generated file (default: 100000)")
    add_arguments(parser, repeats=1)
    args = parser.parse_args()
    check_arguments(parser, args)
    results = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (folder / "gsm8k.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows(args.rows))
            results.append({"rows": args.rows} | fit(folder))
    report(results, args, environment())


if __name__ == "__main__":
    main()
