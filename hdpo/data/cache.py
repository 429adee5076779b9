"""Prepared problem sets on disk: memory-mapped Arrow files, named by a hash of all that their content depends on.

A set of key K is ``K.arrow`` (the problems), ``K.dropped.jsonl`` (every row that was left out, and why) and ``K.json``
(fingerprint, checksum and report), which is written last: without it there is no set. A preparation that is killed
leaves nothing that looks finished; it is started over, but sets that were complete are kept.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.data.batches import ProblemDataset
from hdpo.data.config import ProblemSet, Selection, SourceConfig
from hdpo.data.preparation import (
    Collector,
    Dropped,
    PreparationReport,
    PreparedProblem,
    prepare,
    problem_digest,
    report_table,
    show_progress,
)
from hdpo.data.sources import PYTHON, Source
from hdpo.errors import ConfigError, first_line
from hdpo.files import whole_file, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hdpo.data.prompts import PromptRenderer
    from hdpo.rewards import Verifier

DROPPED = "dropped.jsonl"

_log = logging.getLogger(__name__)


def hash_of(parts: Any) -> str:
    """Return a short hash of plain containers (what JSON can hold); the order of keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def source_fingerprint(source: Source) -> dict[str, Any]:
    """Return what the rows of a source depend on: files by name, size and time, Python functions by code.

    A ``python:`` function is represented by its keyword arguments and by every Python file in its module's folder. A
    hub data set is represented by its id and revision, which are part of its configuration.
    """
    parts: dict[str, Any] = {}
    if source.config.path.startswith(PYTHON):
        module = inspect.getmodule(source.python_function())
        if module is not None and module.__file__ is not None:
            parts["code"] = _hash_python(Path(module.__file__).parent)
        return parts
    files = source.local_files()
    if files is not None:
        parts["files"] = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return parts


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer carries the padding and truncation of its last call; they are no part of what it is.
    model = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for transient in ("padding", "truncation"):
        model.pop(transient, None)
    return hash_of([model, sorted(map(str, tokenizer.all_special_tokens))])


