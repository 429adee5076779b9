"""Second station: which prompts teach plain RL nothing (paper, Algorithm 1, line 6)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from hdpo.callbacks.history import CliffHistory
from hdpo.callbacks.sampling import solution_ids
from hdpo.callbacks.station import run_stations
from hdpo.errors import check_at_least
from hdpo.experience import Experience, Rollouts
from hdpo.functional import has_variance


class CliffDetection(Callback):
    """Marks the prompts on which all rollouts failed (cliffs), logs their sources, and which of them are solved later.

    A cliff needs a verdict on every rollout: one that could not be graded may have been a success. A prompt without
    success whose verdicts are not complete is counted as ``cliff/ungraded``.

    Each cliff is remembered. Of those that are seen again, ``cliff/converted`` is the share with a success without
    help, ``cliff/converted_distilled`` the same share among those that were distilled in between, and
    ``cliff/steps_to_success`` the number of steps from the first failure to the first success.

    Args:
        threshold: a prompt is a cliff if the sum of its rewards is at most this (paper, Table 2: 0.0); null: if none of
            its rollouts is correct, which is the same where rewards are 1 and 0, and right for sums of rewards, too.
        reference_in_group: whether the reference solution joins a cliff's group as one more member with reward 1, which
            the policy did not write (LUFFY, arXiv 2504.14945); see
            ``model.policy_loss.init_args.off_policy_shaping``.
        max_reference_tokens: longer reference solutions do not join.

    Raises:
        ConfigError: a negative threshold.
    """

    def __init__(
        self, threshold: float | None = None, reference_in_group: bool = False, max_reference_tokens: int = 2048
    ) -> None:
        check_at_least(0, cliffs__threshold=threshold)
        check_at_least(1, cliffs__max_reference_tokens=max_reference_tokens)
        self.threshold = threshold
        self.reference_in_group = reference_in_group
        self.max_reference_tokens = max_reference_tokens
        #: All cliffs of the run so far, with their pass rates since.
        self.history = CliffHistory()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start anew: a module may serve several fits, and each that does not go on counts its steps from 0."""
        if stage == "fit" and trainer.global_step == 0:
            self.history = CliffHistory()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int) -> None:
        """Add ``batch.is_cliff``."""
        rollouts = batch.rollouts
        assert rollouts is not None, "RolloutGeneration completes the experience first"
        valid = rollouts.has_verdict
        low = ~rollouts.success.any(-1)
        if self.threshold is not None:
            low = rollouts.rewards.masked_fill(~valid, 0.0).sum(-1) <= self.threshold
        complete, varied = valid.all(-1), has_variance(rollouts.rewards, valid)
        batch.is_cliff = low & complete
        for name, prompts in (
            ("fraction", batch.is_cliff),
            ("mixed", varied),
            ("solved", complete & ~varied & ~low),
            ("ungraded", low & ~complete),
        ):
            batch.measurements.add(f"cliff/{name}", prompts.sum(), len(batch))
            for source, value in zip(batch.prompts.source, prompts.tolist(), strict=True):
                batch.measurements.add(f"cliff_by_source/{name}/{source}", float(value))
        self.history.visit(batch, trainer.global_step)
        if self.reference_in_group:
            batch.off_policy = self._references(pl_module, batch)
        run_stations("after_cliffs", trainer, pl_module, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Remember the step's cliffs; a skipped step has distilled nothing, unless its buffer outlives it."""
        self.history.finish(distilled=not batch.metrics["optim/skipped"] or pl_module.distillation.refresh_every > 1)

    def _references(self, module: Any, batch: Experience) -> Rollouts:
        """The reference solutions of the cliffs, one per prompt; none for the others."""
        assert batch.is_cliff is not None
        ids: list[list[int]] = [[] for _ in range(len(batch))]
        for i in batch.is_cliff.nonzero()[:, 0].tolist():
            solution = solution_ids(module, batch.prompts.solution[i]) if batch.prompts.solution[i] else []
            ids[i] = solution if len(solution) <= self.max_reference_tokens else []
        lengths = torch.tensor([[len(x)] for x in ids])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[..., None]
        completion_ids = torch.zeros(mask.shape, dtype=torch.int64)
        completion_ids[mask] = torch.tensor([token for x in ids for token in x], dtype=torch.int64)
        batch.measurements.add("spent/solutions", sum(map(bool, ids)), None)
        return Rollouts(
            completion_ids=completion_ids,
            completion_mask=mask,
            sampler_logps=torch.zeros(mask.shape),
            truncated=torch.zeros(lengths.shape, dtype=torch.bool),
            rewards=(lengths > 0).float(),
            outcomes=[["correct" if x else "none"] for x in ids],
            texts=[[batch.prompts.solution[i] if x else ""] for i, x in enumerate(ids)],
        )

    def state_dict(self) -> dict[str, Any]:
        """The cliffs so far."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.history.load_state_dict(state_dict)
