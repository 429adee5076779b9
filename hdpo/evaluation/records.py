"""Evaluation as a record: one row per problem and sample, from which every number of a report is computed again.

An evaluation is a gzipped JSONL file in the run's folder, ``evaluations/step_<n>.jsonl.gz``; ``zcat`` shows it and
``pandas.read_json(path, lines=True)`` reads it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdpo.errors import ConfigError
from hdpo.evaluation.intervals import mean_interval
from hdpo.files import whole_file

__all__ = [
    "Evaluation",
    "evaluation_files",
    "metric_values",
    "problem_groups",
    "read_json_lines",
    "read_records",
    "recompute",
    "record_path",
    "write_gzip",
]

NO_VERDICT = ("timeout", "error", "invalid_reference")
"""Outcomes of a verifier that are no verdict on the completion."""

COLUMNS: dict[str, tuple[str, tuple[type, ...]]] = {
    "split": ("a string", (str,)),
    "step": ("an integer", (int,)),
    "dataset": ("a string", (str,)),
    "row": ("an integer", (int,)),
    "problem_hash": ("a string", (str,)),
    "source": ("a string", (str,)),
    "reference": ("a string", (str,)),
    "greedy": ("a boolean", (bool,)),
    "sample": ("an integer", (int,)),
    "seed": ("an integer", (int,)),
    "temperature": ("a number", (float, int)),
    "outcome": ("a string", (str,)),
    "tokens": ("an integer", (int,)),
    "truncated": ("a boolean", (bool,)),
    "answer": ("a string or null", (str, type(None))),
    "completion": ("a string", (str,)),
}
"""What each row holds.

``split`` and ``dataset`` (the name of one of several evaluation sets) say where the problem is from, ``step`` how many
optimizer steps the weights have seen. ``row`` is the problem's row in the prepared data, ``problem_hash`` a hash of its
text, ``source`` its ``problem_source``, ``reference`` the expected answer. ``greedy`` tells the completion at
temperature 0 from the sampled ones, which ``sample`` counts from 0; each was drawn with ``seed`` at ``temperature``.
``outcome`` is the verifier's, ``tokens`` the length, ``truncated`` whether the token limit ended it, ``answer`` what
its last box holds, and ``completion`` the text.
"""


def problem_groups(dataset: str, source: str) -> tuple[str, ...]:
    """Name the groups that a problem's metrics are reported under, beside that of all problems.

    Args:
        dataset: name of its evaluation set; empty for a set without a name.
        source: its ``problem_source``, which bears the name of the set where no column holds one.

    Example:
        >>> problem_groups("", "algebra"), problem_groups("aime24", "aime24"), problem_groups("math500", "algebra")
        (('algebra',), ('aime24',), ('math500', 'math500/algebra'))
    """
    if not dataset:
        return (source,)
    return (dataset,) if source == dataset else (dataset, f"{dataset}/{source}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the verdicts on N problems.

    Attributes:
        step: optimizer steps before the evaluation.
        split: ``validation`` or ``test``.
        problems: hash of the problems' texts and rows; equal where two evaluations are of the same problems.
        rows: N problems as ``(data set, row)``, sorted.
        sources: where each is from; in a named set ``set/source``, or ``set`` where the source bears its name.
        samples: N strings with one character per sampled completion, in the order in which they were drawn: ``1`` for
            correct, ``0`` for wrong, ``?`` for one without a verdict.
        greedy: the same for the greedy completions, one character per problem.
    """

    step: int
    split: str
    problems: str
    rows: tuple[tuple[str, int], ...]
    sources: tuple[str, ...]
    samples: tuple[str, ...]
    greedy: str

    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """The sources and named sets, sorted, with ``[N]`` True for the problems of each."""
        sets, sources = np.array([name for name, _ in self.rows]), np.array(self.sources)
        return {name: (sets == name) | (sources == name) for name in sorted({*sources.tolist(), *sets.tolist()} - {""})}

    def of(self, mask: NDArray[np.bool_]) -> Evaluation:
        """The part of the evaluation with the problems where ``mask`` (``[N]``) is True."""
        chosen = np.flatnonzero(mask).tolist()
        parts: Any = {name: tuple(getattr(self, name)[i] for i in chosen) for name in ("rows", "sources", "samples")}
        return replace(self, **parts, greedy="".join(self.greedy[i] for i in chosen))

    @property
    def num_samples(self) -> int:
        """Fewest samples of a problem: the largest k of pass@k that can be computed."""
        return min(map(len, self.samples))

    @property
    def num_without_verdict(self) -> int:
        """Completions that the verifier could not judge; they count as not solved."""
        return self.greedy.count("?") + sum(text.count("?") for text in self.samples)


