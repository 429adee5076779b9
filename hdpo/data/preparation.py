"""From a stream of rows to the problems of a set: filtered, rendered, and every dropped row accounted for."""

from __future__ import annotations

import hashlib
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from hdpo.data.config import ProblemSet, Selection
from hdpo.data.prompts import PromptRenderer, privileged_context
from hdpo.data.sources import Problem

if TYPE_CHECKING:
    from rich.table import Table

DROP_REASONS = {
    "missing_problem": "no problem text",
    "not_unicode": "text is not valid Unicode (a lone surrogate)",
    "missing_solution": "no reference solution",
    "missing_answer": "no final answer",
    "held_out": "problem is in an evaluation set",
    "duplicate": "problem seen before",
    "unusable": "reference answer that the verifier cannot use",
    "special_tokens": "text spells a special token",
    "prompt_too_long": "prompt over data.selection.max_prompt_tokens",
    "prompt_merged": "tokens of the prompt merge with those of the generation prompt",
}
"""Why a row is left out, in the order in which it is asked; a row counts once, under the first that applies."""

NOT_DISTILLED = {
    "no_context": "without privileged context",
    "too_long": "with a privileged prompt over data.selection.max_privileged_tokens",
    "merged": "with a privileged prompt that merges with the generation prompt",
}
"""Why a problem that is kept cannot be distilled when it is a cliff."""

SECONDS_BETWEEN_LINES = 15.0


@dataclass
class PreparationReport:
    """What happened to the rows that were read for one problem set.

    Attributes:
        name: the problem set.
        source: path of its source.
        rows_read: rows looked at until the set was full or the source ended.
        kept: problems of the set.
        dropped: reason (see ``DROP_REASONS``) -> rows.
        not_distilled: reason (see ``NOT_DISTILLED``) -> kept problems that have no privileged prompt.
    """

    name: str
    source: str
    rows_read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=Counter)
    not_distilled: dict[str, int] = field(default_factory=Counter)

    def table(self) -> list[tuple[str, int]]:
        """Return the report as (what, count) lines, from rows read to problems kept."""
        elsewhere = self.rows_read - self.kept - sum(self.dropped.values())
        lines = [("rows read", self.rows_read), ("in other splits", elsewhere)]
        lines += [(f"dropped: {text}", self.dropped.get(key, 0)) for key, text in DROP_REASONS.items()]
        lines += [("kept", self.kept)]
        if self.name == "train":
            lines += [(f"  of these {text}", self.not_distilled.get(key, 0)) for key, text in NOT_DISTILLED.items()]
        return [(what, number) for what, number in lines if number or what == "kept"]


