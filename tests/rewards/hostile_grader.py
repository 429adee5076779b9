"""A verifier whose workers do on command what sympy does when it goes wrong."""

import os
import signal
import sys
import time

from hdpo.rewards import Grade, Outcome
from hdpo.rewards.base import check_pairs
from hdpo.rewards.boxed import last_boxed
from hdpo.rewards.worker_verifier import WorkerVerifier


class HostileVerifier(WorkerVerifier):
    """Its workers obey the commands in boxes; see ``hostile_grader``."""

    def _grader(self):
        return "hostile_grader:HostileGrader", {}

    def submit(self, completions, references, **columns):
        check_pairs(completions, references, **columns)
        answers = map(last_boxed, completions)
        return self._pending(
            [("grade", a, r) if a else Grade(Outcome.NO_ANSWER, 0.0) for a, r in zip(answers, references, strict=True)]
        )

    def usable(self, references, **columns):
        return self._usable([("usable", reference) for reference in references])


def is_socket(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except FileNotFoundError:  # the one that the folder was read through
        return False


class HostileGrader:
    """What the workers run."""

    def __init__(self):
        if os.environ.get("HOSTILE_START") == "refuse":
            raise RuntimeError("refuses to start")
        if os.environ.get("HOSTILE_START") == "slow":
            time.sleep(1.5)

    def usable(self, reference):
        return self.grade(reference, reference).outcome is Outcome.CORRECT

    def grade(self, answer, reference):
        outcome, detail = self.obey(answer, reference)
        return Grade(outcome, float(outcome is Outcome.CORRECT), detail)

    def obey(self, answer, reference):
        command, _, argument = answer.partition(":")
        match command:
            case "hang":
                while True:
                    pass
            case "ignore":  # what a library could do, and what only SIGKILL ends
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                    signal.signal(number, signal.SIG_IGN)
                while True:
                    pass
            case "big":  # one call into C that holds the interpreter for minutes
                return Outcome.CORRECT, str(9**99999999)
            case "sleep":
                time.sleep(float(argument))
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "memory":
                return Outcome.CORRECT, str(len(bytearray(1 << 40)))
            case "swallowed":  # sympy: except Exception: return False
                try:
                    chunks = []
                    while True:
                        chunks.append(b"x" * (1 << 24))
                except MemoryError:
                    return Outcome.WRONG, ""
            case "raise":
                raise ValueError(argument)
            case "leave":
                sys.exit("bye")
            case "alarm":
                raise KeyboardInterrupt
            case "recurse":
                return self.obey(answer, reference)
            case "noise":
                print("x" * 100_000)
                print("y" * 100_000, file=sys.stderr)
                os.write(1, b"\x00\x00\x00\x02[]")
                sys.stdin.read()
            case "forge":  # a pickle that would run code, sent as if it were the reply
                (link,) = (fd for fd in os.listdir("/proc/self/fd") if is_socket(fd))
                os.write(int(link), f"cos\nmkdir\n(V{argument}\ntR.\n".encode())
            case "ord":
                return Outcome.CORRECT, ",".join(str(ord(character)) for character in argument)
            case "stderr":
                return Outcome.CORRECT, os.readlink("/proc/self/fd/2")
            case "pid":
                return Outcome.CORRECT, str(os.getpid())
            case "modules":
                return Outcome.CORRECT, ",".join(sorted({name.split(".")[0] for name in sys.modules}))
            case "hash":
                return Outcome.CORRECT, str(hash("x"))
            case "detail":
                return Outcome.CORRECT, "d" * 1_000_000
        return (Outcome.CORRECT if answer == reference else Outcome.WRONG), ""
