"""Runs one program and its unit tests; a process of its own, started by :mod:`hdpo.rewards.python_code`.

Isolation, honestly. The process is killed when it overruns, its memory is limited, and its standard streams lead
nowhere. Where Linux lets anybody have a network namespace, there is no network. In any case
Python's audit hook refuses sockets, other processes, signals, ctypes and writing, moving or deleting files. The hook is
no wall against native code, and files can be read: run policies that you distrust in a container.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_ALLOWED = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.walk"}
_REFUSED = {"socket", "os", "subprocess", "ctypes", "shutil", "pty", "fcntl", "resource", "sqlite3", "webbrowser"}
_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1


def leave_network() -> bool:
    """Move to a network namespace without any device; whether that worked."""
    return sys.platform == "linux" and ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.partition(".")[0] in _REFUSED and event not in _ALLOWED):
        raise PermissionError(f"{event} is not allowed in a graded program")


def main() -> None:
    """Read ``{"program", "tests", "token", "memory_limit"}`` from standard input; write lines to output.

    First ``started``, then JSON: the token, whether the tests passed, and what went wrong. The token comes only after
    the tests, so that a program that exits early has not passed them.
    """
    request = json.load(sys.stdin)
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    leave_network()
    if sys.platform == "linux":  # after the namespace, which resets it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        resource.setrlimit(resource.RLIMIT_AS, (int(request["memory_limit"] * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("started", file=replies, flush=True)
    sys.addaudithook(_refuse)
    token, passed, detail = request.pop("token"), False, ""
    namespace: dict[str, object] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program", "exec"), namespace)
        exec(compile(request["tests"], "tests", "exec"), namespace)
        passed = True
    except BaseException as error:
        detail = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps([token, passed, detail]), file=replies, flush=True)


if __name__ == "__main__":
    main()
