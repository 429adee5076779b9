"""Grades answers with math-verify in processes that can be killed."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from hdpo.rewards.base import Grade, Outcome, PendingGrades, Verifier, check_pairs
from hdpo.rewards.extract import last_boxed
from hdpo.rewards.pool import Batch, WorkerPool
from hdpo.rewards.process import Verdict, WorkerOptions
from hdpo.rewards.shortcuts import Memory, plain_integers

__all__ = ["MathVerifier"]

_MIN_MEMORY = 0.5
_NOTHING = Verdict(Outcome.NO_ANSWER)


class MathVerifier(Verifier):
    r"""Grades final answers with math-verify (R(x, y) of the paper's section 2).

    Each answer has a deadline of its own, kept by killing the worker process that misses it. No signals are used, so
    that it works in any thread, under any launcher, in notebooks and in scripts without an ``if __name__`` guard. A
    batch in which n answers never end takes at most ``ceil(n / num_workers) * timeout`` seconds, plus the time of the
    others and a third of a second for each new worker.

    Equal pairs of answer and reference are graded once. In the ``strict`` profile pairs of plain integers need no
    worker at all, and the verdicts on the last 16,384 pairs are remembered, missed deadlines and failures excepted.
    Workers start at the first use, end with :meth:`close` or with this process, and do not import torch.

    Args:
        profile: ``strict``: the answer is the content of the completion's last ``\boxed{}``. ``nemo``: NeMo-RL's rule,
            which the paper used: the answer is searched in the whole completion, boxed or not.
        num_workers: number of worker processes.
        timeout: seconds that an answer may take.
        memory_limit: address space of a worker in GiB, at least 0.5; null for no limit. Enforced on Linux.

    Attributes:
        counters: completions graded so far by outcome, and ``respawns``, the number of workers that were replaced.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> with MathVerifier(num_workers=1) as verifier:
        ...     grades = verifier.grade([r"so it is \boxed{0.5}", r"\boxed{2}", "no idea"], [r"\frac{1}{2}"] * 3)
        >>> [(grade.outcome.value, grade.reward) for grade in grades]
        [('correct', 1.0), ('wrong', 0.0), ('no_answer', 0.0)]
    """

    grader: ClassVar[str] = "hdpo.rewards.math:MathGrader"
    """``module:Name`` of what the workers run; see :class:`hdpo.rewards.worker.Grader`."""

    def __init__(
        self,
        profile: Literal["strict", "nemo"] = "strict",
        num_workers: int = 2,
        timeout: float = 5.0,
        memory_limit: float | None = 4.0,
    ) -> None:
        super().__init__()
        if profile not in ("strict", "nemo"):
            raise ValueError(f"verifier.profile must be 'strict' or 'nemo', got {profile!r}")
        if num_workers < 1:
            raise ValueError(f"verifier.num_workers must be at least 1, got {num_workers}")
        if not (0 < timeout < math.inf):
            raise ValueError(f"verifier.timeout must be a positive number of seconds, got {timeout}")
        if memory_limit is not None and memory_limit < _MIN_MEMORY:
            raise ValueError(f"verifier.memory_limit must be at least {_MIN_MEMORY} (GiB) or null, got {memory_limit}")
        self.profile = profile
        self.num_workers = num_workers
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.counters["respawns"] = 0
        self._disconnect()

    def _disconnect(self) -> None:
        """Be as if never started, with new locks: those of another process may be held for ever."""
        self._lock = threading.RLock()
        self._pool: WorkerPool | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._memory = Memory()
        _INSTANCES.add(self)

    def _running(self) -> WorkerPool:
        with self._lock:
            if self._pool is None:
                options = WorkerOptions(self.grader, {"profile": self.profile}, self.timeout, self.memory_limit)
                self._pool = WorkerPool(options, self.num_workers, self.counters)
                # Also ends the workers when the verifier is garbage, and at the interpreter's exit.
                self._finalizer = weakref.finalize(self, self._pool.close)
            return self._pool

    def _answer(self, completion: str) -> str | None:
        """Return what the workers have to look at, or None where that is nothing."""
        answer = completion if self.profile == "nemo" else last_boxed(completion)
        return answer if answer and not answer.isspace() else None

    def submit(self, completions: Sequence[str], references: Sequence[str]) -> PendingGrades:
        """Begin to grade and return at once; the workers grade while the caller does something else.

        Raises:
            TypeError: an element is not a string.
            ValueError: the numbers of completions and references differ.
        """
        check_pairs(completions, references)
        requests: dict[tuple[str, str, str], int] = {}
        results: list[int | Verdict] = []
        for completion, reference in zip(completions, references, strict=True):
            answer = self._answer(completion)
            known = _NOTHING if answer is None else self._known(answer, reference)
            if known is None:
                assert answer is not None
                results.append(requests.setdefault(("grade", answer, reference), len(requests)))
            else:
                results.append(known)
        pool = (
            self._running()
        )  # even without requests: workers take a while to start, and the next answers may need them
        return _MathGrades(self, pool.submit(list(requests)) if requests else Batch([]), results)

    def _known(self, answer: str, reference: str) -> Verdict | None:
        """The verdict where no worker has to be asked."""
        if self.profile == "nemo" or self.grader != MathVerifier.grader:
            return None  # whole completions hardly ever repeat; another grader has rules of its own
        return plain_integers(answer, reference) or self._memory.get(answer, reference)

    def _remember(self, requests: Sequence[Sequence[str]], verdicts: Sequence[Verdict]) -> None:
        if self.profile != "nemo":
            for (_, answer, reference), verdict in zip(requests, verdicts, strict=True):
                self._memory.put(answer, reference, verdict)

    def grade(self, completions: Sequence[str], references: Sequence[str]) -> list[Grade]:
        """Grade completions against their reference answers; see :meth:`Verifier.grade`.

        Raises:
            TypeError: an element is not a string.
            ValueError: the numbers of completions and references differ.
            VerifierError: the workers cannot start, or the verifier was closed meanwhile.
        """
        return self.submit(completions, references).result()

    def parseable(self, references: Sequence[str | None]) -> list[bool]:
        """Whether each reference has a mathematical reading; empty texts and None have none.

        A reference that takes longer than the deadline or crashes a worker is not parseable. Not counted.
        """
        texts = dict.fromkeys(text for text in references if text is not None and text.strip())
        verdicts = self._running().submit([("parseable", text) for text in texts]).wait() if texts else []
        usable = {text for text, verdict in zip(texts, verdicts, strict=True) if verdict.outcome is Outcome.CORRECT}
        return [text in usable for text in references]

    def start(self) -> None:
        """Start all workers and wait until they are ready.

        Raises:
            VerifierError: they cannot start, for example because math-verify is not installed.
        """
        self._running().wait_ready()

    def close(self) -> None:
        """End all workers. Grades that are still pending fail; the next use starts anew."""
        with self._lock:
            finalizer, self._pool, self._finalizer = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def _abandon(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        if self._pool is not None and self._finalizer is not None:
            self._finalizer.detach()
            self._pool.abandon()
        self._disconnect()

    def _count(self, grades: Sequence[Grade]) -> None:
        with self._lock:
            self.counters.update(grade.outcome.value for grade in grades)

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process has the settings, and starts workers of its own.
        return {name: getattr(self, name) for name in ("profile", "num_workers", "timeout", "memory_limit")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _MathGrades(PendingGrades):
    """Verdicts on the distinct requests of one call, and which of them (or which known one) each completion gets."""

    def __init__(self, verifier: MathVerifier, batch: Batch, results: list[int | Verdict]) -> None:
        self._verifier = verifier
        self._batch = batch
        self._results = results
        self._lock = threading.Lock()
        self._grades: list[Grade] | None = None

    def done(self) -> bool:
        return self._batch.done()

    def result(self) -> list[Grade]:
        verdicts = self._batch.wait()
        with self._lock:
            if self._grades is None:
                self._verifier._remember(self._batch.requests, verdicts)
                self._grades = [_grade(r if isinstance(r, Verdict) else verdicts[r]) for r in self._results]
                self._verifier._count(self._grades)
        return self._grades


def _grade(verdict: Verdict) -> Grade:
    return Grade(verdict.outcome, 1.0 if verdict.outcome is Outcome.CORRECT else 0.0, verdict.detail)


_INSTANCES: weakref.WeakSet[MathVerifier] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for verifier in list(_INSTANCES):
        verifier._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
