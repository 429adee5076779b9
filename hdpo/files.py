"""Paths and Python objects that a configuration may name, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdpo.errors import ConfigError, first_line

#: A full disk, or a quota.
FULL = (errno.ENOSPC, errno.EDQUOT)
_PACKAGE = "pkg://"


def resolve_path(path: str) -> str:
    """Resolve ``pkg://package.module/folder`` to the folder inside that installed package; return others unchanged.

    Raises:
        ConfigError: the package or the folder does not exist.

    Example:
        >>> resolve_path("Qwen/Qwen2.5-Math-1.5B-Instruct")
        'Qwen/Qwen2.5-Math-1.5B-Instruct'
    """
    if not path.startswith(_PACKAGE):
        return path
    package, _, inner = path.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{path}: there is no installed package {package!r}")
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    if not folder.exists():
        raise ConfigError(f"{path}: the package {package!r} has no {inner!r}")
    return str(folder)


def find_config(name: str) -> str:
    """Return the path of a configuration file: ``name`` itself, or the one of that name that ships with the package.

    Raises:
        ConfigError: there is neither.

    Example:
        >>> Path(find_config("lab")).name, Path(find_config("strategy/ddp.yaml")).name
        ('lab.yaml', 'ddp.yaml')
    """
    package = Path(__file__).parent
    shipped = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())  # a wheel; a checkout
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml")))
    raise ConfigError(f"--config: there is no file {name!r}, and none of that name ships with hdpo (these do: {known})")


def run_folder(trainer: Any) -> Path:
    """The folder of a run: the logger's, or ``default_root_dir`` without one.

    All ranks must call it: Lightning broadcasts the first rank's, and a rank alone would wait forever.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Let a file appear under ``path`` whole or not at all, also if the process is killed or the disk fills up.

    Args:
        path: the file; missing folders are created, an existing file is replaced.

    Yields:
        A path beside it to write to, which is flushed to disk and takes its place when the block ends without an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Let the files of a folder appear whole or not at all, as :func:`whole_file`; what else is in it stays.

    Args:
        folder: created where it is missing.

    Yields:
        An empty folder beside it to write to.

    Raises:
        OSError: what the system says, also where a library (safetensors) has an error of its own for it.
    """
    folder = Path(folder)
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in files:
            flush(path)
        for path in files:
            place = folder / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) that appears whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def import_object(key: str, path: str) -> Any:
    """Import what ``package.module:name`` names; what is in the working folder is found where Python looks there.

    Args:
        key: the configuration key that the message names.
        path: module and name, separated by a colon.

    Raises:
        ConfigError: the path is not of this form, there is no such module or name, or the module fails.

    Example:
        >>> import_object("reward", "math:gcd")(4, 6)
        2
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}: {path!r} is not of the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is not there, or whatever it does when it is imported
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{key}: {path}: the module {module_name} cannot be imported ({reason})") from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}: {path}: the module {module_name} has no {name!r}")
    return getattr(module, name)
