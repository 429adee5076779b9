"""Expand, then sharpen: distilled cliffs come back into the batch, where RL can sharpen what they have made reachable.

The paper's future work. A cliff that was distilled returns after a delay; if a rollout of it then succeeds it is
converted, and returns once more to see whether that lasts.
"""

from __future__ import annotations

import math
from typing import Any

from hdpo.callbacks.station import Station
from hdpo.errors import ConfigError, check_at_least
from hdpo.experience import Experience


class CliffReplay(Station):
    """Brings distilled cliffs back into later batches, of which they take the last places.

    Logs ``replay/converted`` and ``replay/durable``: the share with a rollout that succeeds without help, among the
    cliffs that come back for the first and for the second time.

    Args:
        max_share: largest share of a batch that may be former cliffs; 0 for none.
        after_steps: steps from distillation to the first return, and from there to the second.

    Raises:
        ConfigError: a share outside [0, 1], a delay below 1, or prompts are exchanged too (``rollouts.max_resamples``).
    """

    def __init__(self, max_share: float = 0.0, after_steps: int = 20) -> None:
        if not 0 <= max_share <= 1:
            raise ConfigError(f"replay.max_share must be in [0, 1], got {max_share}")
        check_at_least(1, replay__after_steps=after_steps)
        self.max_share = max_share
        self.after_steps = after_steps
        #: Positions in the global batch -> row of the former cliff that stands there in this step, and its returns.
        self._returned: dict[int, list[int]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse to bring back what is exchanged at once: of what was put in its place the shares would be."""
        if self.max_share > 0 and pl_module.rollouts.max_resamples:
            raise ConfigError(
                "replay.max_share brings former cliffs back (of the run that a checkpoint is from), but "
                "rollouts.max_resamples exchanges those that still are ones for other prompts: set one of them to 0"
            )

    def _due(self, history: Any, now: int) -> list[tuple[int, int, int]]:
        """Cliffs whose time has come: (since when, row, returns). One that is seen by chance has returned, too."""
        due = []
        for row, distilled in history.distilled.items():
            later = [visit for visit in history.visits[row] if visit.step > distilled]
            since = (later[-1].step if later else distilled) + self.after_steps
            if since <= now and (not later or (len(later) == 1 and later[0].successes)):
                due.append((since, row, len(later)))
        return sorted(due)

    def after_prompts(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Put former cliffs whose time has come at the end of the global batch."""
        self._returned = {}
        if self.max_share == 0:
            return
        size = trainer.datamodule.prompts_per_step
        due = self._due(pl_module.cliffs.history, trainer.global_step)[: math.floor(self.max_share * size)]
        self._returned = {size - len(due) + i: entry for i, (_, *entry) in enumerate(due)}
        index = batch.prompts.index.tolist()
        positions = [position for position, i in enumerate(index) if i in self._returned]
        if positions:
            own = [index[position] for position in positions]
            others = trainer.datamodule.dataset("train").prompts([self._returned[i][0] for i in own], own)
            batch.prompts = batch.prompts.with_others(positions, others)
        batch.measurements.add("replay/share", len(positions), len(batch))

    def after_cliffs(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Measure which former cliffs are solved now without help."""
        assert batch.rollouts is not None
        for i, success in zip(batch.prompts.index.tolist(), batch.rollouts.success.any(-1).tolist(), strict=True):
            if i in self._returned:
                batch.measurements.add(f"replay/{'durable' if self._returned[i][1] else 'converted'}", float(success))
