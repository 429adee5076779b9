"""Which rollouts of a step are put through the policy, and what its mean is over (paper, Algorithm 1, lines 4-5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdpo.experience import Experience, Sequences, merge_equal
from hdpo.functional import group_advantages, loss_denominator
from hdpo.functional.advantages import AdvantageScale
from hdpo.functional.policy_loss import Aggregation

__all__ = ["PolicyBatch", "Selection"]


@dataclass
class PolicyBatch:
    """The rollouts that carry a gradient, ragged, and what the loss needs of each.

    Attributes:
        sequences: n different rollouts with their prompts.
        advantages: ``[n]``.
        counts: ``[n]``, how many equal rollouts of the group each stands for.
        sampler_logps: n tensors ``[length]``, nats.
        denominator: number of tokens (or sequences) of ALL rollouts that count, with or without a gradient.
        old_logps: n tensors ``[length]`` under the weights that sampled them; empty where one update is made, since
            these are then the current weights.
    """

    sequences: Sequences
    advantages: Tensor
    counts: Tensor
    sampler_logps: list[Tensor]
    denominator: float
    old_logps: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """Decides, here and nowhere else, which rollouts need a forward pass.

    A rollout whose advantage is exactly 0 adds exactly nothing to the gradient of the clipped surrogate, so it is not
    put through the policy; it still counts in the denominator. Equal rollouts of a group are put through it once.

    Attributes:
        advantage_scale: see :func:`hdpo.functional.group_advantages`.
        aggregation: see :func:`hdpo.functional.loss_denominator`.
        mask_truncated: leave completions that hit the token limit out of loss and denominator.
        count_zero_variance: whether tokens of groups without variance count in the denominator.
        needs_all: a KL penalty has a gradient everywhere, so that every rollout that counts is needed.
    """

    advantage_scale: AdvantageScale = "std"
    aggregation: Aggregation = "token"
    mask_truncated: bool = False
    count_zero_variance: bool = True
    needs_all: bool = False

    def __call__(self, batch: Experience, part: Sequence[int] | None = None) -> PolicyBatch:
        """Select from a batch whose rollouts are scored, or from the prompts at the positions ``part`` of it."""
        rollouts = batch.rollouts
        assert rollouts is not None, "RolloutGeneration completes the experience first"
        chosen = list(range(len(batch)) if part is None else part)
        rewards, masks = rollouts.rewards[chosen], rollouts.completion_mask[chosen]
        truncated, prompt_ids = rollouts.truncated[chosen], [batch.prompts.prompt_ids[i] for i in chosen]
        advantages = group_advantages(rewards, scale=self.advantage_scale)
        counted = torch.ones_like(truncated)
        if self.mask_truncated:
            counted &= ~truncated
        if not self.count_zero_variance:
            counted &= (rewards != rewards[:, :1]).any(-1, keepdim=True)
        needed = counted if self.needs_all else counted & (advantages != 0)
        rows, columns = needed.nonzero(as_tuple=True)
        lengths = masks.sum(-1)
        cut = lengths[rows, columns].tolist()
        ids = [x[:n] for x, n in zip(rollouts.completion_ids[chosen][rows, columns].tolist(), cut, strict=True)]
        values = advantages[rows, columns]
        first, counts = merge_equal(
            [
                (row, value, *completion)
                for row, value, completion in zip(rows.tolist(), values.tolist(), ids, strict=True)
            ]
        )
        logps = rollouts.sampler_logps[chosen][rows[first], columns[first]]
        return PolicyBatch(
            Sequences([prompt_ids[i] for i in rows[first].tolist()], [ids[i] for i in first]),
            values[first],
            torch.tensor(counts, device=values.device, dtype=torch.int64),
            [x[: cut[i]] for x, i in zip(logps, first, strict=True)],
            float(loss_denominator(lengths[counted], self.aggregation)),
        )
