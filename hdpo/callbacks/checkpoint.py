"""Checkpoints: the last state, for resuming, and the best one, for use."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hdpo.distributed import all_max

__all__ = ["BestCheckpoint", "LastCheckpoint"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _siblings(path: Path) -> tuple[Path, Path]:
    """Where the checkpoint at ``path`` is written: first the one that ``path`` is no link to."""
    one, two = (path.with_name(f".{path.name}.{letter}") for letter in "ab")
    return (two, one) if path.is_symlink() and os.readlink(path) == one.name else (one, two)


def _put_in_place(path: Path) -> None:
    """Let ``path`` be what was written to its first sibling; at every moment it is a whole checkpoint.

    No system call replaces a folder by another. So the path of a folder is a link, and the link is replaced.
    """
    written, other = _siblings(path)
    if not written.is_dir():
        os.replace(written, path)
    else:
        if path.is_dir() and not path.is_symlink():  # a copy that somebody made
            _remove(other)
            path.rename(other)
        link = path.with_name(f".{path.name}.link")
        _remove(link)
        link.symlink_to(written.name)
        os.replace(link, path)
    _remove(other)


class _AtomicCheckpoint(ModelCheckpoint):
    """Writes a checkpoint beside its path; it takes the path when all ranks have written their part.

    Lightning writes an FSDP2 checkpoint into the folder of the one before, and moves a file there from another file
    system: a run that is killed meanwhile leaves neither the old nor the new one.
    """

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        if "://" in filepath:
            super()._save_checkpoint(trainer, filepath)
            return
        path = Path(filepath)
        written = Path(trainer.strategy.broadcast(str(_siblings(path)[0])))
        if trainer.is_global_zero:
            _remove(written)  # what a killed run left
        trainer.strategy.barrier()
        trainer.save_checkpoint(written, self.save_weights_only)  # ends with a barrier
        if trainer.is_global_zero:
            _put_in_place(path)
        trainer.strategy.barrier()
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)


class LastCheckpoint(_AtomicCheckpoint):
    """Keeps ``last.ckpt``, with everything that an exact resume needs.

    It is written at each interval, after the last step, and when a run of one process breaks off. A run of several
    processes is also saved when any of them is asked to end (SIGTERM): all of them finish the step, save and end.
    After an error in one of them what stays is the checkpoint of the last interval.

    Args:
        every_n_steps: interval in optimizer steps.
        dirpath: folder; null for ``checkpoints`` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self._asked_to_end: bool | None = None  # None: Lightning's handler is in place

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start anew: a callback may serve several fits."""
        super().setup(trainer, pl_module, stage)
        self._asked_to_end = None

    def _listen(self, trainer: Any) -> None:
        """Take note of SIGTERM, where several processes must end together.

        Lightning's handler starts a collective wherever the process happens to be. Unless all ranks are at the same
        one, they wait for each other for ever.
        """
        several = trainer.state.fn == TrainerFn.FITTING and trainer.world_size > 1
        if several and self._asked_to_end is None and threading.current_thread() is threading.main_thread():
            self._asked_to_end = False
            # Lightning puts back what was there before the fit.
            signal.signal(signal.SIGTERM, self._take_note)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen from the evaluation before the first step on."""
        self._listen(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen from the first step on, where there was no evaluation before it."""
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)

    def _take_note(self, *_: object) -> None:
        self._asked_to_end = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at the interval; end on all ranks if any was asked to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._asked_to_end is not None and all_max([self._asked_to_end], pl_module.device)[0]:
            raise SIGTERMException

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep the state of a run that breaks off, unless one of several ranks may be alone with its error.

        Writing a checkpoint takes all ranks. One that fails must end, so that the launcher ends the others: waiting for
        them to write, it would hang.
        """
        if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last step too, also if it is not a multiple of the interval."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)


class BestCheckpoint(_AtomicCheckpoint):
    """Keeps the checkpoint with the best validation metric.

    Args:
        monitor: name of the metric, for example ``val/pass@8`` or ``val/greedy_accuracy``; ``auto`` for pass@k with the
            largest of ``model.pass_k``; null for no best checkpoint.
        mode: whether the best is the largest (``max``) or the smallest (``min``).
        dirpath: folder; null for ``checkpoints`` in the run's folder.
    """

    def __init__(
        self, monitor: str | None = "auto", mode: Literal["max", "min"] = "max", dirpath: str | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1 if monitor else 0,
            # A metric's name holds a slash, which would become a folder.
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Settle the metric, and refuse one that no evaluation will have before anything is trained."""
        if self.monitor == "auto":
            self.monitor = f"val/pass@{max(pl_module.pass_k)}"
        elif self.monitor is not None and self.monitor.startswith("val/pass@"):
            known = [f"val/pass@{k}" for k in pl_module.pass_k]
            if self.monitor not in known:
                raise ValueError(
                    f"best_checkpoint.monitor is {self.monitor}, but model.pass_k gives {', '.join(known)}"
                )
        super().setup(trainer, pl_module, stage)
