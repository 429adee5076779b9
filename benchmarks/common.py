"""What all benchmarks share: fixed models, interleaved timing, peak memory, and how a result is written down."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAB = "pkg://hdpo.lab/policy"

#: Random Qwen2 policies, untied: vocabulary, width, layers, heads, key/value heads, feed-forward width.
SHAPES = {"toy": (384, 16, 1, 2, 1, 32), "20m": (32_000, 256, 6, 4, 2, 768), "100m": (32_000, 640, 12, 10, 5, 1792)}


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int = 7) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"interleaved runs (default: {repeats})")
    parser.add_argument("--json", type=Path, help="file to write the results to")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line where a number makes no sense; set the number of threads."""
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and name != "seed":
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    import torch

    torch.set_num_threads(args.threads)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def environment() -> dict[str, Any]:
    """Command, commit, hardware, date, versions and load: what a figure needs to mean anything."""
    import torch

    script = Path(sys.argv[0])
    name = f"benchmarks/{script.name}" if script.parent.name == "benchmarks" else script.name
    return {
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--", "hdpo", "benchmarks")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{_cpu()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {n: _version(n) for n in ("torch", "transformers", "lightning", "trl")},
    }


def report(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, env: dict[str, Any]) -> None:
    """Print the rows as a table and write them, with the environment, where asked to."""
    if rows:
        names = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))
        cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    env["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
    print(f"{env['command']}\n{env['commit']}{'+' if env['changed'] else ''}, {env['date']}, {env['hardware']}")
    print(f"{env['threads']} threads, load {env['load_average'][0]} -> {env['load_average_after'][0]}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, A B A B ...; one uncounted round first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            gc.collect()
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of runs that stood next to each other: a change of the machine's load cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _status(name: str) -> int | None:
    """A number of bytes in Linux's account of this process."""
    try:
        found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def resting_memory() -> int:
    """Start a new peak and return the bytes that are held now."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts at what is held now
    except OSError:
        return peak_memory()
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """Peak resident bytes of this process since :func:`resting_memory` (elsewhere than on Linux: since its start).

    Not ``ru_maxrss``, where there is a choice: on Linux that also remembers the peak of the process that started it.
    """
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM") or used


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this script again in a process of its own and return the JSON of its last line."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(arguments)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_model(name: str, seed: int = 0) -> Any:
    """A random Qwen2 of one of :data:`SHAPES`, float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocab, width, layers, heads, kv_heads, hidden = SHAPES[name]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def policy_path(name: str, folder: Path) -> str:
    """Where the policy called ``name`` can be loaded from; random ones are written to ``folder``."""
    if name == "lab":
        return LAB
    target = folder / name
    if not target.exists():
        from transformers import AutoTokenizer

        from hdpo.files import resolve_path

        random_model(name).save_pretrained(target)
        AutoTokenizer.from_pretrained(resolve_path(LAB)).save_pretrained(target)  # nothing reads what it writes
    return str(target)


def lab_prompts(num_prompts: int) -> tuple[Any, list[list[int]]]:
    """The laboratory's tokenizer, and prompts of its training problems (all six tiers in turn)."""
    from itertools import islice

    from hdpo.data.prompts import PromptRenderer
    from hdpo.lab.problems import rows
    from hdpo.lab.task import LAB_PROMPTS
    from hdpo.policy import PolicyConfig, load_tokenizer

    tokenizer = load_tokenizer(PolicyConfig(path=LAB))
    renderer = PromptRenderer(tokenizer, LAB_PROMPTS)
    return tokenizer, [renderer.student(row["problem"]) for row in islice(rows(split="train"), num_prompts)]
