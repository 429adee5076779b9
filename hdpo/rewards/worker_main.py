"""A worker process: reads requests from its socket, grades, and answers one at a time.

It is a fresh interpreter that is told what to import, and not a ``multiprocessing`` child: spawn would import the
trainer's main module again (torch with it, and a script without an ``if __name__`` guard would train a second time),
and fork would copy a process full of threads and accelerator state.

Requests are pickles; replies are lines of JSON, so that nothing a worker sends can run code in the trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import sys
from typing import Any

from hdpo.rewards.base import Grade, Outcome

_GIB = 2**30
# Share of the memory limit that marks an answer as the cause of an allocation failure; see `_answer`.
_SUSPICIOUS_SHARE = 0.125
_DETAIL_CHARS = 200


def describe(error: BaseException) -> str:
    """Return an exception as one short line; some carry the whole input."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= _DETAIL_CHARS else text[:_DETAIL_CHARS] + " ..."


def _die_with_parent(parent: int) -> None:
    """End with the trainer even in the middle of an answer, where a closed socket goes unnoticed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def _limit(memory_limit: float | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit is not None and sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = int(memory_limit * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _peak_memory() -> int:
    """Largest resident size so far, in bytes.

    From Linux's VmHWM where there is one: ``ru_maxrss`` outlives ``exec``, so that a worker would begin with the peak
    of the trainer that forked it, and take itself for too large after every answer.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _answer(grader: Any, request: bytes, memory_limit: float | None) -> tuple[Grade, bool]:
    """Answer one request; the second value says that this process should be replaced."""
    before = _peak_memory()
    try:
        method, *arguments = pickle.loads(request)
        answer = getattr(grader, method)(*arguments)
    except MemoryError:
        return Grade(Outcome.ERROR, 0.0, "out of memory"), True
    except BaseException as error:  # also SystemExit, and math-verify's TimeoutException: each ends this answer alone
        return Grade(Outcome.ERROR, 0.0, describe(error)), False
    grade = (
        answer if isinstance(answer, Grade) else Grade(Outcome.CORRECT if answer else Outcome.INVALID_REFERENCE, 0.0)
    )
    if memory_limit is None:
        return grade, False
    suspicious = memory_limit * _GIB * _SUSPICIOUS_SHARE
    peak = _peak_memory()
    # sympy swallows most exceptions, MemoryError too, and then says "not equal". An answer that made the process
    # grow so far is not believed when it says so.
    if grade.outcome is Outcome.WRONG and peak - before > suspicious:
        grade = Grade(Outcome.ERROR, 0.0, f"took {(peak - before) / _GIB:.1f} GiB of memory")
    return grade, peak > 2 * suspicious


def main(options: dict[str, Any]) -> None:
    """Serve until the socket is closed.

    Args:
        options: ``socket`` (file descriptor), ``parent`` (process id), ``grader`` (``module:Name``), ``grader_args``,
            ``timeout`` (seconds per request), ``memory_limit`` (GiB or None).
    """
    connection = socket.socket(fileno=options["socket"])
    _die_with_parent(options["parent"])
    # A Ctrl-C in the terminal is the trainer's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    module, name = options["grader"].split(":")
    grader = getattr(importlib.import_module(module), name)(**options["grader_args"])
    _limit(options["memory_limit"])
    connection.sendall(b'"ready"\n')
    os.dup2(0, 2)  # from here on, failures are replies, and what a library prints goes to the null device
    requests = connection.makefile("rb")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        # The trainer keeps the deadline. This alarm, which kills without running any Python, is for a trainer that
        # cannot: one that is gone or stopped.
        signal.setitimer(signal.ITIMER_REAL, 2 * options["timeout"] + 1)
        grade, retires = _answer(grader, request, options["memory_limit"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(json.dumps([*vars(grade).values(), retires]).encode() + b"\n")
