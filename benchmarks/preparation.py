"""Preparing a large data set: rows per second, peak memory, and the time until the first batch, cold and cached.

    python benchmarks/preparation.py --rows 1000000 --json preparation.json

A Parquet file with OpenMathInstruct-2's columns is generated first (not timed): stories of about 60 tokens with worked
solutions of about 200, a third of the rows further solutions of a problem, answers in LaTeX of all kinds, every
hundredth row unusable. The tokenizer is a byte-level BPE of 8,192 tokens, trained on its first rows. All problems are
kept for training but those of the validation and test splits; each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from common import child, environment, peak_memory, report

ANSWERS = (
    *[lambda n: f"{n}"] * 6,
    lambda n: f"\\frac{{{n}}}{{{n % 97 + 2}}}",
    lambda n: f"{n}\\sqrt{{{n % 7 + 2}}}",
    lambda n: f"[{n}, \\infty)",
    lambda n: f"\\text{{{'odd' if n % 2 else 'even'}}}",
)
NAMES = ["Ana", "Ben", "Carla", "Dmitri", "Esi", "Farid", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena"]
THINGS = ["apples", "books", "candles", "drums", "engines", "flowers", "gloves", "hammers", "jars", "kites", "lamps"]


def rows(number: int, seed: int = 0) -> Iterator[dict[str, str | None]]:
    """Yield rows in OpenMathInstruct-2's schema."""
    rng = random.Random(seed)
    problem, answer, first = "", "", 0
    for i in range(number):
        if i % 3 != 2:  # else another solution of the last problem
            first, second, days = rng.randrange(10**6), rng.randrange(2, 10**4), rng.randrange(2, 90)
            name, thing, other = rng.choice(NAMES), rng.choice(THINGS), rng.choice(THINGS)
            problem = (
                f"{name} owns {first} {thing} and trades {second} of them for {other} on each of {days} days, while "
                f"{rng.choice(NAMES)} returns one in every ${days + 1}$ {thing} that were traded. How many {thing} are "
                f"left in the end, if each of the {other} costs {second % 17 + 1} {thing}?"
            )
            answer = rng.choice(ANSWERS)(first)
        steps = " ".join(
            f"On day {day}: ${first} - {day} \\cdot {second % 1000} = {first - day * (second % 1000)}$ {thing}, "
            f"of which ${rng.randrange(100)}$ come back."
            for day in range(1, 6)
        )
        solution = f"Let us count the {thing} day by day. {steps} The answer is $\\boxed{{{answer}}}$."
        yield {
            "problem": problem,
            "generated_solution": solution,
            "expected_answer": "\\frac{" if i % 100 == 99 else answer,
            "problem_source": ("augmented_math", "augmented_gsm8k")[i % 2],
        }


def write_rows(path: Path, number: int) -> None:
    """Write the rows as Parquet, 10,000 at a time."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(dict.fromkeys(next(rows(1)), pyarrow.string()))
    stream = rows(number)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(stream, 10_000)):
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))


def make_tokenizer() -> Any:
    """Train the tokenizer and give it ChatML's template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (f"{row['problem']} {row['generated_solution']}" for row in rows(3000, seed=1))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=8192, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    )


def measure(path: str, cache: str, check: bool) -> dict[str, float]:
    """Set the data module up in this process, and take the first batch."""
    from hdpo.data import OpenMathDataModule, Selection, SourceConfig

    selection = Selection(num_train_problems=None, check_references=check)
    start = time.perf_counter()
    data = OpenMathDataModule(
        SourceConfig(path=path), selection=selection, tokenizer=make_tokenizer(), cache_dir=cache, seed=0
    )
    ready = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    prepared = time.perf_counter()
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 32
    ids = batch.prompts.prompt_ids, batch.prompts.privileged_ids
    return {
        "problems": len(data.dataset("train")),
        "prepare_s": prepared - ready,
        "first_batch_s": time.perf_counter() - start,
        "peak_MiB": peak_memory() / 2**20,
        "unshared_MiB": unshared_memory() / 2**20,
        "prompt_tokens": sum(map(len, ids[0])) / len(batch),
        "privileged_tokens": sum(map(len, ids[1])) / len(batch),
    }


def unshared_memory() -> int:
    """Bytes that this process holds now, without the mapped files, which it shares with others (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def main() -> None:
    """Run the measurements, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the generated file (default: 100000)")
    parser.add_argument(
        "--check", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="whether references are checked"
    )
    parser.add_argument("--folder", type=Path, help="where file and cache go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--measure", nargs=3, metavar=("PATH", "CACHE", "CHECK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        path, cache, check = args.measure
        print(json.dumps(measure(path, cache, check == "True")))
        return
    if args.rows < 1000:
        parser.error(f"--rows must be at least 1000, got {args.rows}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, args.rows)
        results = []
        for check in [word == "yes" for word in args.check]:
            for what in ("prepared", "cached"):
                found = child(["--measure", str(path), f"{folder}/{check}", str(check)])
                speed = {"rows_per_s": args.rows / found["prepare_s"]} if what == "prepared" else {}
                results.append({"data": what, "references_checked": check, "rows": args.rows} | found | speed)
        sizes = {"parquet_MiB": path.stat().st_size / 2**20}
        sizes["cache_MiB"] = sum(file.stat().st_size for file in Path(folder, str(check)).glob("*")) / 2**20
    report(results, args, environment() | sizes)


if __name__ == "__main__":
    main()
