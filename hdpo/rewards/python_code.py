"""Grades Python programs by unit tests, in processes that are killed when they overrun and have no network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from hdpo.errors import ConfigError, check_at_least, check_positive
from hdpo.rewards import program_main
from hdpo.rewards.base import Grade, Outcome, PendingGrades, check_pairs
from hdpo.rewards.worker_verifier import WorkerVerifier

_log = logging.getLogger(__name__)
_FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "python3", "py")
# The deadline of the worker that waits for the program: long after the program's own.
_MARGIN = 10.0


class PythonCodeGrader:
    """Runs programs one at a time, each in a process of its own; see :class:`PythonCodeVerifier` for the arguments."""

    def __init__(self, program_timeout: float, program_memory: float) -> None:
        self._timeout, self._memory = program_timeout, program_memory

    def grade(self, program: str, tests: str) -> Grade:
        """Run a program and its tests. What the program does wrong is its fault, a missed deadline too."""
        token = secrets.token_hex(16)
        request = {"program": program, "tests": tests, "token": token, "memory_limit": self._memory}
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                [sys.executable, "-I", "-B", program_main.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=folder,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            ) as process,
        ):
            try:
                output, _ = process.communicate(json.dumps(request), timeout=self._timeout)
            except subprocess.TimeoutExpired:
                return Grade(Outcome.WRONG, 0.0, f"not finished within {self._timeout:g} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        started, *reply = output.splitlines() or [""]
        if started != "started":
            return Grade(Outcome.ERROR, 0.0, "the program's process did not start")
        if len(reply) != 1 or json.loads(reply[0])[0] != token:
            return Grade(Outcome.WRONG, 0.0, "the program ended before its tests")
        _, passed, detail = json.loads(reply[0])
        return Grade(Outcome.CORRECT, 1.0) if passed else Grade(Outcome.WRONG, 0.0, detail)


class PythonCodeVerifier(WorkerVerifier):
    """Runs the last fenced block of Python of each completion against the problem's unit tests.

    It is the last that is named ``python`` (or ``py``), and where there is none, the last without a name.

    A program is correct if the tests, statements such as ``assert f(2) == 4``, run through after it. One that fails, is
    killed at its deadline or by its memory limit, or exits early is wrong. :mod:`hdpo.rewards.program_main` says what
    it can and cannot do; where there is no network namespace for it, a warning says so once.

    A program shares its process with its tests. A policy could learn to return objects that equal everything, or to
    look for the verdict in the frames above it: let tests check types too, and read what is rewarded.

    Args:
        tests: column with the problem's tests, a string or a list of strings; null: the reference answer holds them.
        program_timeout: seconds that a program and its tests may take.
        program_memory: address space of a program in GiB; enforced on Linux.
        batch_timeout: seconds that the programs of one call may take together; null for no limit.
        num_workers: number of programs that run at the same time.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        tests: str | None = "tests",
        program_timeout: float = 5.0,
        program_memory: float = 2.0,
        batch_timeout: float | None = 600.0,
        num_workers: int = 2,
    ) -> None:
        check_positive(verifier__program_timeout=program_timeout)
        check_at_least(0.1, verifier__program_memory=program_memory)
        super().__init__(num_workers, program_timeout + _MARGIN, batch_timeout)
        self.tests = tests
        self.program_timeout = program_timeout
        self.program_memory = program_memory

    def _grader(self) -> tuple[str, dict[str, Any]]:
        check = f"import runpy; exit(not runpy.run_path({program_main.__file__!r})['leave_network']())"
        if subprocess.run([sys.executable, "-I", "-c", check], check=False).returncode:
            _log.warning("no network namespace here: only Python's audit hook keeps graded programs from the network")
        arguments = {"program_timeout": self.program_timeout, "program_memory": self.program_memory}
        return f"{__name__}:{PythonCodeGrader.__name__}", arguments

    def _tests(self, references: Sequence[str | None], columns: dict[str, Sequence[Any]]) -> list[str]:
        if self.tests is not None and self.tests not in columns:
            raise ConfigError(
                f"verifier.tests: there is no column {self.tests!r}: name it in data.source.columns.extra"
            )
        values = references if self.tests is None else columns[self.tests]
        return [v if isinstance(v, str) else "\n".join(v or ()) for v in values]

    def submit(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> PendingGrades:
        """Begin to run the programs; see :meth:`WorkerVerifier.grade` for the errors."""
        check_pairs(completions, references, **columns)
        return self._pending([_item(c, t) for c, t in zip(completions, self._tests(references, columns), strict=True)])

    def usable(self, references: Sequence[str | None], **columns: Sequence[Any]) -> list[bool]:
        """Whether each problem has tests, and they are Python."""
        return [_compiles(tests) for tests in self._tests(references, columns)]


def _item(completion: str, tests: str) -> Grade | tuple[str, str, str]:
    fenced = _FENCE.findall(completion.replace("\r\n", "\n"))
    programs = [code for language, code in fenced if language.strip().lower() in _PYTHON]
    # Beside a block that says that it is Python, one without a name is what the program prints.
    blocks = programs or [code for language, code in fenced if not language.strip()]
    if not _compiles(tests):
        return Grade(Outcome.INVALID_REFERENCE, 0.0, "the problem has no tests, or they are not Python")
    return ("grade", blocks[-1], tests) if blocks else Grade(Outcome.NO_ANSWER, 0.0, "no fenced block of code")


def _compiles(tests: str) -> bool:
    try:
        return bool(compile(tests, "tests", "exec").co_names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
