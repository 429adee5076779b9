"""The trained policy as a Hugging Face model at the end of ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from hdpo.checkpoints import all_finite
from hdpo.distributed import full_state_dict
from hdpo.errors import TrainingStopped, first_line
from hdpo.files import run_folder


class PolicyExport(Callback):
    """Writes policy and tokenizer at the end of ``fit``, in the format that transformers and vLLM load.

    Args:
        enabled: whether to write it.
        path: the folder; null for ``policy`` in the run's folder.
    """

    def __init__(self, enabled: bool = True, path: str | None = None) -> None:
        self.enabled = enabled
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the policy; every rank takes part, since it may be sharded.

        Raises:
            TrainingStopped: a weight is not finite, or the folder cannot be written.
        """
        if not self.enabled:
            return
        weights = full_state_dict(pl_module.student.model)
        folder = Path(self.path) if self.path else run_folder(trainer) / "policy"
        if trainer.is_global_zero:
            if not all_finite(weights.values()):
                raise TrainingStopped("the policy's weights are not finite, so it was not exported")
            try:
                pl_module.student.save(folder, pl_module.tokenizer, weights)
            except OSError as error:
                raise TrainingStopped(
                    f"the policy cannot be written to {folder} ({first_line(error)}); the last checkpoint holds it: "
                    "free space and resume, or write it elsewhere with `python -m hdpo export`"
                ) from error
            print(f"policy: {folder}")
