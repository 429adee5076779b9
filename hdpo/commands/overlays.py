"""Named evaluation sets of several ``--config`` files side by side: a later file adds to them.

jsonargparse replaces a dictionary whole, so that of two recipes only the last would be evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["join_evaluation_sets"]

_NAMED = ("val_sources", "test_sources")


def join_evaluation_sets(args: Sequence[str]) -> list[str]:
    """Return command-line arguments in which the named evaluation sets of all ``--config`` files count.

    Args:
        args: the arguments; what comes after the last ``--config`` still overrides it. The files are readable YAML.

    Returns:
        The arguments, with one after the last ``--config`` for each section that several files have. A file in which a
        section is null takes away what those before it say.
    """
    joined: dict[str, list[dict[str, Any]]] = {name: [] for name in _NAMED}
    end = 0
    for i, argument in enumerate(args):
        key, separator, path = argument.partition("=")
        if key not in ("--config", "-c") or not (separator or i + 1 < len(args)):
            continue
        end = i + 1 if separator else i + 2
        content = yaml.safe_load(Path(path if separator else args[i + 1]).read_text(encoding="utf-8"))
        data: Any = content.get("data") if isinstance(content, dict) else None
        for name in _NAMED if isinstance(data, dict) else ():
            if isinstance(data.get(name), dict):
                joined[name].append(data[name])
            elif name in data:
                joined[name].clear()
    several = {name: parts for name, parts in joined.items() if len(parts) > 1}
    extra = [
        f"--data.{name}={json.dumps({key: value for part in parts for key, value in part.items()})}"
        for name, parts in several.items()
    ]
    return [*args[:end], *extra, *args[end:]]
