"""An environment that has only torch, transformers and lightning, made of one that has more.

    python -m tests.helpers.bare SCRIPT ARGUMENTS...

runs a script in which no other distribution can be imported or is known to be installed, nor in Python processes that
it starts in the same way (``python -m tests.helpers.bare``, in its environment variable ``HDPO_PYTHON``).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import sys
from typing import Any

__all__ = ["forget_all_but"]

KEPT = ("torch", "transformers", "lightning")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_dependencies(names: tuple[str, ...]) -> set[str]:
    found, todo = set(), [_normalised(n) for n in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [_normalised(re.match(r"[\w.-]+", r)[0]) for r in requires if "extra ==" not in r]
    return found


class _Without:
    """A finder that does not find what is hidden."""

    def __init__(self, finder: Any, modules: set[str], distributions: set[str]) -> None:
        self.finder, self.modules, self.distributions = finder, modules, distributions

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.modules else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Any:
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return (d for d in found if _normalised(d.metadata["Name"]) not in self.distributions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def forget_all_but(names: tuple[str, ...] = KEPT) -> set[str]:
    """Hide all other distributions and return the names of their modules."""
    kept = _with_dependencies(names) | {"hdpo"}
    owners = importlib.metadata.packages_distributions()
    modules = {m for m, found in owners.items() if not kept & {_normalised(d) for d in found}}
    distributions = {_normalised(d) for found in owners.values() for d in found} - kept
    sys.meta_path[:] = [_Without(finder, modules, distributions) for finder in sys.meta_path]
    return modules


if __name__ == "__main__":
    forget_all_but()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # as for a script; run_path does not
    runpy.run_path(sys.argv[0], run_name="__main__")
