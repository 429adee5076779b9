"""Where a run's numbers come from: the code, the machine, and what had been spent at each evaluation."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdpo.errors import ConfigError
from hdpo.files import write_text

_FILE = "provenance.json"


@functools.cache
def code_version() -> dict[str, Any]:
    """Version of hdpo, a hash of its code, and the commit where it runs from a checkout.

    Returns:
        ``hdpo``, ``code`` (the same wherever the code is), ``commit`` (None outside a checkout), and ``changed``:
        whether the code has changes that no commit holds.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(package), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that merely lies inside another project's checkout has no commit.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") is not None else None
    changed = bool(git("status", "--porcelain", "--", ".")) if commit else None
    version = importlib.import_module("hdpo").__version__
    return {"hdpo": version, "code": digest.hexdigest()[:16], "commit": commit, "changed": changed}


def machine() -> str:
    """Processor, number of cores, and accelerators."""
    import torch

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    names = [found[1] if found else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def provenance() -> dict[str, Any]:
    """The code's version, those of the libraries that numbers depend on, and the machine."""
    libraries = ("torch", "transformers", "lightning")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return code_version() | versions | {"python": platform.python_version(), "machine": machine()}


class Spending:
    """What a run has spent, and how its last steps went; it survives a resume.

    Args:
        window: number of steps over which :attr:`recent` takes means.
    """

    def __init__(self, window: int = 20) -> None:
        self.seconds = 0.0
        self.totals = dict.fromkeys(("completions", "tokens", "solutions"), 0)
        self._steps: deque[dict[str, float]] = deque(maxlen=window)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count a step by what it logged."""
        self.seconds += metrics.get("time/step", 0.0)
        for name in self.totals:
            self.totals[name] += round(metrics.get(f"spent/{name}", 0))
        self._steps.append({name: float(value) for name, value in metrics.items()})

    def so_far(self) -> dict[str, Any]:
        """Wall seconds of all training steps, what was generated and shown in them, and means over the last steps.

        ``completions`` and ``tokens`` were generated; ``solutions`` counts how often a worked solution was shown or
        trained on.

        A mean is over the steps that measured a name: a step without cliffs has no privileged pass rate.
        """
        names = sorted({name for step in self._steps for name in step})
        values = {name: [step[name] for step in self._steps if name in step] for name in names}
        recent = {name: float(f"{sum(v) / len(v):.6g}") for name, v in values.items()}
        return {"train_seconds": round(self.seconds, 3), **self.totals, "recent": recent}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, the same on all ranks."""
        return {"seconds": self.seconds, "totals": dict(self.totals), "steps": list(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.seconds, self.totals = state["seconds"], dict(state["totals"])
        self._steps.extend(state["steps"])


def read_provenance(folder: Path) -> dict[str, Any]:
    """What :func:`write_provenance` wrote; empty where there is nothing.

    Raises:
        ConfigError: the file is broken.
    """
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["processes"], list) or not isinstance(found["evaluations"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: is not what hdpo writes; restore it, or remove it") from None
    return dict(found)


def write_provenance(folder: Path, split: str, step: int, spent: Mapping[str, Any]) -> None:
    """Add an evaluation to ``provenance.json`` in a run's folder.

    The file names each code and machine that worked on the run, and for each evaluation, ``<split>/<step>``, what had
    been spent (:meth:`Spending.so_far`).
    """
    known = read_provenance(folder) or {"processes": [], "evaluations": {}}
    current = provenance()
    if current not in known["processes"]:
        known["processes"].append(current)
    known["evaluations"][f"{split}/{step}"] = dict(spent)
    write_text(folder / _FILE, json.dumps(known, indent=1) + "\n")
