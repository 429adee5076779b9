"""What verifiers that grade in worker processes have in common."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from hdpo.errors import check_at_least, check_positive
from hdpo.rewards.base import Grade, Outcome, PendingGrades, Verifier
from hdpo.rewards.workers import WorkerPool

_MIN_MEMORY = 0.5


class WorkerVerifier(Verifier):
    """A verifier whose answers are graded by a class in worker processes.

    Each answer has a deadline of its own, kept by killing the worker that misses it, in any thread, under any launcher,
    in notebooks and in scripts without an ``if __name__`` guard. Equal requests of a batch are graded once. Workers
    start at the first use, end with :meth:`close` or with this process, and import nothing of the trainer.

    A batch takes at most ``batch_timeout`` seconds from the moment its first answer is taken up, plus the start of a
    worker that has to be replaced at the end of it; answers that were not graded by then end as ``TIMEOUT``.

    Args:
        num_workers: number of worker processes.
        timeout: seconds that an answer may take.
        batch_timeout: seconds that the answers of one call may take together; null for no limit.
        memory_limit: address space of a worker in GiB, at least 0.5; null for no limit. Enforced on Linux.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout: float = 5.0,
        batch_timeout: float | None = 60.0,
        memory_limit: float | None = 4.0,
    ) -> None:
        check_at_least(1, verifier__num_workers=num_workers)
        check_positive(verifier__timeout=timeout, verifier__batch_timeout=batch_timeout)
        check_at_least(_MIN_MEMORY, verifier__memory_limit=memory_limit)
        self.num_workers = num_workers
        self.timeout = timeout
        self.batch_timeout = batch_timeout
        self.memory_limit = memory_limit
        self._disconnect()

    @abstractmethod
    def _grader(self) -> tuple[str, dict[str, Any]]:
        """Return what the workers run: ``module:Name`` of a class, and its keyword arguments (plain JSON)."""

    @property
    def respawns(self) -> int:
        """Number of workers that were replaced so far."""
        return self._past_respawns + (self._pool.respawns if self._pool else 0)

    def _disconnect(self) -> None:
        """Be as if never started, with a new lock: that of another process may be held forever."""
        self._lock = threading.RLock()
        self._pool: WorkerPool | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._past_respawns = 0
        _INSTANCES.add(self)

    def _running(self) -> WorkerPool:
        with self._lock:
            if self._pool is None:
                grader, grader_args = self._grader()
                limits = {"timeout": self.timeout, "memory_limit": self.memory_limit}
                self._pool = WorkerPool({"grader": grader, "grader_args": grader_args, **limits}, self.num_workers)
                # Also ends the workers when the verifier is garbage, and at the interpreter's exit.
                self._finalizer = weakref.finalize(self, self._pool.close)
            return self._pool

    def _ask(self, items: Sequence[Any], budget: float | None) -> list[Any]:
        """Hand the tuples among the items, ``(method, *arguments)``, to the workers; each becomes a future grade."""
        requests = [pickle.dumps(item) if isinstance(item, tuple) else item for item in items]
        distinct = list(dict.fromkeys(request for request in requests if isinstance(request, bytes)))
        futures = dict(zip(distinct, self._running().submit(distinct, budget), strict=True)) if distinct else {}
        return [futures[request] if isinstance(request, bytes) else request for request in requests]

    def _pending(self, items: Sequence[Grade | tuple[Any, ...]]) -> PendingGrades:
        """Return the grades of items: themselves, or the workers' to those that are requests."""
        return PendingGrades(self._ask(items, self.batch_timeout), self)

    def _usable(self, items: Sequence[bool | tuple[Any, ...]]) -> list[bool]:
        """Return items, or the workers' answers to them. Without a budget: no problem is lost because of others."""
        answers = self._ask(items, None)
        return [a if isinstance(a, bool) else a.result().outcome is Outcome.CORRECT for a in answers]

    def grade(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence[Any]) -> list[Grade]:
        """Grade completions against their references; see :meth:`Verifier.grade`.

        Raises:
            TypeError: an element is not a string.
            ValueError: the numbers of completions, references and values of a column differ.
            VerifierError: the workers cannot start, or the verifier was closed meanwhile.
        """
        return self.submit(completions, references, **columns).result()

    def identity(self) -> dict[str, Any]:
        """Return the default without what only decides how fast verdicts come."""
        identity = super().identity()
        for name in ("num_workers", "batch_timeout"):
            del identity["settings"][name]
        return identity

    def start(self) -> None:
        """Start all workers and wait until they are ready.

        Raises:
            VerifierError: they cannot start, for example because math-verify is not installed.
        """
        self._running().wait_ready()

    def close(self) -> None:
        """End all workers. Grades that are still pending fail; the next use starts anew."""
        with self._lock:
            self._past_respawns = self.respawns
            finalizer, self._pool, self._finalizer = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def _abandon(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        if self._pool is not None and self._finalizer is not None:
            self._finalizer.detach()
            self._pool.abandon()
        self._disconnect()

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process has the settings, and starts workers of its own.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._disconnect()


_INSTANCES: weakref.WeakSet[WorkerVerifier] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for verifier in list(_INSTANCES):
        verifier._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
