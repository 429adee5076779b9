"""Group-relative advantages (Algorithm 1, lines 4-5): how much better a rollout is than the others of its prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageScale = Literal["std", "none", "leave_one_out_std"]
"""What advantages are divided by; see :func:`group_advantages`."""


def _others(rewards: Tensor) -> Tensor:
    """For each of the K rewards of a group the K - 1 other ones: ``[B, K]`` -> ``[B, K, K - 1]``."""
    num_groups, size = rewards.shape
    other = ~torch.eye(size, dtype=torch.bool, device=rewards.device)
    return rewards[:, None, :].expand(-1, size, -1)[:, other].view(num_groups, size, size - 1)


def has_variance(rewards: Tensor, valid: Tensor) -> Tensor:
    """Whether a group's rewards differ: ``[B]`` bool.

    Args:
        rewards: ``[B, K]``.
        valid: ``[B, K]`` bool, False for a rollout without a reward.
    """
    infinite = float("inf")
    return rewards.masked_fill(~valid, -infinite).amax(-1) > rewards.masked_fill(~valid, infinite).amin(-1)


def group_advantages(rewards: Tensor, valid: Tensor | None = None, *, scale: AdvantageScale = "std") -> Tensor:
    r"""Advantages of K rollouts per prompt against the mean reward of the K - 1 others.

    .. math:: A_i = \Bigl(r_i - \frac{1}{K-1}\sum_{j \neq i} r_j\Bigr) / s

    The baseline of a rollout leaves its own reward out and is therefore independent of it. A group whose rewards are
    all equal (a cliff, a solved group) gets exactly 0: it has no policy gradient.

    Args:
        rewards: ``[B, K]``, one group a row, K >= 2. Booleans and integers are taken as float32.
        valid: ``[B, K]`` bool, False for a rollout without a reward (the verifier came to no verdict). It gets exactly
            0 and is left out of mean and scale; a group with fewer than two others is no group. Default: all count.
        scale: the divisor ``s``.
            ``"std"``: the group's sample standard deviation, as in TRL and NeMo-RL with Bessel's correction (divisor
            K - 1). Nothing is added to it, since groups without variance are treated apart.
            ``"none"``: 1.
            ``"leave_one_out_std"``: the sample standard deviation of the K - 1 other rewards, and 1 where that is 0 or
            undefined (K = 2). It exists for parity with the paper's code base and has a defect: at K = 16 the only
            success of a group gets +1.0, but two successes get +3.61 each.

    Returns:
        ``[B, K]`` advantages, in units of reward (``"none"``) or of standard deviations.

    Raises:
        ValueError: the rewards are not ``[B, K]`` with K >= 2 or not finite, or the scale is unknown.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        tensor([[ 2.0000, -0.6667, -0.6667, -0.6667],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale="none")
        tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"advantage scale must be one of {', '.join(get_args(AdvantageScale))}, got {scale!r}")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [B, K] with K >= 2 rollouts per prompt, got {list(rewards.shape)}: "
            "a single rollout has no others to be compared with"
        )
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if valid is not None and not valid.all():
        advantages = torch.zeros_like(rewards)
        for group, mask in enumerate(valid):
            if mask.sum() >= 2:
                advantages[group, mask] = group_advantages(rewards[group : group + 1, mask], scale=scale)[0]
        return advantages
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite, got NaN or infinity")
    others = _others(rewards)
    advantages = rewards - others.mean(-1)
    if scale == "std":
        advantages = advantages / _safe_std(rewards)[:, None]
    elif scale == "leave_one_out_std":
        advantages = advantages / _safe_std(others)
    # Equality is tested on the rewards: a rounded mean or std of equal numbers need not be exact.
    varied = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    return torch.where(varied, advantages, torch.zeros_like(advantages))


def _safe_std(values: Tensor) -> Tensor:
    """Sample standard deviation over the last axis, 1 where all values are equal or there is only one."""
    if values.shape[-1] == 1 or values.numel() == 0:  # torch would warn about the former, and about no groups at all
        return torch.ones_like(values[..., 0])
    std = values.std(-1, correction=1)
    return torch.where(values.amax(-1) > values.amin(-1), std, torch.ones_like(std))
