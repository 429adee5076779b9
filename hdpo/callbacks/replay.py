"""Expand, then sharpen: distilled cliffs come back into the batch, where RL can sharpen what they have made reachable.

The paper's future work. A cliff that was distilled returns after a delay; if a rollout of it then succeeds it is
converted, and returns once more to see whether that lasts.
"""

from __future__ import annotations

import math
from typing import Any

from hdpo.callbacks.station import Station
from hdpo.distributed import gather_objects
from hdpo.errors import ConfigError, check_at_least
from hdpo.experience import Experience

__all__ = ["CliffReplay"]


class CliffReplay(Station):
    """Brings distilled cliffs back: they take the last places of a batch.

    Logged are ``replay/converted`` and ``replay/durable``, the shares of the cliffs that come back for the first and
    for the second time of which a rollout succeeds without help.

    Args:
        max_share: at most this share of a batch are former cliffs; 0 for none.
        after_steps: steps from distillation to the first return, and from there to the second.

    Raises:
        ConfigError: a share outside [0, 1], or a delay below 1.
    """

    def __init__(self, max_share: float = 0.0, after_steps: int = 20) -> None:
        if not 0 <= max_share <= 1:
            raise ConfigError(f"replay.max_share must be in [0, 1], got {max_share}")
        check_at_least(1, replay__after_steps=after_steps)
        self.max_share = max_share
        self.after_steps = after_steps
        # Row of the training problems -> (step at which it is due, returns so far). The same on all ranks.
        self._waiting: dict[int, tuple[int, int]] = {}
        #: Positions in the global batch -> row of the former cliff that stands there in this step.
        self._returned: dict[int, int] = {}

    def after_prompts(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Put former cliffs whose time has come at the end of the global batch."""
        self._returned = {}
        if self.max_share == 0:
            return
        size = trainer.datamodule.prompts_per_step
        due = sorted((step, row) for row, (step, _) in self._waiting.items() if step <= trainer.global_step)
        rows = [row for _, row in due[: math.floor(self.max_share * size)]]
        self._returned = {size - len(rows) + i: row for i, row in enumerate(rows)}
        index = batch.prompts.index.tolist()
        positions = [position for position, i in enumerate(index) if i in self._returned]
        if positions:
            own = [index[position] for position in positions]
            others = trainer.datamodule.dataset("train").prompts([self._returned[i] for i in own], own)
            batch.prompts = batch.prompts.with_others(positions, others)
        batch.measurements.add("replay/share", len(positions), len(batch))

    def after_cliffs(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Note which former cliffs are solved now without help."""
        if not self._returned:
            return
        assert batch.rollouts is not None
        solved: dict[int, bool] = {}
        for position, i in enumerate(batch.prompts.index.tolist()):
            if (row := self._returned.get(i)) is not None:
                solved[row] = bool(batch.rollouts.success[position].any())
                name = "durable" if self._waiting[row][1] else "converted"
                batch.measurements.add(f"replay/{name}", float(solved[row]))
        for part in gather_objects(solved):
            for row, success in part.items():
                _, returns = self._waiting.pop(row)
                if success and returns == 0:
                    self._waiting[row] = (trainer.global_step + self.after_steps, 1)

    def after_distillation(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Let the cliffs that are distilled in this step return later."""
        refreshed = trainer.global_step % pl_module.distillation.refresh_every == 0
        if self.max_share == 0 or batch.distillation is None or not refreshed:
            return
        row_of = dict(zip(batch.prompts.index.tolist(), batch.prompts.row.tolist(), strict=True))
        for rows in gather_objects(sorted({row_of[i] for i in batch.distillation.index})):
            for row in rows:
                self._waiting[row] = (trainer.global_step + self.after_steps, 0)

    def state_dict(self) -> dict[str, Any]:
        """Who is waiting, the same on all ranks."""
        return {"waiting": [[row, *when] for row, when in self._waiting.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._waiting = {row: (step, returns) for row, step, returns in state_dict["waiting"]}
