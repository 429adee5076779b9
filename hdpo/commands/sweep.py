"""``python -m hdpo sweep``: one configuration in several variants and seeds, each run in a process of its own.

Repeating the command continues it: finished runs are skipped, an interrupted one resumes from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hdpo.commands.suggestions import CommandParser
from hdpo.errors import ConfigError
from hdpo.evaluation.provenance import code_version
from hdpo.evaluation.runs import ARM_FILE, WEIGHT
from hdpo.files import find_config, write_text

FIT = [sys.executable, "-m", "hdpo"]

_FINISHED = "finished"  # what fit leaves in the folder of a run that has reached its end
_LOG = "fit.log"
_INTERRUPTED = 75
"""The exit status of a sweep that was asked to end and can be repeated (BSD's EX_TEMPFAIL)."""

_READ = """
import json, sys
from hdpo.commands.run import read_config
from hdpo.errors import ConfigError
try:
    for arguments in json.load(sys.stdin):
        read_config(arguments)
except ConfigError as error:
    sys.exit(f"hdpo: error: {error}")
"""


@dataclass(frozen=True)
class _Planned:
    """One run: its folder, what ``fit`` gets, and what decides its result."""

    folder: Path
    arguments: list[str]
    identity: dict[str, Any]


def _parse(args: Sequence[str]) -> Any:
    # Split by hand: the parser would take the first `--` for itself only where positional arguments are declared.
    args = list(args)
    split = args.index("--") if "--" in args else len(args)
    parser = CommandParser(
        "sweep",
        description="Run `fit` in several variants and seeds. The same command continues an interrupted sweep.",
        epilog="Arguments after -- are passed to every fit, for example: -- --trainer.max_steps 50",
    )
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="as for fit; may be repeated")
    add("--arms", nargs="+", default=[], metavar="FILE", help="one overlay per arm; an arm is named after its file")
    add(
        "--set", action="append", default=[], metavar="KEY=V1,V2", help="values of a key; several give all combinations"
    )
    add("--weights", metavar="W1,W2", help=f"short for --set {WEIGHT}=W1,W2")
    add("--seeds", default="3", help="how many, or which: 0,7,9; one alone: 7, (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    add("--out", default="runs/sweep", metavar="DIR", help="folder of the runs (default: %(default)s)")
    add("--other_code", action="store_true", help="keep and continue runs of another version of the code")
    options = parser.options(args[:split])
    options.extra = args[split + 1 :]
    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {options.jobs}")
    if Path(options.out).is_file():
        raise ConfigError(f"--out: {options.out} is a file; name a folder")
    options.config = [find_config(name) for name in options.config]
    options.arms = [find_config(name) for names in options.arms for name in names.split(",")]
    options.seeds = _seeds(options.seeds)
    weights = [f"{WEIGHT}={options.weights}"] if options.weights else []
    options.set = [_values(text) for text in [*weights, *options.set]]
    return options


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise ConfigError(f"--seeds must be a number of seeds, or seeds separated by commas, got {text!r}") from None
    if "," not in text:
        seeds = list(range(seeds[0]))
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds must be at least one, different and not negative, got {text!r}")
    return seeds


def _values(text: str) -> tuple[str, list[str]]:
    """Key and values of ``KEY=V1,V2``, where a value may be a YAML list or mapping."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = None
    if not equals or not key or not found:
        raise ConfigError(f"--set must be KEY=V1,V2,..., got {text!r}")
    # A revision may look like a date, which YAML makes of it.
    texts = [str(v) if isinstance(v, str | datetime.date) else json.dumps(v, default=str) for v in found]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"--set names a value twice: {text!r}")
    return key, texts


# ---------------------------------------------------------------------- the plan


def _plan(options: Any) -> list[_Planned]:
    """All runs; all variants of a seed first, so that a comparison is there as early as possible."""
    ends = [key.rpartition(".")[2] for key, _ in options.set]
    names = [end if ends.count(end) == 1 else key for end, (key, _) in zip(ends, options.set, strict=True)]
    choices = [[(key, value) for value in values] for key, values in options.set]
    arms: list[tuple[str | None, str]] = [(Path(file).stem, file) for file in options.arms] or [(None, "")]
    if len({name for name, _ in arms}) < len(arms):
        raise ConfigError(f"--arms: two overlays have one name: {', '.join(options.arms)}")
    plan: dict[Path, _Planned] = {}
    for seed, (arm, file), chosen in itertools.product(options.seeds, arms, itertools.product(*choices)):
        parts = [arm] if arm else []
        parts += [f"{name}_{value}" for name, (_, value) in zip(names, chosen, strict=True)]
        folder = Path(options.out) / re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed_{seed}"]))
        if folder in plan:
            raise ConfigError(f"--set: two runs would share the folder {folder}; use values with different names")
        files = [*options.config, *([file] if file else [])]
        given = [part for key, value in chosen for part in (f"--{key}", value)] + options.extra
        # What a file holds counts, and not where it is.
        digests = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files]
        identity = {"arm": arm, "seed": seed, "arguments": given, "config_sha256": digests, **code_version()}
        arguments = [part for name in files for part in ("--config", name)]
        plan[folder] = _Planned(folder, [*arguments, *given, "--seed_everything", str(seed)], identity)
    return list(plan.values())


def _check(run: _Planned, other_code: bool) -> None:
    """Refuse a folder that does not belong to this sweep, before anything in it is skipped, resumed or replaced."""
    folder, marker = run.folder, run.folder / ARM_FILE
    if not marker.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and was not made by a sweep: use another --out, or remove it")
        return
    try:
        known = dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError(f"{marker}: is not JSON; remove the folder {folder}, or use another --out") from None
    if any(known.get(name) != run.identity[name] for name in ("arm", "seed", "arguments", "config_sha256")):
        raise ConfigError(
            f"{folder} was made with other arguments or another configuration (see {ARM_FILE} there): use another "
            "--out, or remove it"
        )
    if known.get("code") != run.identity["code"] and not other_code:
        raise ConfigError(
            f"{folder} was made by other code (commit {known.get('commit')}): add --other_code to keep and continue "
            "it, use another --out, or remove it"
        )


@contextmanager
def _lock(out: Path) -> Iterator[int]:
    """Let one sweep at a time work in a folder. Its runs hold the lock, too: none is started twice."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another sweep is working in {out}, or a run of it is still ending") from None
        yield file.fileno()


