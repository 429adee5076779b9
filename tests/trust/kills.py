"""Forty kills: a run that is killed anywhere and resumed ends as if nothing had happened.

``python -m tests.trust.kills [--out FOLDER] [--count N]`` prints a line per kill and the figure at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

STEPS = 8
RUN = [
    "fit", "--config", "lab", "--config", "small.yaml", f"--trainer.max_steps={STEPS}",
]  # fmt: skip
SMALL = {
    "model": {"pass_k": [1, 2], "teacher": {"class_path": "hdpo.teacher.EMATeacher", "init_args": {"decay": 0.8}}},
    "data": {
        "selection": {"num_train_problems": 48, "num_val_problems": 12, "num_test_problems": 0},
        "source": {"kwargs": {"split": "train", "seed": 0, "tiers": [3, 4, 6]}},
        "prompts_per_step": 4,
        "val_batch_size": 4,
    },
    "rollouts": {"num_generations": 4, "num_val_samples": 2, "temperature": 1.6},
    "distillation": {"refresh_every": 2},
    "samples": {"every_n_steps": 1},
    "checkpoint": {"every_n_steps": 2},
    "trainer": {"val_check_interval": 2, "enable_progress_bar": False},
}


class Kill(NamedTuple):
    """One way to end a run."""

    number: str
    moment: str
    step: int
    after: float = 0.0


def kills(count: int = 40, seed: int = 0) -> list[Kill]:
    """All moments with all signals, the last step among them, and random times."""
    last = STEPS
    fixed = [
        Kill(number, moment, step)
        for moment, steps in (
            ("step", (3, 7)),
            ("saving", (2, 6, last)),
            ("evaluating", (2, 6, last)),
            ("recording", (4, last)),
            ("exporting", (last,)),
        )
        for step in steps
        for number in ("SIGKILL", "SIGTERM", "SIGINT")
    ]
    numbers = random.Random(seed)
    anywhere = [
        Kill(("SIGKILL", "SIGTERM", "SIGINT")[i % 3], "anywhere", 0, round(numbers.uniform(0.0, 2.5), 2))
        for i in range(max(0, count - len(fixed)))
    ]
    return [*fixed, *anywhere][:count]


def _start(folder: str, arguments: list[str], log: str) -> None:
    """Run a command in this (forked) process."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    from hdpo.cli import main

    sys.exit(main(arguments))


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.trust.kills", "hdpo.commands.run", "transformers.models.qwen2.modeling_qwen2"]
    )
    return context


def run(folder: Path, arguments: list[str]) -> int:
    """Run a command in a process of its own; returns its exit status, negative for a signal."""
    process = _context().Process(target=_start, args=(str(folder), arguments, str(folder / "log.txt")))
    process.start()
    process.join(timeout=240)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"hung: {(folder / 'log.txt').read_text()[-2000:]}")
    return int(process.exitcode or 0)


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same: weights, records, summary, samples, the state for the next step, the curves."""
    from tests.helpers.curves import read_curves

    run = folder / "runs/lab/version_0"
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("run")
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    curves = {
        name: points
        for name, points in read_curves(run).items()
        if not name.startswith(("time/", "speed/", "sampler/")) and name not in ("epoch",)
    }
    return {
        "runs": sorted(p.name for p in (folder / "runs/lab").iterdir()),
        "policy": _digest(load_file(run / "policy/model.safetensors")),
        "weights": _digest(checkpoint["state_dict"]),
        "optimizer": _digest(dict(enumerate(checkpoint["optimizer_states"][0]["state"].values()))),
        "best": (best["global_step"], _digest(best["state_dict"])),
        "records": {p.name: p.read_bytes() for p in sorted((run / "evaluations").iterdir())},
        "summary": summary,
        "samples": (run / "samples.jsonl").read_text(),
        "curves": curves,
    }


def _digest(value: Any) -> str:
    """A hash of nested tensors, bit for bit."""
    state = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, dict):
            for key in item:
                state.update(str(key).encode())
                feed(item[key])
        elif isinstance(item, torch.Tensor):
            state.update(
                item.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                if item.dim()
                else bytes(str(item), "ascii")
            )
        else:
            state.update(repr(item).encode())

    feed(value)
    return state.hexdigest()[:16]


def prepare(folder: Path, kill: Kill | None) -> list[str]:
    """Write the run's configuration; returns the arguments of its command."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads(json.dumps(SMALL))
    if kill is not None:
        arguments = {**kill._asdict(), "flag": str(folder / "killed")}
        config["trainer"]["callbacks"] = [{"class_path": "tests.trust.killer.Killer", "init_args": arguments}]
    (folder / "small.yaml").write_text(json.dumps(config))
    return RUN


STATUS = {"SIGKILL": -9, "SIGTERM": 75, "SIGINT": 75}


def try_kill(folder: Path, kill: Kill, expected: dict[str, Any]) -> list[str]:
    """Kill a run, resume it until it ends; returns what differs from the run that was not killed."""
    command = prepare(folder, kill)
    status = run(folder, [*command, "--resume", "auto"])
    if not (folder / "killed").exists():
        return ["it ended before it was killed"]
    # A run that is asked to end after its last step ends as it would have.
    if status not in (STATUS[kill.number], *([] if kill.number == "SIGKILL" else [0])):
        return [f"exit status {status}: {(folder / 'log.txt').read_text()[-1500:]}"]
    for _ in range(3):
        if status == 0:
            break
        status = run(folder, [*command, "--resume", "auto"])
    if status:
        return [f"exit status {status} when resumed: {(folder / 'log.txt').read_text()[-1500:]}"]
    found = outcome(folder)
    return [name for name in expected if found[name] != expected[name]]


def main() -> int:
    """Run them all; the exit status is the number of those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=None)
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    out = Path(options.out or tempfile.mkdtemp())
    command = prepare(out / "straight", None)
    assert run(out / "straight", command) == 0, (out / "straight/log.txt").read_text()[-2000:]
    expected = outcome(out / "straight")
    failed = 0
    for number, kill in enumerate(kills(options.count)):
        differs = try_kill(out / f"kill_{number:02d}", kill, expected)
        failed += bool(differs)
        print(f"{number:2d} {kill.number:8s}{kill.moment:11s}step {kill.step} {differs or 'same'}", flush=True)
    print(f"{options.count - failed} of {options.count} end as the run that was not killed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
