"""Counter-based randomness: a number is a function of where it is used, never of what was drawn before it.

That is what makes a resumed run exact and the samples independent of batch composition and of the number of ranks.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What random numbers are for; part of every derived seed, so that no two purposes share a stream."""

    ROLLOUT = 1
    PRIVILEGED = 2
    EVALUATION = 3
    RESAMPLING = 4
    PROBLEM_ORDER = 0x5A3


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer (2^64 / golden ratio)
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; the mask makes them logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on int64 tensors; wraps around like uint64."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def derive_seeds(*parts: int | Tensor) -> Tensor:
    """Hash any number of integers (broadcast together) into 64-bit seeds.

    Args:
        parts: for example run seed, purpose, step, prompt indices ``[B, 1]`` and sample indices ``[K]``.

    Returns:
        int64 seeds with the broadcast shape.

    Example:
        >>> a = derive_seeds(42, 7, torch.arange(3)[:, None], torch.arange(2))
        >>> a.shape, a.unique().numel()
        (torch.Size([3, 2]), 6)
        >>> bool((a[1, 1] == derive_seeds(42, 7, 1, 1)).all())
        True
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = _splitmix64(state ^ torch.as_tensor(part, dtype=torch.int64))
    return state


def uniform(seeds: Tensor, counter: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one for each pair of seed and counter.

    Args:
        seeds: int64 seeds, any shape and device.
        counter: position in the stream (for example the token's index), broadcast with ``seeds``.

    Returns:
        float64 numbers with 53 random bits.

    Example:
        >>> u = uniform(derive_seeds(1, torch.arange(100_000)), 0)
        >>> round(u.mean().item(), 2), round(u.var().item() * 12, 2)
        (0.5, 1.0)
    """
    counter = torch.as_tensor(counter, dtype=torch.int64, device=seeds.device)
    bits = _shift_right(_splitmix64(seeds ^ _splitmix64(counter)), 11)
    return bits.to(torch.float64) * 2.0**-53
