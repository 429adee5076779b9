"""What only a GPU can say: is it right there (A), how fast is it (B), and what do whole steps take (C)?

    python benchmarks/gpu_check.py --part A --json a.jsonl        # at most nine minutes on one GPU; so do B and C
    python benchmarks/gpu_check.py --part A B C --size toy        # a CPU: the same code, sizes that say nothing

Each check runs in a process of its own with a limit, those first whose answer matters most, and prints one line of JSON
when it is done: what was found, whether that is what should be, and seconds. A check that fails, hangs or cannot be run
here is such a line too, and the next one begins; what a part has no time for is "skipped". The command ends with status
1 if a check failed. It needs torch, transformers and lightning, and no network; vLLM is used where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

#: Checks of each part in order of their value, with the seconds that each may take at most.
PARTS = {
    "A": {
        "losses": 90, "engine": 120, "shadow": 60, "layouts": 60, "strategies": 120, "not_finite": 60,
        "autocast_cache": 60, "synchronisations": 60,
    },
    "B": {"decoding": 180, "update": 180, "optimizer": 60, "weights": 60, "compiled": 90},
    "C": {"step": 270, "step_again": 180, "kernels": 60, "validation": 120},
}  # fmt: skip
SECONDS = 540


def checks() -> dict[str, Any]:
    """All checks by name; imported in the process that runs one."""
    import gpu_correct
    import gpu_speed

    return {**gpu_correct.CHECKS, **gpu_speed.CHECKS}


def one(name: str, size: str) -> None:
    """Run a check in this process and print what it found."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.backends.cuda.matmul.allow_tf32 = False
    found = checks()[name](size)
    print(json.dumps({"ok": found.pop("ok", None), **found}))  # null: nothing that could be wrong here


def run(name: str, size: str, limit: float) -> dict[str, Any]:
    """A check in a process of its own, which does not outlive the limit."""
    # HDPO_PYTHON: how Python is started, where a test hides what is installed.
    command = [sys.executable, *os.environ.get("HDPO_PYTHON", "").split(), __file__, "--check", name, "--size", size]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: workers and ranks too
        process.communicate()
        return {"ok": False, "error": f"no end within {limit:.0f} s"}
    if process.returncode:
        return {"ok": False, "error": "\n".join(err.strip().splitlines()[-6:])}
    return json.loads(out.strip().splitlines()[-1])


def part(name: str, size: str, only: list[str] | None) -> Iterator[dict[str, Any]]:
    """The checks of a part as long as there is time."""
    started = time.monotonic()
    for check, limit in PARTS[name].items():
        if only and check not in only:
            continue
        begun = time.monotonic()
        left = SECONDS - (begun - started)
        found = run(check, size, min(limit, left)) if left > 10 else {"ok": None, "skipped": "no time left"}
        yield {"part": name, "check": check, "seconds": round(time.monotonic() - begun, 1), **found}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["A"])
    parser.add_argument("--only", nargs="+", help="these checks")
    parser.add_argument("--size", choices=("full", "toy"), default="full", help="full needs a GPU of 80 GB")
    parser.add_argument("--json", type=Path, help="file to append the lines to")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        one(args.check, args.size)
        return
    from common import environment

    env = {"environment": environment() | {"gpu": gpu_name()}}
    lines = (line for name in args.part for line in part(name, args.size, args.only))
    failed = False
    for line in chain([env], lines):
        print(json.dumps(line), flush=True)
        failed |= line.get("ok") is False
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    sys.exit(int(failed))


def gpu_name() -> str | None:
    """Name of the first GPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
