"""A thousand steps of the laboratory with an evaluation every twenty: do memory, files, threads, processes stay flat?

    python benchmarks/soak.py --steps 1000 --json soak.json --figure benchmarks/figures/soak.png

The run is `fit --config lab` with 24 validation problems, in a temporary folder. After every step the process's own
account (Linux, /proc) is read: resident memory, of it what is not shared with files, open files, threads, and child
processes (the verifier's workers). "first" and "last" are medians over the second and the last tenth of the steps: in
the first tenth libraries are still loading and caches filling. The figure has one panel for each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from common import environment, report
from lightning.pytorch import Callback

MEASURED = {"resident": "resident memory / MiB", "unshared": "unshared memory / MiB", "files": "open files",
            "threads": "threads", "processes": "child processes"}  # fmt: skip


class Meter(Callback):
    """Reads this process's account after every step."""

    rows: ClassVar[list[dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Add a row."""
        Meter.rows.append({"step": trainer.global_step, "seconds": time.perf_counter(), **account()})


def account() -> dict[str, float]:
    """Memory, files, threads and children of this process."""
    own = Path("/proc/self")
    status = dict(line.split(":", 1) for line in (own / "status").read_text().splitlines())
    return {
        "resident": int(status["VmRSS"].split()[0]) / 1024,
        "unshared": int(status["RssAnon"].split()[0]) / 1024,
        "files": len(os.listdir(own / "fd")),
        "threads": int(status["Threads"]),
        "processes": sum(map(_is_child, Path("/proc").glob("[0-9]*/stat"))),
    }


def _is_child(stat: Path) -> bool:
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def run(steps: int) -> list[dict[str, float]]:
    """Train, in the working folder; returns a row per step."""
    from hdpo.cli import main

    options = {
        "trainer.max_steps": steps, "trainer.val_check_interval": 20, "trainer.enable_progress_bar": "false",
        "data.selection.num_val_problems": 24, "trainer.callbacks+": "soak.Meter",
    }  # fmt: skip
    status = main(["fit", "--config", "lab", *(f"--{key}={value}" for key, value in options.items())])
    if status:
        raise RuntimeError(f"fit ended with status {status}")
    import soak  # the module that the configuration named, where this one is __main__

    return soak.Meter.rows


def summary(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """First and last level of each quantity, and its largest value."""
    tenth = max(1, len(rows) // 10)
    return [
        {
            "what": title,
            "first": statistics.median(row[name] for row in rows[tenth : 2 * tenth]),
            "last": statistics.median(row[name] for row in rows[-tenth:]),
            "largest": max(row[name] for row in rows),
        }
        for name, title in MEASURED.items()
    ]


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """One panel for each quantity over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MEASURED), 1, sharex=True, figsize=(7, 9), layout="constrained")
    for axis, (name, title) in zip(axes, MEASURED.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axis.set(ylabel=title.replace(" / ", "\n/ "))
        axis.set_ylim(bottom=0)
    axes[-1].set(xlabel="step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run, print the levels, and write JSON and the figure where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    if args.steps < 20:
        parser.error(f"--steps must be at least 20, got {args.steps}")
    env, here = environment(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            rows = run(args.steps)
        finally:
            os.chdir(here)
    env["seconds"] = rows[-1]["seconds"] - rows[0]["seconds"]
    report(summary(rows), args, env | {"every_tenth_step": [{**row, "seconds": None} for row in rows[9::10]]})
    if args.figure:
        plot(rows, args.figure)


if __name__ == "__main__":
    main()
