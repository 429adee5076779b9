"""Which folder a run writes to: claimed for it alone, locked while it runs, and found again to go on with it."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hdpo.checkpoints import read_header, saved_checkpoints
from hdpo.errors import ConfigError
from hdpo.files import FULL, write_text

_FINISHED, _LOCK, _CONFIG = "finished", ".lock", "config.yaml"
_VERSION = re.compile(r"version_(\d+)")
#: What is written before a run begins, and what it produces then.
_OPENING = re.compile(r"config\.yaml|hparams\.yaml|events\.out\.tfevents\..*|" + re.escape(_LOCK))
_PRODUCTS = ("checkpoints", "evaluations", "tests", "predictions.jsonl", "samples.jsonl", "skipped")
#: Keys in which a run may differ from the one that it continues.
_NOT_IDENTITY = ("ckpt_path", "resume", "weights_only", "config", "progress")
#: Keys of the commands that do not train.
_OF_OTHERS = ("verbose", "return_predictions")
_NOT_IDENTITY_TRAINER = ("devices", "num_nodes", "enable_progress_bar", "default_root_dir")


@dataclass
class RunFolder:
    """Where a configuration's runs are: ``root/version``.

    Attributes:
        root: the logger's folder, which holds one folder per run.
        version: name of the run's folder; None for a new one.
        settings: the logger's ``init_args``, where the version is set; None for loggers without versions, whose folder
            is ``root`` itself.
    """

    root: Path
    version: str | None
    settings: Any | None
    _lock: FileLock | None = None
    _found: dict[str, bytes | None] = field(default_factory=dict)
    _curves: Path | None = None
    _products: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: Any) -> RunFolder:
        """Read it from the ``trainer`` section."""
        logger = trainer.get("logger")
        first = logger[0] if isinstance(logger, list) and logger else logger
        settings = first.get("init_args") if hasattr(first, "get") else None
        if settings is None or not str(first["class_path"]).endswith(("TensorBoardLogger", "CSVLogger")):
            where = (settings.get("save_dir") if settings is not None else None) or trainer.get("default_root_dir")
            return cls(Path(where or "."), None, None)
        version = settings.get("version")
        name = f"version_{version}" if isinstance(version, int) else version
        return cls(Path(settings["save_dir"]) / (settings.get("name") or ""), name, settings)

    @property
    def path(self) -> Path:
        """The run's folder; known once it has a version."""
        return self.root / self.version if self.version else self.root

    def runs(self) -> list[Path]:
        """The folders of earlier runs, the newest first."""
        if self.settings is None or self.version:
            return [self.path] if (self.path / _CONFIG).is_file() else []
        found = [(int(m[1]), p) for p in self.root.glob("version_*") if (m := _VERSION.fullmatch(p.name))]
        return [p for _, p in sorted(found, reverse=True) if (p / _CONFIG).is_file()]

    def use(self, run: Path) -> None:
        """Continue an earlier run, wherever it is."""
        if self.settings is not None:
            if self.root.resolve() != run.parent.resolve():
                self.root = run.parent
                self.settings["save_dir"], self.settings["name"] = str(run.parent.parent), run.parent.name
            self.settings["version"] = self.version = run.name

    def claim(self, *, again: bool) -> None:
        """Take the folder for this process: a new one, or one that nobody else is writing to.

        Args:
            again: whether a run that is in the folder is to be continued.

        Raises:
            ConfigError: it holds another run, or one that is running.
        """
        if _get_rank() not in (None, 0):
            return  # the first process's folder is broadcast to the others
        if self.settings is not None and self.version is None:
            self._make(self.root)
            taken = [int(m[1]) for p in self.root.iterdir() if (m := _VERSION.fullmatch(p.name))]
            for number in itertools.count(max(taken, default=-1) + 1):
                self.version = f"version_{number}"
                try:
                    self.path.mkdir()  # of two processes, one succeeds
                    break
                except FileExistsError:
                    continue
            self.settings["version"] = self.version
        self._make(self.path)
        used = (self.path / _LOCK).exists()
        self._lock = FileLock(self.path / _LOCK)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"{self.path} belongs to a run that is running: end it, or give this one another "
                "trainer.logger.init_args.version (null for the next free one)"
            ) from None
        if not again and (self.path / _CONFIG).exists():
            self.release()
            raise ConfigError(
                f"{self.path} holds a run already: continue it with --resume auto, give another "
                "trainer.logger.init_args.version (null for the next free one), or remove the folder"
            )
        kept = (_CONFIG, _FINISHED)
        found = (p for p in self.path.iterdir() if used or p.name != _LOCK)
        self._found = {p.name: p.read_bytes() if p.name in kept else None for p in found}
        (self.path / _FINISHED).unlink(missing_ok=True)
        self._products = self._written()
        curves = self.path / "metrics.csv"
        if again and curves.is_file():  # Lightning's CSVLogger would delete it
            self._curves = curves.rename(self.path / f"metrics.{len(list(self.path.glob('metrics.*.csv')))}.csv")

    def _make(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in FULL:
                raise
            key = "trainer.default_root_dir" if self.settings is None else "trainer.logger.init_args.save_dir"
            raise ConfigError(f"{key}: cannot create the folder {path}: {error.strerror}") from error

    def _written(self) -> dict[Path, int]:
        """When each file of what a run produces was last written."""
        parts = [self.path / name for name in _PRODUCTS]
        return {p: p.stat().st_mtime_ns for part in parts for p in (part, *part.rglob("*")) if p.exists()}

    def withdraw(self) -> None:
        """Leave the folder as it was found, where a mistake of the user's ends a run that has produced nothing."""
        if self._lock is None or self._written() != self._products:
            return
        for path in list(self.path.iterdir()):
            if path.name not in self._found and _OPENING.fullmatch(path.name):
                path.unlink()
        for name, content in self._found.items():
            if content is not None:
                (self.path / name).write_bytes(content)
        if self._curves is not None:
            self._curves.rename(self.path / "metrics.csv")

    def release(self) -> None:
        """Let others have it; a run's own folder in which nothing was written is removed."""
        if self._lock is None:
            return
        if all(p.name == _LOCK for p in self.path.iterdir()):
            (self.path / _LOCK).unlink(missing_ok=True)
            if self.settings is not None:  # otherwise it is the user's, perhaps the working folder
                self.path.rmdir()
        self._lock.release()
        self._lock = None


def mark_finished(run: Path) -> None:
    """Note that the run in a folder has reached its end."""
    write_text(run / _FINISHED, "")


def is_finished(run: Path) -> bool:
    """Whether a run has reached its end."""
    return (run / _FINISHED).exists()


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run, at different times."""
    kept = {key: value for key, value in config.items() if key not in (*_NOT_IDENTITY, *_OF_OTHERS)}
    kept["trainer"] = {k: v for k, v in (kept.get("trainer") or {}).items() if k not in _NOT_IDENTITY_TRAINER}
    logger = kept["trainer"].get("logger")
    for one in logger if isinstance(logger, list) else [logger]:
        if isinstance(one, dict):
            for where in ("save_dir", "name", "version"):
                one.get("init_args", {}).pop(where, None)
    return kept


def _same_runs(folder: RunFolder, config: str) -> Iterator[Path]:
    wanted = _identity(yaml.safe_load(config))
    for run in folder.runs():
        try:
            known = yaml.safe_load((run / _CONFIG).read_text(encoding="utf-8"))
            if _identity(known) == wanted and not any(key in known for key in _OF_OTHERS):
                yield run
        except (OSError, yaml.YAMLError, AttributeError):
            continue


def find_run(folder: RunFolder, config: str, name: str = "last") -> tuple[Path | None, Path | None]:
    """Find the newest run of a configuration that has a good checkpoint, and that checkpoint.

    Args:
        folder: where runs are.
        config: the configuration, as the YAML that a run's ``config.yaml`` would hold.
        name: ``last`` or ``best``.

    Returns:
        The run's folder and the checkpoint. Where no run has a checkpoint, the newest run and None, or None twice.
    """
    runs = list(_same_runs(folder, config))
    for run in runs:
        unreadable: list[Path] = []
        for checkpoint in saved_checkpoints(run / "checkpoints", name):
            try:
                read_header("checkpoint", checkpoint)
            except ConfigError as error:
                if _get_rank() in (None, 0):
                    print(f"{error}; the one before it is tried", file=sys.stderr)
                unreadable.append(checkpoint)
            else:
                _set_aside(unreadable)
                return run.resolve(), checkpoint.resolve()
    return (runs[0].resolve() if runs else None), None


@rank_zero_only
def _set_aside(checkpoints: list[Path]) -> None:
    """Rename what cannot be read, so that it does not count as the newest."""
    for path in checkpoints:
        path.rename(path.with_name(f"unreadable-{path.name}"))
