"""One change of the code, and the tests that ought to notice it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MUTATIONS", "Mutation", "applied"]


class Mutation(NamedTuple):
    """Replace ``old``, which occurs exactly once in ``file``, by ``new``.

    Attributes:
        file: path from the repository's root.
        old: text as it stands there.
        new: text that takes its place.
        tests: test files that ought to notice, the quickest first.
        equivalent: why no test can notice, where that is so; the mutation is then not run.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def key(self) -> str:
        """Names the mutation in results."""
        return hashlib.sha256("\0".join((self.file, self.old, self.new)).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"


def read_table(path: Path) -> Iterator[Mutation]:
    """Read mutations from a table in the manner of a diff.

    ``== FILE`` begins the mutations of a file, and ``test FILE`` names a test of theirs. Then each mutation is some
    lines with ``-``, what is to be replaced, and some with ``+``, what takes its place. Before them may stand
    ``# comment`` or, where no test can notice the change, ``= reason``.
    """
    file, tests, equivalent = "", [], ""
    old: list[str] = []
    new: list[str] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("== "):
            file, tests = line[3:], []
        elif line.startswith("test "):
            tests.append(line[5:])
        elif line.startswith("= "):
            equivalent = line[2:]
        elif line.startswith("-"):
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
        elif not line and old:
            yield Mutation(file, "\n".join(old), "\n".join(new), tuple(tests), equivalent)
            old, new, equivalent = [], [], ""
        elif line and not line.startswith("#"):
            raise ValueError(f"{path.name}: {line!r} is no part of a table")


MUTATIONS = [
    mutation for path in sorted((Path(__file__).parent / "table").glob("*.txt")) for mutation in read_table(path)
]


def applied(mutation: Mutation, root: Path) -> str:
    """The file's text with the change.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    path = root / mutation.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: {mutation.old!r} occurs {text.count(mutation.old)} times: adapt the table")
    return text.replace(mutation.old, mutation.new)