def _hash_python(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


class ProblemCache:
    """Problem sets on demand: from disk, else prepared by one process while the others wait.

    Args:
        folder: where they are kept.
        selection: which rows become problems.
        renderer: renders their prompts.
        verifier: tells which reference answers are usable; None keeps all.

    Raises:
        ConfigError: the folder cannot be created.
    """

    def __init__(self, folder: str, selection: Selection, renderer: PromptRenderer, verifier: Verifier | None) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: cannot create {self.folder}: {error.strerror}") from error
        self.selection = selection
        self.renderer = renderer
        self.verifier = verifier

    def keys(self, sets: Sequence[ProblemSet]) -> dict[str, str]:
        """Return, by name, the hashes of everything that the problem sets depend on.

        Args:
            sets: in an order in which each set comes after those that it holds out.
        """
        common = {
            "selection": {name: v for name, v in asdict(self.selection).items() if not name.startswith("num_")},
            "prompts": asdict(self.renderer.config),
            "chat_template": self.renderer.chat_template,  # the text, where the configuration names a file
            "tokenizer": tokenizer_fingerprint(self.renderer.tokenizer),
            "verifier": None if self.verifier is None else self.verifier.identity(),
            "code": _hash_python(Path(__file__).parent),
            "libraries": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        }
        keys: dict[str, str] = {}
        for wanted in sets:
            config = wanted.source
            own = {
                "source": {f.name: getattr(config, f.name) for f in fields(SourceConfig)},
                "content": source_fingerprint(Source(config, wanted.key)),
                "set": [wanted.num_problems, wanted.splits, wanted.labelled],
                "held_out": [keys[name] for name in wanted.held_out],
            }
            keys[wanted.name] = hash_of(common | own)
        return keys

    def load(self, sets: Sequence[ProblemSet]) -> dict[str, ProblemDataset]:
        """Return problem sets by name; prepare those that are not on disk.

        Args:
            sets: in an order in which each set comes after those that it holds out.

        Raises:
            ConfigError: a source that cannot be read, or nothing left of it.
        """
        keys = self.keys(sets)
        found = self._read_all(sets, keys)
        if len(found) < len(sets):
            with self._lock():
                found = self._read_all(sets, keys, warn=True)  # another process may have prepared them meanwhile
                for _, group in groupby(sets, key=lambda wanted: wanted.key):
                    missing = [wanted for wanted in group if wanted.name not in found]
                    if missing:
                        with self._disk_errors():
                            self._prepare(missing, keys, found)
                        found |= self._read_all(missing, keys, warn=True)
        for wanted in sets:
            report = found[wanted.name].report
            if not report.kept:
                counts = ", ".join(f"{what}: {number:,}" for what, number in report.table())
                advice = f"what was dropped stands in {self._path(keys[wanted.name], DROPPED)}"
                if not report.dropped:
                    advice = "give more rows, another fraction in data.selection, or a source of its own"
                raise ConfigError(
                    f"{wanted.key}: no {wanted.name} problem is left of {report.source} ({counts}); {advice}"
                )
        return found

    def _read_all(
        self, sets: Sequence[ProblemSet], keys: dict[str, str], *, warn: bool = False
    ) -> dict[str, ProblemDataset]:
        import pyarrow

        found = {}
        for name, key in ((wanted.name, keys[wanted.name]) for wanted in sets):
            if not self._path(key, "json").exists():
                continue
            try:
                found[name] = self._read(name, key)
            except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
                if warn:
                    path, reason = self._path(key, "arrow"), first_line(error)
                    _log.warning("the cached data %s cannot be used (%s) and is prepared again", path, reason)
        return found

    def _path(self, key: str, ending: str) -> Path:
        return self.folder / f"{key}.{ending}"

    def _read(self, name: str, key: str) -> ProblemDataset:
        import pyarrow

        meta = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
        path = self._path(key, "arrow")
        if (meta["key"], meta["sha256"]) != (key, _checksum(path)):
            raise ValueError("its content is not what was written")
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        # Under another name where two sets are the same problems.
        return ProblemDataset(table, PreparationReport(**meta["report"] | {"name": name}), meta["fingerprint"])

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            reason = os.strerror(error.errno)
            raise ConfigError(f"data.cache_dir: cannot write to {self.folder}: {reason}") from error

    def _lock(self) -> AbstractContextManager[Any]:
        """One process prepares while the others wait; a killed process gives the lock back."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / "prepare.lock")
        try:
            return lock.acquire(timeout=1)
        except Timeout:
            _log.warning("waiting for another process that prepares data in %s", self.folder)
            return lock.acquire()

    def _prepare(self, sets: Sequence[ProblemSet], keys: dict[str, str], found: dict[str, ProblemDataset]) -> None:
        """Go through the source that the sets have in common, and write them."""
        from rich.console import Console

        source = Source(sets[0].source, sets[0].key)
        held_out = {name: set(map(problem_digest, found[name].column("problem"))) for s in sets for name in s.held_out}
        collectors = [Collector(s, self.selection, set().union(*(held_out[n] for n in s.held_out))) for s in sets]
        reports = [collector.report for collector in collectors]
        with ExitStack() as stack:
            writers = {r.name: stack.enter_context(self._writer(keys[r.name], r)) for r in reports}
            update = stack.enter_context(show_progress(collectors))
            usable = None if self.verifier is None else self.verifier.usable
            for collector, result in prepare(
                source, collectors, self.selection, self.renderer, usable=usable, on_progress=update
            ):
                writers[collector.report.name].add(result)
        console = Console(stderr=True)
        console.print(report_table(reports))
        for report in reports:
            if report.dropped:
                console.print(f"dropped for {report.name}: {self._path(keys[report.name], DROPPED)}", soft_wrap=True)

    @contextmanager
    def _writer(self, key: str, report: PreparationReport) -> Iterator[_Writer]:
        for leftover in self.folder.glob(f".{key}.*.tmp"):  # of processes that were killed; the lock is ours
            leftover.unlink(missing_ok=True)
        with whole_file(self._path(key, DROPPED)) as dropped, whole_file(self._path(key, "arrow")) as problems:
            with _Writer(problems, dropped) as writer:
                yield writer
            meta = {
                "key": key,
                "sha256": _checksum(problems),
                "fingerprint": writer.fingerprint.hexdigest()[:24],
                "report": vars(report),
            }
        write_text(self._path(key, "json"), json.dumps(meta, indent=2) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer(ExitStack):
    """Streams the problems of one set to an Arrow file, and the rows that were dropped to JSON lines."""

    def __init__(self, problems: Path, dropped: Path) -> None:
        import pyarrow

        super().__init__()
        ids, text = pyarrow.list_(pyarrow.int32()), pyarrow.string()
        columns = dict.fromkeys(("problem", "answer", "solution", "source", "extra"), text)
        self._schema = pyarrow.schema(columns | {"prompt_ids": ids, "privileged_ids": ids})
        self._dropped = self.enter_context(dropped.open("w", encoding="utf-8"))
        self._table = self.enter_context(pyarrow.ipc.new_file(str(problems), self._schema))
        self._batch: list[dict[str, Any]] = []
        self.callback(self._flush)
        self.fingerprint = hashlib.sha256()

    def add(self, result: PreparedProblem | Dropped) -> None:
        if isinstance(result, Dropped):
            self._dropped.write(json.dumps(result._asdict()) + "\n")
            return
        problem, prompt_ids, privileged_ids, _ = result
        texts = problem._asdict() | {"extra": json.dumps(problem.extra)}
        self.fingerprint.update(problem_digest(problem.problem) + f"{problem.answer}\0{texts['extra']}\0".encode())
        self._batch.append(texts | {"prompt_ids": prompt_ids, "privileged_ids": privileged_ids})
        if len(self._batch) >= 1024:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        self._table.write_batch(pyarrow.RecordBatch.from_pylist(self._batch, schema=self._schema))
        self._batch = []