# ---------------------------------------------------------------------- running it


def _is_finished(run: _Planned) -> bool:
    return (run.folder / _FINISHED).exists()


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.ckpt"))


def _die_with_parent() -> None:
    """In the child: be killed when the sweep is (Linux), so that the repeated command is alone with the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _arguments(run: _Planned) -> list[str]:
    """What ``fit`` gets, with the run's folder."""
    out = run.folder.parent
    place = {"save_dir": out.parent, "name": out.name, "version": run.folder.name}
    return [*run.arguments, *(p for key, v in place.items() for p in (f"--trainer.logger.init_args.{key}", str(v)))]


def _is_refused(plan: Sequence[_Planned]) -> bool:
    """Whether ``fit`` refuses the configuration of a variant that has a run to do; says why in one line, as it would.

    In one process of its own, which imports what the runs import: a mistake is told once, before any of them starts.
    """
    variants = {run.folder.name.rpartition("seed_")[0]: _arguments(run) for run in plan if not _is_finished(run)}
    if not variants:
        return False
    told = json.dumps(list(variants.values()))
    return bool(subprocess.run([sys.executable, "-c", _READ], input=told, text=True, check=False).returncode)


def _start(run: _Planned, jobs: int, lock: int) -> subprocess.Popen[bytes]:
    """Start or resume a run; what it prints goes to its log file."""
    if not _has_checkpoint(run.folder):  # old curves would mix with the new ones
        if run.folder.exists():
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True)
        write_text(run.folder / ARM_FILE, json.dumps(run.identity, indent=1) + "\n")
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with (run.folder / _LOG).open("ab") as log:
        return subprocess.Popen(
            [*FIT, "fit", "--resume", "auto", *_arguments(run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **os.environ},
            pass_fds=(lock,),
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - a sweep has one thread
        )


def _run_all(plan: Sequence[_Planned], jobs: int, lock: int) -> dict[str, int]:
    """Run what is not finished, ``jobs`` at a time; returns the exit statuses of runs that failed."""
    waiting = [run for run in plan if not _is_finished(run)]
    if len(waiting) < len(plan):
        print(f"{len(plan) - len(waiting)} of {len(plan)} runs were finished before", flush=True)
    running: dict[str, tuple[_Planned, subprocess.Popen[bytes], float]] = {}
    failed: dict[str, int] = {}
    number, total = len(plan) - len(waiting), len(plan)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, number = waiting.pop(0), number + 1
                how = "resumes" if _has_checkpoint(run.folder) else "starts"
                print(f"== {run.folder.name} ({number} of {total}) {how}", flush=True)
                running[run.folder.name] = run, _start(run, jobs, lock), time.monotonic()
            time.sleep(0.05)
            for name, (run, process, started) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[name]
                if status == 0:
                    print(f"== {name} finished after {time.monotonic() - started:.0f} s", flush=True)
                else:
                    failed[name] = status
                    print(f"== {name} FAILED with status {status}: {_last_line(run.folder / _LOG)}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"{lines[-1][:200] if lines else 'no output'} ({log})"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(args: Sequence[str]) -> int:
    """Run ``python -m hdpo sweep``, and its report at the end.

    Returns:
        0; 2 where ``fit`` refuses a configuration, before any run starts; the first status of a run that failed, after
        all others have run; or 75 where it was asked to end (SIGINT, SIGTERM) and can be repeated.

    Raises:
        ConfigError: an argument is bad, or a folder belongs to another sweep.
    """
    options = _parse(args)
    plan, out = _plan(options), Path(options.out)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _lock(out) as lock:
            for run in plan:
                _check(run, options.other_code)
            if _is_refused(plan):
                return 2
            failed = _run_all(plan, options.jobs, lock)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to continue", flush=True)
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    from hdpo.commands import report

    if len(failed) < len(plan):
        report.main([str(out)])
    if failed:
        print(f"{len(failed)} of {len(plan)} runs failed ({', '.join(failed)}); repeat the command to try them again")
        status = next(iter(failed.values()))
        return status if status > 0 else 1
    return 0
