"""Where problems come from: hub data sets, local files or Python functions, streamed row by row.

Nothing is filtered here: that is :mod:`hdpo.data.preparation`.
"""

from __future__ import annotations

import glob
import inspect
import json
import math
import pkgutil
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple, cast

from hdpo.data.config import SourceConfig
from hdpo.errors import ConfigError, first_line
from hdpo.files import resolve_path
from hdpo.rewards.boxed import last_boxed

PYTHON = "python:"
FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
_GLOB = re.compile(r"[*?\[]")
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class _Row(NamedTuple):
    """One row as it was read: ``number`` counts from 1 within ``file`` (the path of a source that is not a file)."""

    file: str
    number: int
    values: Mapping[str, Any]


class Problem(NamedTuple):
    """One row of a source; an empty string stands for what the row does not have.

    Attributes:
        extra: the columns of ``columns.extra`` by name.
        place: its file (the path of a source that is none) and its row in it, from 1.
    """

    problem: str
    solution: str
    answer: str
    source: str
    context: str = ""
    extra: Mapping[str, Any] = {}
    place: tuple[str, int] = ("", 0)


class Source:
    """A source that can be iterated: one :class:`Problem` for each row, in the source's own order.

    Args:
        config: what to read.
        key: the configuration key that error messages name, such as ``data.source``.

    Raises:
        ConfigError: (while iterating) nothing is there, wrong columns, an unreadable row, an unknown split, an
            unreachable hub.
    """

    def __init__(self, config: SourceConfig, key: str = "data.source") -> None:
        self.config = config
        self.key = key

    def __iter__(self) -> Iterator[Problem]:
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"{self.key}.path: {self.config.path} has no rows")
        self._check_columns(first)
        yield from map(self._problem, chain([first], rows))

    def _problem(self, row: _Row) -> Problem:
        columns, pattern = self.config.columns, self.config.answer_pattern
        solution = self._text(row, "solution")
        if columns.answer is not None:
            answer = self._text(row, "answer")
        else:
            answer = solution if pattern else last_boxed(solution) or ""
        if pattern is not None:
            matches = list(re.finditer(pattern, answer))
            answer = (matches[-1][1 if matches[-1].re.groups else 0] or "").strip() if matches else ""
        return Problem(
            self._text(row, "problem"),
            solution,
            answer,
            self._text(row, "source") or self.config.source_name or re.split(r"[/:]", self.config.path.rstrip("/"))[-1],
            self._text(row, "context"),
            {name: self._plain(row, name) for name in columns.extra},
            (row.file, row.number),
        )

    def _text(self, row: _Row, key: str) -> str:
        column: str | None = getattr(self.config.columns, key)
        value = None if column is None else row.values.get(column)
        if isinstance(value, str):
            return value.strip()
        if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for nothing
            return ""
        if key in ("answer", "source") and isinstance(value, Number):
            return str(value)
        raise self._unsuitable(row, key, str(column), value, "text")

    def _plain(self, row: _Row, column: str) -> Any:
        value = row.values.get(column)
        if not _is_plain(value):
            raise self._unsuitable(row, "extra", column, value, "what JSON can hold")
        return value

    def _unsuitable(self, row: _Row, key: str, column: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(
            f"{self.key}.columns.{key}: {row.file}, row {row.number}: column {column!r} must hold {wanted}, not "
            f"{type(value).__name__} ({reprlib.repr(value)})"
        )

    def local_files(self) -> list[Path] | None:
        """Return the files that a local path stands for, sorted; None for a hub id or a ``python:`` function.

        Raises:
            ConfigError: the path is local by its form and nothing is there, or the files are of several formats, or of
                none that can be read.
        """
        path = self.config.path
        if path.startswith(PYTHON):
            return None
        resolved = self._resolved()
        if _GLOB.search(path) and not resolved.exists():
            files = [Path(match) for match in sorted(glob.glob(str(resolved), recursive=True)) if Path(match).is_file()]
        elif resolved.is_dir():
            files = sorted(f for f in resolved.rglob("*") if f.suffix in FORMATS and f.name not in _METADATA)
        elif resolved.is_file():
            files = [resolved]
        elif path.startswith(("/", ".", "~")) or resolved.suffix in FORMATS or not _HUB_ID.fullmatch(path):
            files = []
        else:
            return None
        if not files:
            where = f" ending in {', '.join(FORMATS)} in the folder" if resolved.is_dir() else ""
            raise ConfigError(f"{self.key}.path: there is no file{where} {path}")
        formats = {FORMATS.get(file.suffix, file.suffix) for file in files}
        if len(formats) > 1 or not formats <= set(FORMATS.values()):
            raise ConfigError(
                f"{self.key}.path: {path} matches files of format {', '.join(sorted(formats))}; "
                f"give files of one format, ending in {', '.join(FORMATS)}"
            )
        return files

    def python_function(self) -> Callable[..., Any]:
        """Import the function of a ``python:package.module:function`` path.

        Raises:
            ConfigError: the path is not of this form, or there is no such module or function.
        """
        path, function = self.config.path, None
        try:
            function = pkgutil.resolve_name(path.removeprefix(PYTHON))
            reason = f"{type(function).__name__} is not a function"
        except (ValueError, ModuleNotFoundError, AttributeError) as error:
            reason = first_line(error)
        if not callable(function):
            raise ConfigError(f"{self.key}.path: {path} must be of the form python:package.module:function ({reason})")
        return cast(Callable[..., Any], function)

    def _resolved(self) -> Path:
        return Path(resolve_path(self.config.path)).expanduser()

    def _rows(self) -> Iterator[_Row]:
        if self.config.path.startswith(PYTHON):
            return self._python_rows()
        files = self.local_files()
        if files is not None and not self._resolved().is_dir():
            readers = {"json": self._json_rows, "parquet": self._parquet_rows}
            if (reader := readers.get(FORMATS[files[0].suffix])) is not None:
                return chain.from_iterable(map(reader, files))
        return self._streamed_rows(files)

    def _python_rows(self) -> Iterator[_Row]:
        function, path = self.python_function(), self.config.path
        try:
            inspect.signature(function).bind(**self.config.kwargs)
        except TypeError as error:
            raise ConfigError(f"{self.key}.kwargs: {path}: {error}") from error
        for number, row in enumerate(function(**self.config.kwargs), 1):
            if not isinstance(row, Mapping):
                raise ConfigError(
                    f"{self.key}.path: {path} must yield dictionaries; its row {number} is a {type(row).__name__}"
                )
            yield _Row(path, number, row)

    def _json_rows(self, file: Path) -> Iterator[_Row]:
        """Read JSON lines, or one JSON array.

        Not through ``datasets``: its JSON reader infers one type per column and stops at answers like 5 among "1/2",
        and its errors name neither the file nor the line.
        """
        number = 0
        try:
            with file.open(encoding="utf-8-sig") as stream:
                start = " "
                while start.isspace():
                    start = stream.read(1)
                stream.seek(0)
                lines = (line for line in stream if line.strip())
                for row in json.load(stream) if start == "[" else map(json.loads, lines):
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object, found {type(row).__name__}")
                    number += 1
                    yield _Row(str(file), number, row)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.key}.path: {file}: row {number + 1}: {first_line(error)}") from error

    def _parquet_rows(self, file: Path) -> Iterator[_Row]:
        """Read a Parquet file batch by batch; ``datasets`` would decode the whole of it ahead."""
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                batches = parquet.iter_batches(1024, columns=self._only_used(parquet.schema_arrow.names))
                for values in chain.from_iterable(batch.to_pylist() for batch in batches):
                    number += 1
                    yield _Row(str(file), number, values)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{self.key}.path: {file}: row {number + 1}: {first_line(error)}") from error

    def _only_used(self, columns: Iterable[str]) -> list[str] | None:
        """Return the columns that are used, or None for all where one is missing: the message then shows them all."""
        wanted = list(dict.fromkeys(self.config.columns.named().values()))
        return wanted if set(wanted) <= set(columns) else None

    def _streamed_rows(self, files: list[Path] | None) -> Iterator[_Row]:
        """Read the hub, or local files, through ``datasets``, always as a stream."""
        config, number = self.config, 0
        try:
            stream = self._open_stream(files)
            if wanted := self._only_used(stream.column_names or ()):
                stream = stream.select_columns(wanted)  # nothing else is downloaded and decoded
            for row in stream:
                number += 1
                yield _Row(config.path, number, row)
        except Exception as error:  # of fsspec, httpx, pyarrow, ...: datasets lets them through, and all mean the same
            where = f" after row {number}" if number else ""
            advice = "" if files is not None else "; give a local file, or check its name, split and the network"
            raise ConfigError(
                f"{self.key}: cannot read {config.path} (split {config.split!r}){where}: {first_line(error)}{advice}"
            ) from error

    def _open_stream(self, files: list[Path] | None) -> Any:
        import datasets

        config = self.config
        if files is None:
            return datasets.load_dataset(
                config.path, config.name, split=config.split, revision=config.revision, streaming=True, **config.kwargs
            )
        folder = self._resolved()
        if not folder.is_dir():
            form = FORMATS[files[0].suffix]
            return datasets.load_dataset(form, data_files=[str(file) for file in files], split="train", streaming=True)
        if not any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            # File names like test-00000.parquet name splits, which load_dataset tells apart.
            return datasets.load_dataset(str(folder), config.name, split=config.split, streaming=True)
        saved = datasets.load_from_disk(str(folder))  # written by save_to_disk
        if isinstance(saved, datasets.DatasetDict):
            if config.split not in saved:
                raise ValueError(f"there is no split {config.split!r}, only {', '.join(saved)}")
            saved = saved[config.split]
        return saved.to_iterable_dataset()

    def _check_columns(self, row: _Row) -> None:
        for key, column in self.config.columns.named().items():
            if column not in row.values:
                advice = "" if key.startswith(("problem", "extra")) else ", or null where there is none"
                raise ConfigError(
                    f"{self.key}.columns.{key}: {self.config.path} has no column {column!r}, only "
                    f"{', '.join(map(repr, row.values))}; name the right one{advice}"
                )


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back exactly; tuples and keys that are numbers, for example, would change."""
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (str, int, float, bool)