def normalise_problem(text: str) -> str:
    r"""Return the text by which two problems count as the same: Unicode forms, case and white space do not matter.

    Example:
        >>> normalise_problem("What  is\n2 + 2?") == normalise_problem("what is 2 + 2? ")
        True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def problem_digest(text: str) -> bytes:
    """Return 16 bytes that identify the normalised problem, on any machine and in any process."""
    return hashlib.sha256(normalise_problem(text).encode(errors="surrogatepass")).digest()[:16]


class PreparedProblem(NamedTuple):
    """One kept problem; ``privileged_ids`` is empty where it cannot be distilled, for the reason ``not_distilled``."""

    problem: Problem
    prompt_ids: list[int]
    privileged_ids: list[int]
    not_distilled: str | None


class Dropped(NamedTuple):
    """A row that was left out: its file, its number there (from 1), a key of ``DROP_REASONS``, how it begins."""

    file: str
    row: int
    reason: str
    text: str


class Collector:
    """What was seen and kept of one problem set on the way through its source.

    Attributes:
        report: what happened to the rows so far.
    """

    def __init__(self, wanted: ProblemSet, selection: Selection, held_out: Set[bytes] = frozenset()) -> None:
        self.wanted = wanted
        self.report = PreparationReport(wanted.name, wanted.source.path)
        self.keeps_duplicates = selection.keep_duplicates or not wanted.labelled
        self._needs_solution = wanted.labelled and wanted.source.columns.solution is not None
        self._held_out = held_out
        self._seen: set[bytes] = set()

    def full(self) -> bool:
        """Return whether all wanted problems were found."""
        return self.wanted.num_problems is not None and self.report.kept >= self.wanted.num_problems

    def early_reason(self, problem: Problem, digest: bytes) -> str | None:
        """Return why a row is dropped before anything costly is asked about it; None if it is not."""
        if not problem.problem:
            return "missing_problem"
        if not _is_unicode(problem):
            return "not_unicode"
        if self._needs_solution and not problem.solution:
            return "missing_solution"
        if self.wanted.labelled and not problem.answer:
            return "missing_answer"
        if digest in self._held_out:
            return "held_out"
        return "duplicate" if digest in self._seen else None

    def count(self, digest: bytes, result: PreparedProblem | Dropped) -> None:
        """Add a row to the report."""
        if isinstance(result, Dropped):
            self.report.dropped[result.reason] += 1
            return
        self.report.kept += 1
        if not self.keeps_duplicates:
            self._seen.add(digest)
        if result.not_distilled is not None:
            self.report.not_distilled[result.not_distilled] += 1


def _is_unicode(problem: Problem) -> bool:
    """Whether all texts can be encoded: a lone surrogate, which JSON can spell, cannot."""
    try:
        "".join(problem[:5]).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Candidate(NamedTuple):
    """A row (numbered from 0) that belongs to a set."""

    row: int
    problem: Problem
    digest: bytes
    collector: Collector

    def early_reason(self) -> str | None:
        return self.collector.early_reason(self.problem, self.digest)


def prepare(
    rows: Iterable[Problem],
    collectors: Sequence[Collector],
    selection: Selection,
    renderer: PromptRenderer,
    *,
    usable: Callable[..., list[bool]] | None = None,
    on_progress: Callable[[], None] = lambda: None,
    chunk_size: int = 512,
) -> Iterator[tuple[Collector, PreparedProblem | Dropped]]:
    """Go through a source once, and yield what becomes of the rows of each set; stop as soon as all sets are full.

    A set's problems, drops and report do not depend on which other sets are collected on the way.

    Args:
        rows: the source.
        collectors: one for each set; each row belongs to at most one.
        selection: what is kept.
        renderer: renders both contexts.
        usable: :meth:`hdpo.rewards.Verifier.usable`; None keeps all.
        on_progress: called after each chunk.
        chunk_size: rows that are graded and rendered together; does not change the result.
    """

    def render(candidates: Sequence[_Candidate]) -> dict[int, PreparedProblem | str]:
        return _render(candidates, selection, renderer, usable)

    numbered = enumerate(rows)
    while not all(collector.full() for collector in collectors):
        chunk = list(islice(numbered, chunk_size))
        if not chunk:
            return
        candidates = [_candidate(row, problem, collectors, selection) for row, problem in chunk]
        # Of the rows of one problem the first is rendered; the others only if it turns out to be unusable.
        first: dict[object, _Candidate] = {}
        for candidate in candidates:
            if candidate is not None and candidate.early_reason() is None:
                first.setdefault(candidate.row if candidate.collector.keeps_duplicates else candidate.digest, candidate)
        results = render(list(first.values()))
        for candidate in candidates:
            for collector in collectors:
                collector.report.rows_read += not collector.full()
            if candidate is None or candidate.collector.full():
                continue
            row, problem, digest, collector = candidate
            found: PreparedProblem | str = candidate.early_reason() or results.get(row) or render([candidate])[row]
            result = Dropped(*problem.place, found, problem.problem[:80]) if isinstance(found, str) else found
            collector.count(digest, result)
            yield collector, result
        on_progress()


def _candidate(row: int, problem: Problem, collectors: Sequence[Collector], selection: Selection) -> _Candidate | None:
    digest = problem_digest(problem.problem)
    split = selection.split(row, digest)
    for collector in collectors:
        if collector.wanted.splits is None or split in collector.wanted.splits:
            return _Candidate(row, problem, digest, collector)
    return None


def _render(
    candidates: Sequence[_Candidate],
    selection: Selection,
    renderer: PromptRenderer,
    usable: Callable[..., list[bool]] | None,
) -> dict[int, PreparedProblem | str]:
    """Return, by row, the rendered problems, or the reasons why they are dropped."""
    results: dict[int, PreparedProblem | str] = dict.fromkeys(_unusable(candidates, usable), "unusable")
    for row, problem, *_ in candidates:
        if renderer.holds_special_tokens(problem.problem, problem.solution, problem.answer, problem.context):
            results.setdefault(row, "special_tokens")
    left = [(c.row, c.problem) for c in candidates if c.row not in results]
    problems = [problem.problem for _, problem in left]
    contexts = [privileged_context(renderer.config, p.solution, p.answer, p.context) for _, p in left]
    prompts = zip(left, renderer.students(problems), renderer.teachers(problems, contexts), strict=True)
    for (row, problem), student, teacher in prompts:
        if reason := _defect(student, selection.max_prompt_tokens, renderer):
            results[row] = f"prompt_{reason}"
        else:
            defect = _defect(teacher, selection.max_privileged_tokens, renderer) if teacher else "no_context"
            results[row] = PreparedProblem(problem, student, [] if defect else teacher, defect)
    return results


def _unusable(candidates: Sequence[_Candidate], usable: Callable[..., list[bool]] | None) -> list[int]:
    """Return the rows whose reference answers the verifier cannot use."""
    labelled = [c for c in candidates if c.collector.wanted.labelled]
    if usable is None or not labelled:
        return []
    columns: dict[str, list[Any]] = {"prompts": [c.problem.problem for c in labelled]}
    columns |= {name: [c.problem.extra[name] for c in labelled] for name in labelled[0].problem.extra}
    verdicts = usable([c.problem.answer for c in labelled], **columns)
    return [c.row for c, verdict in zip(labelled, verdicts, strict=True) if not verdict]


def _defect(ids: Sequence[int], limit: int, renderer: PromptRenderer) -> str | None:
    if len(ids) > limit:
        return "too_long"
    return None if renderer.is_closed(ids) else "merged"


@contextmanager
def show_progress(collectors: Sequence[Collector]) -> Iterator[Callable[[], None]]:
    """Show on standard error how far a preparation is: a bar in a terminal, elsewhere a line every 15 seconds.

    Yields:
        The function that tells that the collectors' reports have changed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    reports, wanted = [c.report for c in collectors], [c.wanted.num_problems for c in collectors]
    total = None if None in wanted else sum(number or 0 for number in wanted)
    title = f"Preparing {reports[0].source}"
    counts = TextColumn("problems, {task.fields[rows]:,} rows read,")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), counts, TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, rows=0)
        started = last = time.monotonic()

        def update() -> None:
            nonlocal last
            kept, rows = sum(report.kept for report in reports), max(report.rows_read for report in reports)
            progress.update(task, completed=kept, rows=rows)
            now = time.monotonic()
            if not console.is_terminal and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                goal = "" if total is None else f" of {total:,}"
                line = f"{title}: {kept:,}{goal} problems, {rows:,} rows read in {now - started:.0f} s"
                dropped = sum((Counter(report.dropped) for report in reports), Counter())
                if dropped and not kept:  # an endless source would be read forever
                    ((reason, number),) = dropped.most_common(1)
                    line += f"; {number:,} dropped: {DROP_REASONS[reason]}"
                print(line, file=sys.stderr, flush=True)

        yield update


def report_table(reports: Sequence[PreparationReport]) -> Table:
    """Return what happened to every row, as one table."""
    from rich.table import Table

    table = Table(title="Data preparation", title_justify="left")
    for name in ("problems for", "rows of", "what"):
        table.add_column(name)
    table.add_column("count", justify="right")
    for report in reports:
        for position, (what, number) in enumerate(report.table()):
            table.add_row(*(("", "") if position else (report.name, report.source)), what, f"{number:,}")
        table.add_section()
    return table
