"""Which rollouts of a step are put through the policy, and what its mean is over (paper, Algorithm 1, lines 4-5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdpo.experience import Rollouts, Sequences, join_rollouts, merge_equal
from hdpo.functional import has_variance, loss_denominator
from hdpo.losses.policy_loss import PolicyLoss


@dataclass
class PolicyBatch:
    """The rollouts that carry a gradient, ragged, and what the loss needs of each, on the CPU (but ``old_logps``).

    Attributes:
        sequences: n distinct rollouts with their prompts.
        advantages: ``[n]``.
        counts: ``[n]``, how many equal rollouts of the group each stands for.
        sampler_logps: n tensors ``[length]``, nats.
        denominator: number of tokens (or sequences) of ALL rollouts that count, with or without a gradient.
        off_policy: ``[n]`` bool, True for a member of a group that the policy did not write; None where there is none.
        old_logps: n tensors ``[length]`` under the weights that sampled them; empty where one update is made, since
            these are then the current weights.
    """

    sequences: Sequences
    advantages: Tensor
    counts: Tensor
    sampler_logps: list[Tensor]
    denominator: float
    off_policy: Tensor | None = None
    old_logps: list[Tensor] = field(default_factory=list)


def select_rollouts(
    rollouts: Rollouts,
    prompt_ids: Sequence[list[int]],
    loss: PolicyLoss,
    off_policy: Rollouts | None = None,
    *,
    with_kl: bool = True,
) -> PolicyBatch:
    """Decide, here and nowhere else, which rollouts need a forward pass.

    A rollout whose advantage is exactly 0 adds exactly nothing to the gradient of the surrogate, so it is not put
    through the policy; it still counts in the denominator. With a KL penalty every rollout that counts has a gradient.
    Equal rollouts of a group are put through the policy once. A rollout without a verdict counts nowhere, nor does a
    group with fewer than two verdicts.

    Args:
        rollouts: ``[B, K]``, scored.
        prompt_ids: B contexts that they were written after.
        loss: what advantages are, and which rollouts count.
        off_policy: ``[B, 1]``, further members of the groups.
        with_kl: whether the loss's KL penalty, if it has one, is taken on these rollouts.
    """
    members = rollouts if off_policy is None else join_rollouts(rollouts, off_policy, members=True)
    rewards, truncated = members.rewards.cpu(), members.truncated  # a station of the user's may have made the rewards
    valid = members.has_verdict.cpu()
    valid &= valid.sum(-1, keepdim=True) >= 2
    advantages = loss.advantages(rewards, valid)
    counted = valid.clone()
    if loss.mask_truncated:
        counted &= ~truncated
    if not loss.count_zero_variance:
        counted &= has_variance(rewards, valid)[:, None]
    needed = counted if with_kl and loss.kl_coef > 0 else counted & (advantages != 0)
    rows, columns = needed.nonzero(as_tuple=True)
    lengths = members.completion_mask.sum(-1)
    cut = lengths[rows, columns].tolist()
    ids = [x[:n] for x, n in zip(members.completion_ids[rows, columns].tolist(), cut, strict=True)]
    values, foreign = advantages[rows, columns], columns >= rollouts.num_generations
    first, counts = merge_equal(
        [
            (row, value, other, *completion)
            for row, value, other, completion in zip(rows.tolist(), values.tolist(), foreign.tolist(), ids, strict=True)
        ]
    )
    logps = members.sampler_logps[rows[first], columns[first]]
    return PolicyBatch(
        Sequences([prompt_ids[i] for i in rows[first].tolist()], [ids[i] for i in first]),
        values[first],
        torch.tensor(counts),
        [x[: cut[i]] for x, i in zip(logps, first, strict=True)],
        float(loss_denominator(lengths[counted], loss.aggregation)),
        None if off_policy is None else foreign[first],
    )
