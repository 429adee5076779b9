"""Steps that were not taken, since their loss or gradient was not finite: kept for inspection, and counted."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from hdpo.checkpoints import DirectIO
from hdpo.errors import TrainingStopped
from hdpo.experience import Experience
from hdpo.files import run_folder, whole_file


class SkippedSteps(Callback):
    """Writes the batch of a skipped step to ``skipped`` in the run's folder; stops training after too many in a row.

    How many are too many is ``model.update.max_skipped_steps``. The module brings this callback.
    """

    def __init__(self) -> None:
        self.num_in_a_row = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Count, and write on every rank what it trained on.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
            OSError: the batch cannot be written.
        """
        if not batch.metrics["optim/skipped"]:
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        step, most = trainer.global_step - 1, pl_module.update.max_skipped_steps
        path = run_folder(trainer) / "skipped" / f"step_{step:06d}.rank{trainer.global_rank}.pt"
        with whole_file(path) as partial:
            DirectIO().save_checkpoint(batch.as_plain_data(), partial)
        if self.num_in_a_row >= most:
            raise TrainingStopped(
                f"loss or gradient norm was not finite in {most} steps in a row, up to step {step}; no weight was "
                f"changed by what is not finite, and their batches are in {path.parent}: lower the learning rate and "
                "start anew, from the policy that `export` makes of last.ckpt if you like"
            )
        rank_zero_warn(f"step {step} is skipped: loss or gradient norm is not finite (its batch: {path})")

    def state_dict(self) -> dict[str, Any]:
        """The count, which goes on when the run is resumed."""
        return {"num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_in_a_row = state_dict["num_in_a_row"]
