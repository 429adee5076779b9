"""Runs mutations in copies of the tree, each in a process forked from one that has imported the libraries."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mutations.mutation import Mutation, applied

__all__ = ["ROOT", "Results", "check_unchanged", "run"]

ROOT = Path(__file__).parents[2]
#: What a copy of the tree holds. Data that tests make stay out, and so do caches.
PARTS = ("hdpo", "tests", "configs", "docs", "notebooks", "pyproject.toml", "README.md", "Makefile")
#: Imported once, before any process is forked. Nothing of this project is among them, and nothing that starts threads.
LIBRARIES = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "lightning.pytorch.cli",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "torchmetrics",
    "hypothesis",
    "scipy.stats",
)
#: Which tests are run.
MARKS = "not vllm"
#: Seconds until a test, or all of a mutation's tests, count as hanging; hanging is noticing.
TEST_SECONDS, MUTATION_SECONDS = 180, 900


class Results:
    """What became of mutations, as JSON lines; of several lines about one mutation the last counts.

    Args:
        path: the file; what it holds is not run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, mutation: Mutation, status: str, **more: Any) -> dict[str, Any]:
        """Write a line; returns it."""
        row = {"key": mutation.key, "status": status, **more}
        row |= {"file": mutation.file, "old": mutation.old, "new": mutation.new}
        self.rows[mutation.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row


@dataclass
class _Slot:
    """A copy of the tree, and the process that runs tests in it."""

    folder: Path
    mutation: Mutation | None = None
    unchanged: str = ""
    process: int = 0
    started: float = 0.0
    #: Modification times in whole seconds name compiled files: each mutation gets a second of its own.
    clock: int = field(default_factory=lambda: int(time.time()) + 1000)

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    def fill(self) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache", ".hypothesis")
        self.tree.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, self.tree / part, ignore=ignored, symlinks=True)
            elif (ROOT / part).exists():
                shutil.copy2(ROOT / part, self.tree / part)

    def write(self, text: str) -> None:
        assert self.mutation is not None
        path = self.tree / self.mutation.file
        self.clock += 1
        path.write_text(text, encoding="utf-8")
        os.utime(path, (self.clock, self.clock))

    def start(self, mutation: Mutation | None, tests: Sequence[str]) -> None:
        self.mutation, self.started = mutation, time.monotonic()
        if mutation is not None:
            self.unchanged = (self.tree / mutation.file).read_text(encoding="utf-8")
            self.write(applied(mutation, self.tree))
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            _tests_in_this_process(self.folder, tests)

    def ended(self) -> dict[str, Any] | None:
        """What became of it; None while it runs."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() - self.started > MUTATION_SECONDS
        if not process and not late:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if not process:
            os.waitpid(self.process, 0)
        if self.mutation is not None:
            self.write(self.unchanged)
        seconds = round(time.monotonic() - self.started, 1)
        code = os.waitstatus_to_exitcode(status) if process else 1
        found = (self.folder / "failed").read_text() if (self.folder / "failed").exists() else ""
        if late:
            found = "too slow"
        how = "broken" if found == _NOT_COLLECTED else {0: "survived", 1: "killed"}.get(code, "broken")
        self.process = 0
        return {"status": how, "by": found, "seconds": seconds}

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


_NOT_COLLECTED = "tests cannot be collected"


class _FirstFailure:
    """Pytest plugin: writes down which test noticed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:  # what cannot even be imported shows nothing about the tests
            self.path.write_text(_NOT_COLLECTED)


def _tests_in_this_process(folder: Path, tests: Sequence[str]) -> None:
    """Body of a forked process: run tests against the copy of the tree, and end."""
    code = 70
    try:
        os.setsid()
        tree = folder / "tree"
        with (folder / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        (folder / "failed").unlink(missing_ok=True)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        (folder / "tmp").mkdir(exist_ok=True)
        sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, tree))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "hdpo")]:
            del sys.modules[name]
        import hdpo

        assert Path(hdpo.__file__).is_relative_to(tree), hdpo.__file__
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", MARKS, "-W", "ignore"]
        options += [f"--timeout={TEST_SECONDS}", f"--basetemp={folder / 'tmp' / 'pytest'}"]
        code = int(pytest.main([*options, *tests], plugins=[_FirstFailure(folder / "failed")]))
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def _import_libraries() -> None:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTEST_ADDOPTS="")
    for name in LIBRARIES:
        importlib.import_module(name)


def _slots(number: int, folder: Path) -> list[_Slot]:
    slots = []
    for i in range(number):
        (folder / str(i)).mkdir()
        slots.append(_Slot(folder / str(i)))
        slots[-1].fill()
    return slots


def _outcomes(
    jobs: Iterable[tuple[Mutation | None, Sequence[str]]], slots: list[_Slot]
) -> Iterator[tuple[Mutation | None, Sequence[str], dict[str, Any], str]]:
    """Keep all slots busy; yields what ends, as it ends."""
    waiting, running = iter(jobs), {}
    free = list(slots)
    while True:
        while free and (job := next(waiting, None)) is not None:
            slot = free.pop()
            slot.start(*job)
            running[id(slot)] = slot, job[1]
        if not running:
            return
        time.sleep(0.05)
        for slot, tests in list(running.values()):
            outcome = slot.ended()
            if outcome is not None:
                del running[id(slot)]
                free.append(slot)
                yield slot.mutation, tests, outcome, slot.log()


def run(mutations: Sequence[Mutation], results: Results, jobs: int = 1) -> None:
    """Run mutations, and write and print what becomes of each.

    Args:
        mutations: those that the results hold are left out.
        results: where it is written.
        jobs: processes at the same time.
    """
    left = [m for m in mutations if m.key not in results.rows]
    for mutation in left:
        if mutation.equivalent:
            results.add(mutation, "equivalent", by=mutation.equivalent)
    left = [m for m in left if not m.equivalent]
    _import_libraries()
    with tempfile.TemporaryDirectory(prefix="hdpo-mutations-") as folder:
        slots = _slots(jobs, Path(folder))
        for done, (mutation, _, outcome, log) in enumerate(_outcomes([(m, m.tests) for m in left], slots), 1):
            assert mutation is not None
            results.add(mutation, **outcome)
            text = f"{mutation.file}: {mutation.old!r} -> {mutation.new!r}"
            print(
                f"[{done}/{len(left)}] {outcome['status']} ({outcome['by']}, {outcome['seconds']} s) {text}", flush=True
            )
            if outcome["status"] == "broken":
                print(log, flush=True)


def check_unchanged(tests: Sequence[str], jobs: int = 1) -> list[str]:
    """Run test files on the tree as it is; returns those that fail, with what they printed."""
    _import_libraries()
    with tempfile.TemporaryDirectory(prefix="hdpo-mutations-") as folder:
        slots = _slots(jobs, Path(folder))
        outcomes = list(_outcomes([(None, [test]) for test in tests], slots))
    return [f"{test}\n{log}" for _, (test,), outcome, log in outcomes if outcome["status"] != "survived"]
