"""``python docs/build_api.py DIR``: the API as HTML pages, from the public docstrings; fails where one is missing."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pdoc

PAGES = [
    "hdpo",
    *(f"hdpo.{name}" for name in ("module", "losses", "teacher", "policy", "rewards", "generation", "data", "optim")),
    *(f"hdpo.{name}" for name in ("callbacks", "experience", "functional", "errors", "measurements")),
    *(f"hdpo.evaluation.{name}" for name in ("metrics", "records", "runs", "intervals", "statistics", "comparison")),
]
"""What a user imports, with the names of its ``__all__``."""


def resolved(name: str) -> Any:
    """A module, with the names that it would import when they are first used."""
    module = importlib.import_module(name)
    vars(module).update({public: getattr(module, public) for public in module.__all__})
    return module


def undocumented(module: Any) -> Iterator[str]:
    """Public names of a module, and methods and properties of its classes, that have no docstring."""
    for item in pdoc.doc.Module(module).members.values():
        if item.name not in module.__all__:
            continue
        imported = isinstance(item, pdoc.doc.Variable) and f"\n{item.name} = " not in inspect.getsource(module)
        if not item.docstring and not imported:  # of these it does not find where they are told of
            yield item.fullname
        for member in item.own_members if isinstance(item, pdoc.doc.Class) else []:
            # Constructors, fields and attributes are told of by their class.
            has_own = isinstance(member, pdoc.doc.Function) or isinstance(vars(item.obj).get(member.name), property)
            if has_own and not member.name.startswith("_") and not member.docstring:
                yield member.fullname


def main(folder: Path) -> int:
    """Write the pages; returns 1 if a docstring is missing."""
    # It runs what is under TYPE_CHECKING, and vLLM is in an environment of its own.
    warnings.filterwarnings("ignore", module="pdoc.doc_types")
    missing = sorted({name for page in PAGES for name in undocumented(resolved(page))})
    if missing:
        print("these have no docstring:", *missing, sep="\n", file=sys.stderr)
        return 1
    root = resolved(PAGES[0])
    root.__doc__ += "\n\nBy room: " + ", ".join(f"`{page}`" for page in PAGES[1:]) + "."
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    pdoc.pdoc(*PAGES, output_directory=folder)
    print(f"{len(PAGES)} pages: open {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
