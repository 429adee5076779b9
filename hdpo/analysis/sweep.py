"""``python -m hdpo sweep``: the same configuration over distillation weights and seeds, one run after another.

Repeating the command continues it: finished runs are skipped, an interrupted one resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hdpo.analysis import report

__all__ = ["main"]

_ARGUMENTS = "sweep.json"  # what a run was started with
_DONE = "done"  # its fit has returned


def _weights(text: str) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers separated by commas, got {text!r}") from None
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise ValueError(f"--weights must be finite and not negative, got {text!r}")
    if len(set(weights)) != len(weights):
        raise ValueError(f"--weights names a weight twice: {text!r}")
    return weights


def _parse(args: Sequence[str]) -> argparse.Namespace:
    # Split by hand: argparse would take the first `--` for itself only where positional arguments are declared.
    args = list(args)
    split = args.index("--") if "--" in args else len(args)
    parser = argparse.ArgumentParser(
        prog="python -m hdpo sweep",
        description="Run `fit` over distillation weights and seeds; repeat the command to continue it.",
        epilog="Arguments after -- go to every fit, for example: -- --trainer.max_steps 50",
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="as for fit; may be repeated")
    parser.add_argument("--weights", default="0,0.01,0.1,1", help="distillation weights (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 0, 1, ... (default %(default)s)")
    parser.add_argument("--out", default="runs/sweep", help="folder of the runs (default %(default)s)")
    options = parser.parse_args(args[:split])
    options.extra = args[split + 1 :]
    options.weights = _weights(options.weights)
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    for file in options.config:
        if not Path(file).is_file():
            raise ValueError(f"--config: there is no file {file!r}")
    return options


def _last_evaluation(folder: Path) -> Path | None:
    """The file that the run's last evaluation writes; None if its configuration does not say."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        max_steps = config["trainer"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None  # the run broke off before its configuration was written
    if not isinstance(max_steps, int) or max_steps < 0:
        return None
    return folder / "evaluations" / f"step_{max_steps:06d}.jsonl"


def _finished(folder: Path) -> bool:
    """Whether the run's fit has returned, or its last evaluation exists (it was stopped after that)."""
    last = _last_evaluation(folder)
    return (folder / _DONE).exists() or (last is not None and last.exists())


def _identity(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What decides a run's result: its arguments, and the content of the configuration files."""
    digests = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in options.config}
    return {"arguments": list(arguments), "config_sha256": digests}


def _check(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that does not belong to this sweep, before anything in it is skipped, resumed or replaced."""
    marker = folder / _ARGUMENTS
    if marker.exists():
        try:
            known = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{marker}: is not JSON; remove the folder {folder}, or use another --out") from None
        if known != identity:
            raise ValueError(
                f"{folder} was made with other arguments or another configuration (see {_ARGUMENTS} there): use "
                "another --out, or remove it"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and was not made by a sweep: use another --out, or remove it")


def _start(folder: Path, identity: dict[str, Any]) -> None:
    """Start a run's folder anew: there is nothing to resume from, and old curves would mix with the new ones."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    partial = folder / f"{_ARGUMENTS}.tmp"
    partial.write_text(json.dumps(identity, indent=2), encoding="utf-8")
    os.replace(partial, folder / _ARGUMENTS)


def _fit_arguments(options: argparse.Namespace, weight: float, seed: int, folder: Path) -> list[str]:
    arguments = ["fit"]
    for file in options.config:
        arguments += ["--config", file]
    arguments += ["--model.distillation_weight", f"{weight:g}", "--seed_everything", str(seed)]
    arguments += ["--trainer.logger.init_args.save_dir", str(folder.parent.parent)]
    arguments += ["--trainer.logger.init_args.name", folder.parent.name]
    arguments += ["--trainer.logger.init_args.version", folder.name]
    return arguments + options.extra


def main(args: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Run ``python -m hdpo sweep``, and its report at the end.

    Args:
        args: command-line arguments.
        run: runs one command, ``["fit", ...]``, and returns its exit status.

    Returns:
        0, or the exit status of the first run that failed; the runs after it are not started.

    Raises:
        ValueError: an argument is bad, or a folder belongs to another sweep.
    """
    options = _parse(args)
    out = Path(options.out)
    plan: list[tuple[Path, list[str], dict[str, Any]]] = []
    for seed in range(options.seeds):  # all weights of a seed first: a whole curve as early as possible
        for weight in options.weights:
            folder = out / f"lambda_{weight:g}-seed_{seed}"
            arguments = _fit_arguments(options, weight, seed, folder)
            plan.append((folder, arguments, _identity(options, arguments)))
    for folder, _, identity in plan:
        _check(folder, identity)
    for i, (folder, arguments, identity) in enumerate(plan, start=1):
        title = f"== {folder.name} ({i} of {len(plan)})"
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if _finished(folder):
            print(f"{title}: finished before, skipped", flush=True)
            continue
        if checkpoint.exists():
            print(f"{title}: resumes from {checkpoint}", flush=True)
            arguments = [*arguments, "--ckpt_path", str(checkpoint)]
        else:
            print(title, flush=True)
            _start(folder, identity)
        if status := run(arguments):
            print(f"{folder.name} ended with status {status}; mend it and repeat the command: finished runs are kept")
            return status
        (folder / _DONE).touch()
    return report.main([str(out)])
