"""``python -m hdpo show``: what a run sampled, and what became of it, in the terminal."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hdpo.callbacks.samples import visible
from hdpo.commands.suggestions import CommandParser
from hdpo.errors import ConfigError
from hdpo.evaluation.records import evaluation_files, read_gzip, read_json_lines

Row = dict[str, Any]


def _parser() -> CommandParser:
    parser = CommandParser(
        "show",
        description="Print problems with their completions and verdicts: those that training logged in samples.jsonl, "
        "privileged rollouts included, or with --problem one problem in all evaluations. Pipe it into a pager.",
    )
    add = parser.add_argument
    add("run", type=str, help="the run's folder")
    add("--cliffs", action="store_true", help="only cliffs")
    add("--step", type=int | None, default=None, help="only this step; default: the last with samples")
    add("--problem", type=str | None, default=None, help="one problem over all steps: the id that show prints, or ROW "
        "or SET:ROW of an evaluation")  # fmt: skip
    add("--num_completions", type=int, default=4, help="completions per problem that are printed in full")
    return parser


def _id(problem: str) -> str:
    """As the evaluation's records name it."""
    return hashlib.sha256(problem.encode(errors="surrogatepass")).hexdigest()[:16]


def _block(text: str, indent: int = 6) -> Iterator[str]:
    for line in text.split("\n"):
        yield " " * indent + visible(line)


def _verdict(row: Row) -> str:
    reward = f", reward {row['reward']:g}" if "reward" in row else ""
    return f"{row['outcome']}{reward}, {row['tokens']} tokens{', truncated' if row['truncated'] else ''}"


def _sample(row: Row, number: int) -> Iterator[str]:
    """One problem of a training step."""
    kind = "cliff" if row["is_cliff"] else "prompt"
    reward, name = f"mean reward {row['reward']:.2f}", _id(row["problem"])
    yield f"step {row['step']}  {kind}  {visible(row['source'])}  {reward}  id {name}"
    yield from _block(row["problem"], 2)
    yield f"  expected: {visible(row['reference'])}"
    for title, completions in (("plain", row["completions"]), ("privileged", row["privileged"])):
        for one in completions[:number]:
            text = one["text"]
            yield f"  {title}: {_verdict(one)}"
            yield from _block(text)
    yield ""


def _is_meant(row: Row, wanted: str) -> bool:
    place = f"{row['dataset']}:{row['row']}" if row["dataset"] else str(row["row"])
    return place == wanted or row["problem_hash"] == wanted


def _evaluated(folder: Path, wanted: str, number: int) -> tuple[list[str], set[str]]:
    """One problem over all evaluations: a line each, and the completions of the last; and its ids."""
    lines: list[str] = []
    ids: set[str] = set()
    for kind in ("evaluations", "tests"):
        last: dict[tuple[str, int], list[Row]] = {}  # by set and row: a problem may stand in several
        for step, file in evaluation_files(folder / kind).items():
            found: dict[tuple[str, int], list[Row]] = {}
            for _, row in read_gzip(file):
                if _is_meant(row, wanted):
                    found.setdefault((row["dataset"], row["row"]), []).append(row)
                    ids.add(row["problem_hash"])
            last = found or last
            for (dataset, _), rows in found.items():
                signs = {"correct": "1", "wrong": "0", "no_answer": "-"}
                drawn = "".join(signs.get(row["outcome"], "?") for row in rows if not row["greedy"])
                (greedy,) = (row for row in rows if row["greedy"])
                answer = "no answer" if greedy["answer"] is None else f"answer {visible(greedy['answer'])}"
                where = f"{rows[0]['split']}{f' {dataset}' if dataset else ''} at step {step}"
                lines.append(f"{where}: samples {drawn}, greedy {greedy['outcome']} ({answer})")
        for rows in last.values():
            source, reference = visible(rows[0]["source"]), visible(rows[0]["reference"])
            lines.append(f"  {source}  expected: {reference}  id {rows[0]['problem_hash']}")
            for row in sorted(rows, key=lambda row: not row["greedy"])[: number + 1]:
                lines.append(f"  {'greedy' if row['greedy'] else 'sample ' + str(row['sample'])}: {_verdict(row)}")
                lines += _block(row["completion"])
            lines.append("")
    return lines, ids


def show(
    folder: Path, *, cliffs: bool = False, step: int | None = None, problem: str | None = None, num_completions: int = 4
) -> Iterator[str]:
    """Yield what ``show`` prints, line by line.

    Args:
        folder: the run's.
        cliffs: cliffs alone.
        step: of this training step; None for the last that has any, or with ``problem`` for all.
        problem: one problem: its id, ``ROW`` or ``SET:ROW`` of an evaluation.
        num_completions: completions that are printed of each problem and kind.

    Raises:
        ConfigError: nothing is there, or a file is broken.
    """
    path = folder / "samples.jsonl"
    rows: list[Row] = []
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        # A killed run may leave half a line.
        rows = [row for _, row in read_json_lines(path, text[: text.rfind("\n") + 1])]
    elif problem is None:
        raise ConfigError(f"{path}: there is no such file; name a run's folder, in which samples were logged")
    lines, ids = _evaluated(folder, problem, num_completions) if problem is not None else ([], set())
    yield from lines
    ids |= {str(problem)}
    kept = [row for row in rows if (row["is_cliff"] or not cliffs) and (problem is None or _id(row["problem"]) in ids)]
    if step is None and problem is None:
        step = max((row["step"] for row in kept), default=None)
    kept = [row for row in kept if step is None or row["step"] == step]
    if not kept and not lines:
        what = f"no problem {problem}" if problem is not None else "no cliff" if cliffs else "no sample"
        steps = sorted({row["step"] for row in rows})
        known = f"; there are samples of steps {', '.join(map(str, steps))}" if steps else ""
        raise ConfigError(f"show: {folder} has {what}{'' if step is None else f' at step {step}'}{known}")
    for row in kept:
        yield from _sample(row, num_completions)


def main(args: Sequence[str]) -> int:
    """Run ``python -m hdpo show``; returns the exit status.

    Raises:
        ConfigError: a mistake of the user's.
    """
    options = _parser().options(args)
    given = {name: value for name, value in vars(options).items() if name != "run"}
    try:
        for line in show(Path(options.run), **given):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the pager was closed; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
