"""Checkpoints: the last state, for resuming, and the best one, for use."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from typing import Any, Literal, cast

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from hdpo.checkpoints import DirectIO, save_checkpoint
from hdpo.distributed import all_max
from hdpo.errors import ConfigError, StopRequested, TrainingStopped, check_at_least
from hdpo.files import run_folder


class _RunCheckpoint(Checkpoint):
    """Where a run's checkpoints are."""

    def __init__(self, dirpath: str | None) -> None:
        self.dirpath = dirpath

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let checkpoints be written beside their place, unless the user has brought a way of their own."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DirectIO()

    def folder(self, trainer: Any) -> Path:
        """The folder of the checkpoints; all ranks must ask together."""
        run = run_folder(trainer)
        return Path(self.dirpath) if self.dirpath else run / "checkpoints"


class LastCheckpoint(_RunCheckpoint):
    """Keeps ``last.ckpt``, with everything that an exact resume needs, and the one before it.

    It is written at each interval, after the last step, and when a run of one process breaks off before the update of a
    step; where it breaks off later, what the step is remembered by is not complete, and what stays is what was saved.
    A run that is asked to end (SIGTERM or SIGINT, to any of its processes) finishes its step on all of them, saves and
    ends with status 75; a second SIGINT ends it at once. After an error in one of several processes what stays is the
    checkpoint of the last interval.

    Args:
        every_n_steps: interval in optimizer steps.
        dirpath: folder; null for ``checkpoints`` in the run's folder, where ``--resume auto`` looks.
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | None = None) -> None:
        check_at_least(1, checkpoint__every_n_steps=every_n_steps)
        super().__init__(dirpath)
        self.every_n_steps = every_n_steps
        self._saved_step: int | None = None
        self._ended_step: int | None = None  # with all that its callbacks do
        self._asked_to_end: str | None = None
        self._listening = False
        self._at_once = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start anew: a callback may serve several fits."""
        super().setup(trainer, pl_module, stage)
        self._saved_step, self._asked_to_end, self._listening, self._at_once = None, None, False, False
        self._ended_step = None

    # ------------------------------------------------------------------ asked to end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take note of signals, where Lightning's handlers would act wherever the process stands.

        Its handlers start collectives, or save. Unless all ranks are at the same place, they wait for each other
        forever, and the state in the middle of an update is none to save. Lightning puts back what was there before.
        """
        if self._saved_step is None:
            # That of the checkpoint which the run is resumed from, or 0.
            self._saved_step = self._ended_step = trainer.global_step
        if not self._listening and threading.current_thread() is threading.main_thread():
            self._listening = True
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._take_note)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen from the evaluation before the first step on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.on_train_start(trainer, pl_module)

    def _take_note(self, number: int, frame: object) -> None:
        if self._asked_to_end and number == signal.SIGINT:
            self._at_once = True
            raise StopRequested("SIGINT twice")
        self._asked_to_end = signal.Signals(number).name
        print(f"{self._asked_to_end}: the run saves and ends after this step or batch", flush=True)

    def _end_if_asked(self, module: Any) -> None:
        """End on all ranks if any was asked to."""
        if self._listening and all_max([self._asked_to_end is not None], module.device)[0]:
            _expect_all_to_end()
            raise StopRequested(self._asked_to_end or "another process was asked to end")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End in the middle of an evaluation, too: a run that is resumed repeats it."""
        self._end_if_asked(pl_module)

    # ------------------------------------------------------------------ saved

    def _save(self, trainer: Any) -> None:
        if trainer.global_step != self._saved_step:
            save_checkpoint(trainer, self.folder(trainer), "last", num_kept=2)
            self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at the interval and after the last step; end if asked to."""
        self._ended_step = trainer.global_step  # Lightning lets checkpoints come after all other callbacks
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        self._end_if_asked(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep the state of a run that breaks off, where it is one that training can go on from.

        Not before training begins, nor between the begin of an update and the end of its step, nor where training
        stopped itself, nor where one of several ranks may be alone with its error: writing a checkpoint takes all of
        them, and waiting for the others it would hang.
        """
        alone = trainer.world_size == 1 or (isinstance(exception, StopRequested) and not self._at_once)
        spoilt = isinstance(exception, ConfigError | TrainingStopped) or pl_module.is_updating
        if isinstance(exception, TrainingStopped):
            _expect_all_to_end()
        spoilt |= trainer.global_step != self._ended_step  # a step that has not noted its cliffs and what it spent
        begun = trainer.state.fn == TrainerFn.FITTING and self._saved_step is not None
        if begun and alone and not spoilt:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            if progress.total.processed < progress.total.ready:  # the step under way comes again
                for count in (progress.total, progress.current):
                    count.ready = count.started = count.processed = count.completed
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last step too, however the run ended."""
        self._save(trainer)


def _expect_all_to_end() -> None:
    """Let this process end with a status of its own.

    Where Lightning has started the others, a thread of its looks every few seconds for one that has ended with a status
    other than 0, and then kills this process, though all of them are about to end in the same way.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            cast(Any, thread)._child_processes = []


class BestCheckpoint(_RunCheckpoint):
    """Keeps the checkpoint with the best validation metric, ``best.ckpt``.

    Args:
        monitor: name of the metric, for example ``val/pass@8`` or ``val/greedy_accuracy``; ``auto`` for pass@k with the
            largest of ``model.pass_k`` that all evaluation sets have the samples for; null for no best checkpoint.
        mode: whether the best is the largest (``max``) or the smallest (``min``).
        dirpath: folder; null for ``checkpoints`` in the run's folder, where ``--resume auto`` looks.
    """

    def __init__(
        self, monitor: str | None = "auto", mode: Literal["max", "min"] = "max", dirpath: str | None = None
    ) -> None:
        super().__init__(dirpath)
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Settle the metric, and refuse one that no evaluation will have before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if trainer.global_step == 0:
            self.best_score = None  # that of another fit is none of this one
        if getattr(trainer.datamodule, "evaluated_split", None) == "test" and self.monitor is not None:
            raise ConfigError(
                "best_checkpoint.monitor must be null where data.evaluation_split is test (--config eval/test sets "
                "both): what is reported must not choose the checkpoint"
            )
        if self.monitor == "auto":
            self.monitor = f"val/pass@{max(pl_module.evaluated_k()[''])}"
        elif self.monitor is not None and self.monitor.startswith("val/pass@"):
            known = [f"val/pass@{k}" for k in pl_module.evaluated_k()[""]]
            if self.monitor not in known:
                raise ConfigError(
                    f"best_checkpoint.monitor is {self.monitor}, but model.pass_k gives {', '.join(known)}"
                )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the policy that was evaluated, if it is the best."""
        if self.monitor is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ConfigError(f"best_checkpoint.monitor is {self.monitor}, but the evaluation has only {known}")
        score = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if not math.isnan(score) and (self.best_score is None or sign * score > sign * self.best_score):
            self.best_score = score
            save_checkpoint(trainer, self.folder(trainer), "best", num_kept=1)

    def state_dict(self) -> dict[str, Any]:
        """The score of the best policy so far."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the score of the checkpoint."""
        self.best_score = state_dict["best_score"]
