"""A callback that ends its own process at a chosen moment, once: the user's callback of the runs in test_kills.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

MOMENTS = ("step", "saving", "evaluating", "recording", "exporting", "anywhere")


class Killer(Callback):
    """Sends a signal to its own process, the first time that a run comes to a moment.

    Args:
        number: the signal's name.
        moment: ``step``: between rollouts and update; ``saving``: while a checkpoint is written; ``evaluating``: after
            the first batch of an evaluation; ``recording``: before its record is written; ``exporting``: while the
            policy is exported; ``anywhere``: ``after`` seconds from the first step on.
        step: optimizer steps at which it happens.
        after: seconds, for ``anywhere``.
        flag: a file; where it exists nothing happens.
    """

    def __init__(self, number: str, moment: str, step: int, flag: str, after: float = 0.0) -> None:
        assert moment in MOMENTS
        self.number, self.moment, self.step, self.after = getattr(signal, number), moment, step, after
        self.flag = Path(flag)

    def kill(self) -> None:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.moment == "anywhere":
            threading.Thread(target=lambda: (time.sleep(self.after), self.kill()), daemon=True).start()
        if self.moment == "saving":
            save = trainer.strategy.checkpoint_io.save_checkpoint

            def half(checkpoint: Any, path: Any, **options: Any) -> None:
                if trainer.global_step == self.step:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    Path(path).write_bytes(b"half of it")
                    self.kill()
                save(checkpoint, path, **options)

            trainer.strategy.checkpoint_io.save_checkpoint = half
        if self.moment == "exporting":
            write = pl_module.student.save

            def half_exported(folder: Any, *args: Any) -> None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / "model.safetensors").write_bytes(b"half of it")
                self.kill()
                write(folder, *args)

            pl_module.student.save = half_exported

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.moment == "step" and trainer.global_step == self.step:
            self.kill()

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.moment == "evaluating" and trainer.global_step == self.step:
            self.kill()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.moment == "recording" and trainer.global_step == self.step:
            self.kill()
