"""Worker processes with a deadline for each request: killed when it passes, replaced when they die.

One thread drives one worker, one request at a time. The threads only wait: they use no signals, so that they work
wherever the trainer calls from, and nothing that a worker computes can hold up the trainer or another worker. They are
daemons, which those of a ``ThreadPoolExecutor`` are not: a program that ends does not wait for answers.

One request at a time, and not a batch: a deadline then belongs to exactly one answer, an answer never waits behind
another's deadline while a worker is free, and N answers that never end take ``ceil(N / num_workers) * timeout`` and no
more. A round trip costs a few percent of an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from hdpo.errors import first_line
from hdpo.rewards.base import Grade, Outcome, VerifierError

# Loading sympy takes a third of a second from a warm disk and can take minutes from a shared file system.
_START_TIMEOUT = 300.0
# A worker that started once may fail to start again while the machine is short of memory or processes.
_RESTART_ATTEMPTS = 5
_RESTART_PAUSE = 1.0
# `-P` keeps files in the working directory from shadowing modules; what the trainer can import, the worker can too.
_BOOT = (
    "import json, sys; options = json.loads(sys.argv[1]); "
    "sys.path += [p for p in options['path'] if p not in sys.path]; "
    "from hdpo.rewards.worker_main import main; main(options)"
)


class Worker:
    """One process and the socket to it.

    Must be created by a thread that lives as long as the worker is needed: Linux ends the process with that thread.

    Args:
        options: ``grader``, ``grader_args``, ``timeout`` and ``memory_limit``; see :func:`worker_main.main`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._socket, theirs = socket.socketpair()
        start = options | {
            "socket": theirs.fileno(),
            "parent": os.getpid(),
            "path": [path or os.getcwd() for path in sys.path],
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(start)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                # The order in which sympy visits sets, and with it the work that it does, depends on string hashes.
                env={**os.environ, "PYTHONHASHSEED": "0"},
                # Out of the terminal's process group: Ctrl-C is for the trainer.
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait for the end of the worker's imports.

        Raises:
            VerifierError: it does not start; with the last line that it wrote.
        """
        try:
            self._receive(time.monotonic() + _START_TIMEOUT)
        except (OSError, EOFError) as error:
            death = self._death()
            self._stderr.seek(0)
            lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
            late = isinstance(error, TimeoutError)
            self.kill()
            reason = f"not ready after {_START_TIMEOUT:.0f} s" if late else (lines or [death])[-1]
            raise VerifierError(f"the answer checker's worker process does not start: {reason}") from None

    def ask(self, request: bytes, seconds: float) -> tuple[Grade, bool]:
        """Return the grade for one pickled request, and whether the worker is of no more use."""
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(pickle.dumps(request))
            outcome, reward, detail, parts, retires = self._receive(deadline)
            grade = Grade(Outcome(outcome), reward, detail, parts)
        except TimeoutError:
            return Grade(Outcome.TIMEOUT, 0.0, f"not graded within {seconds:.3g} s"), True
        except (OSError, EOFError):
            return Grade(Outcome.ERROR, 0.0, self._death()), True
        except ValueError as error:  # not what `worker_main` writes: a grader got hold of the socket
            return Grade(Outcome.ERROR, 0.0, f"the worker's reply cannot be read: {first_line(error)}"), True
        return grade, retires

    def _receive(self, deadline: float) -> Any:
        line = bytearray()
        while not line.endswith(b"\n"):
            # A reply that is there counts, however late this thread gets to look at it.
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(1 << 16)
            if not part:
                raise EOFError
            line += part
        return json.loads(line)

    def _death(self) -> str:
        """Say how a process ended whose socket is closed."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the worker closed its socket"
        return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit status {code}"

    def kill(self) -> None:
        """End the process and reap it; may be called again."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._socket.close()
        self._stderr.close()


class _Budget:
    """Seconds that a batch may take, from the moment its first request is taken up; None for no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def remaining(self) -> float:
        if self._seconds is None:
            return float("inf")
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        return self._end - time.monotonic()


def _failure(error: BaseException) -> VerifierError:
    """Return what those who wait are told; an OSError is too many processes, files, or too little memory."""
    if isinstance(error, VerifierError):
        return error
    what = "'s worker process does not start" if isinstance(error, OSError) else " failed"
    return VerifierError(f"the answer checker{what}: {type(error).__name__}: {error}")


class _Task(NamedTuple):
    future: Future[Grade]
    request: bytes
    budget: _Budget


class WorkerPool:
    """Grades requests in ``num_workers`` processes, in the order of their submission.

    Attributes:
        respawns: number of workers that were replaced.
    """

    def __init__(self, options: dict[str, Any], num_workers: int) -> None:
        self.options = options
        self.respawns = 0
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # Reentrant, as the garbage collector may close the pool in the middle of any statement.
        self._lock = threading.RLock()
        self._error: VerifierError | None = None
        self._closed = False
        self._workers: dict[int, Worker] = {}
        self._ready: list[Future[None]] = [Future() for _ in range(num_workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"hdpo-verifier-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[bytes], budget: float | None = None) -> list[Future[Grade]]:
        """Queue pickled requests ``(method, *arguments)`` and return at once.

        Args:
            requests: they are taken up in this order.
            budget: seconds that all of them may take together; what is not graded by then ends as ``TIMEOUT``.
        """
        clock = _Budget(budget)
        tasks = [_Task(Future(), request, clock) for request in requests]
        with self._lock:
            for task in tasks:
                if self._error is None:
                    self._tasks.put(task)
                else:
                    task.future.set_exception(self._error)
        return [task.future for task in tasks]

    def wait_ready(self) -> None:
        """Wait until all workers have started; raises :class:`VerifierError` if one cannot."""
        for ready in self._ready:
            ready.result()

    def close(self) -> None:
        """Kill all workers and end the threads. Grades that are missing become a VerifierError. Idempotent."""
        with self._lock:
            self._closed = True
            self._fail(VerifierError("the verifier was closed before all answers were graded"))
            # Their threads then read an end of file, and reap them.
            for worker in self._workers.values():
                worker.process.kill()
        # The garbage collector may run this in one of the threads, which then end after it.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def abandon(self) -> None:
        """In a forked child: close the parent's sockets, and leave its processes alone."""
        for worker in self._workers.values():
            worker.process.returncode = 0  # not this process's child: Popen must not wait for it
            worker.close()

    def _fail(self, error: VerifierError) -> None:
        """Give up on all that is queued, and end the threads."""
        with self._lock:
            self._error = self._error or error
            with contextlib.suppress(queue.Empty):
                while True:
                    if (task := self._tasks.get_nowait()) is not None:
                        task.future.set_exception(self._error)
            for ready in self._ready:
                if not ready.done():
                    ready.set_exception(self._error)
            for _ in self._threads:
                self._tasks.put(None)

    def _serve(self, slot: int) -> None:
        """Body of a thread: feed one worker until the pool ends."""
        try:
            self._start_worker(slot)
            with self._lock:
                if not self._ready[slot].done():
                    self._ready[slot].set_result(None)
            while (task := self._tasks.get()) is not None:
                self._grade(slot, task)
        except BaseException as error:  # whoever waits must not wait forever
            self._fail(_failure(error))
            if not isinstance(error, VerifierError | OSError):
                raise
        finally:
            if slot in self._workers:
                self._workers[slot].kill()

    def _start_worker(self, slot: int) -> None:
        with self._lock:
            if self._closed:
                raise VerifierError("the verifier was closed")
            worker = self._workers[slot] = Worker(self.options)
        worker.wait_ready()

    def _replace_worker(self, slot: int) -> None:
        for _ in range(_RESTART_ATTEMPTS - 1):
            try:
                return self._start_worker(slot)
            except (VerifierError, OSError):
                if self._closed:
                    raise
                time.sleep(_RESTART_PAUSE)
        return self._start_worker(slot)

    def _discard_worker(self, slot: int) -> None:
        self._workers[slot].kill()
        with self._lock:
            self.respawns += 1

    def _grade(self, slot: int, task: _Task) -> None:
        seconds = task.budget.remaining()
        try:
            if seconds <= 0:
                grade, broken = Grade(Outcome.TIMEOUT, 0.0, "the batch's time was used up"), False
            else:
                if self._workers[slot].process.poll() is not None:  # between two answers: neither of them did it
                    self._discard_worker(slot)
                    self._replace_worker(slot)
                grade, broken = self._workers[slot].ask(task.request, min(seconds, self.options["timeout"]))
            if self._closed:
                raise VerifierError("the verifier was closed before all answers were graded")
            if broken:
                self._discard_worker(slot)
        except BaseException as error:
            task.future.set_exception(_failure(error))
            raise
        task.future.set_result(grade)
        if broken:
            self._replace_worker(slot)