def record_path(folder: Path, step: int) -> Path:
    """Where the evaluation at a step is recorded."""
    return folder / f"step_{step:06d}.jsonl.gz"


def evaluation_files(folder: Path) -> dict[int, Path]:
    """The evaluations recorded in a folder, by step."""
    files = folder.glob("step_*.jsonl.gz")
    return {int(path.name[5:-9]): path for path in sorted(files) if path.name[5:-9].isdecimal()}


def write_gzip(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as gzipped JSON lines; the file appears whole or not at all, and equal rows make equal files."""
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    with whole_file(path) as partial:
        # A lone surrogate, which a byte-level tokenizer can produce, is no UTF-8.
        partial.write_bytes(gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0))


def read_gzip(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Read gzipped JSON lines as (line number, object); the error names file and line.

    Raises:
        ConfigError: there is no such file, it is broken, or a line is not a JSON object.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file of evaluation records")
    try:
        text = gzip.decompress(Path(path).read_bytes()).decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: not gzipped UTF-8 text, so not evaluation records ({error})") from None
    rows = read_json_lines(path, text)
    if not rows:
        raise ConfigError(f"{path}: holds no evaluation records; evaluate again, or remove the file")
    return rows


def read_json_lines(path: str | Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON lines as (line number, object); the error names file and line.

    Raises:
        ConfigError: a line is not a JSON object.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: not a JSON object")
            rows.append((number, row))
    return rows


def _check(path: str | Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Refuse rows that lack a column or hold a value of another type. Later versions' columns are left alone."""
    for name, (kind, types) in COLUMNS.items():
        # A whole column at a time; bool is an int to isinstance, and JSON's true must not pass as a row number.
        if set(map(type, (row.get(name, ...) for _, row in rows))) <= set(types):
            continue
        for number, row in rows:
            if type(row.get(name, ...)) not in types:
                wrong = f"{name!r} must be {kind}" if name in row else f"has no {name!r}"
                raise ConfigError(f"{path}, line {number}: {wrong}; evaluate again, or remove the file")


def _verdict(outcome: str) -> str:
    return "1" if outcome == "correct" else "?" if outcome in NO_VERDICT else "0"


def read_records(path: str | Path) -> Evaluation:
    """Read one evaluation.

    Args:
        path: a file that :func:`write_gzip` wrote, of rows with the :data:`COLUMNS`.

    Raises:
        ConfigError: a row is broken, repeated or missing, or from another evaluation; the message names file and line.
    """
    rows = read_gzip(path)
    _check(path, rows)
    first = rows[0][1]
    seen: dict[tuple[str, int, bool, int], int] = {}
    known: dict[tuple[str, int], tuple[str, str]] = {}
    verdicts: dict[tuple[str, int, bool], dict[int, str]] = {}
    for number, row in rows:
        for name in ("step", "split"):
            if row[name] != first[name]:
                raise ConfigError(f"{path}, line {number}: {name} {row[name]} in an evaluation with {first[name]}")
        problem = row["dataset"], row["row"]
        key = *problem, row["greedy"], row["sample"]
        if key in seen:
            raise ConfigError(f"{path}, line {number}: repeats the completion of line {seen[key]} (row {row['row']})")
        seen[key] = number
        known[problem] = row["problem_hash"], row["source"]
        verdicts.setdefault((*problem, row["greedy"]), {})[row["sample"]] = _verdict(row["outcome"])
    order = sorted(known)
    samples, greedy = (
        [verdicts.get((*key, False), {}) for key in order],
        [verdicts.get((*key, True), {}) for key in order],
    )
    for (_, number), drawn, one in zip(order, samples, greedy, strict=True):
        if len(one) != 1 or not drawn or max(drawn) != len(drawn) - 1:
            raise ConfigError(
                f"{path}: row {number} lacks completions: it must have one greedy one and samples 0, 1, ...; evaluate "
                "again, or remove the file"
            )
    identity = json.dumps([(*key, known[key][0]) for key in order])
    return Evaluation(
        step=first["step"],
        split=first["split"],
        problems=hashlib.sha256(identity.encode()).hexdigest()[:16],
        rows=tuple(order),
        sources=tuple(problem_groups(key[0], known[key][1])[-1] for key in order),
        samples=tuple("".join(drawn[i] for i in range(len(drawn))) for drawn in samples),
        greedy="".join(verdict for one in greedy for verdict in one.values()),
    )


def metric_values(evaluation: Evaluation, metric: str) -> NDArray[np.float64]:
    """Value of each problem: ``"pass@k"`` (unbiased), ``"any@k"`` (one of the first k) or ``"greedy_accuracy"``.

    Returns:
        ``[N]`` in [0, 1].

    Raises:
        ConfigError: there is no such metric, or k exceeds the number of samples.
    """
    if metric == "greedy_accuracy":
        return np.array([verdict == "1" for verdict in evaluation.greedy], dtype=np.float64)
    kind, _, k_text = metric.partition("@")
    if kind not in ("pass", "any") or not k_text.isdecimal() or int(k_text) < 1:
        raise ConfigError(f"there is no metric {metric!r}; choose pass@k, any@k (k >= 1) or greedy_accuracy")
    k = int(k_text)
    if k > evaluation.num_samples:
        raise ConfigError(
            f"{metric} needs at least {k} samples per problem, an evaluation at step {evaluation.step} has "
            f"{evaluation.num_samples}: evaluate with more samples, or leave k = {k} out"
        )
    if kind == "any":
        return np.array(["1" in text[:k] for text in evaluation.samples], dtype=np.float64)
    import torch

    from hdpo.functional import pass_at_k

    counts = torch.tensor([(len(text), text.count("1")) for text in evaluation.samples])
    return pass_at_k(counts[:, 0], counts[:, 1], k).numpy()


def recompute(evaluation: Evaluation, ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Every number of one evaluation with its 95 % interval over problems, overall, by named set and by source.

    The intervals are about other problems with as many of each source. Where sets have different numbers of samples,
    each has the k that its own allow, and all together those that all allow.

    Args:
        evaluation: as :func:`read_records` returns it.
        ks: the k of pass@k and any@k.

    Returns:
        ``{"all": {"pass@1": {"value", "low", "high"}, ..., "greedy_accuracy": {...}, "num_problems": N}, source: ...}``
        with sets and sources in alphabetical order (a source called "all" appears as "source all").

    Raises:
        ConfigError: each k exceeds the number of samples of every problem.

    Example:
        >>> two = Evaluation(0, "test", "", (("", 0), ("", 1)), ("algebra", "sets"), ("10", "00"), "10")
        >>> numbers = recompute(two, ks=[1, 2])
        >>> numbers["all"]["pass@1"]["value"], numbers["algebra"]["pass@2"]["value"], numbers["all"]["num_problems"]
        (0.25, 1.0, 2)
    """
    masks = {"all": np.full(len(evaluation.rows), True)}
    masks |= {name if name != "all" else "source all": mask for name, mask in evaluation.groups().items()}
    most = max(map(len, evaluation.samples))
    result: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        part = evaluation.of(mask)
        possible = [k for k in ks if k <= part.num_samples]
        if most < min(ks):
            possible = [min(ks)]  # which says how many samples it would take
        result[name] = {"num_problems": len(part.rows)}
        for metric in (*(f"pass@{k}" for k in possible), *(f"any@{k}" for k in possible), "greedy_accuracy"):
            values = metric_values(part, metric)
            low, high = mean_interval(values, part.sources)
            result[name][metric] = {"value": float(values.mean()), "low": low, "high": high}
    return result
