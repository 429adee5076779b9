"""pass@k: the chance that at least one of k samples solves a problem (section 4)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: int | Tensor, num_correct: Tensor, k: int) -> Tensor: ...
@overload
def pass_at_k(num_samples: Tensor, num_correct: int | Tensor, k: int) -> Tensor: ...


def pass_at_k(num_samples: int | Tensor, num_correct: int | Tensor, k: int) -> float | Tensor:
    r"""Unbiased estimate of pass@k from n samples of which c are correct (Chen et al., 2021, eq. 1).

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k} = 1 - \prod_{j=0}^{k-1} \frac{n - c - j}{n - j}

    It is the share of all k-subsets of the n samples that hold a correct one. The product never forms a large binomial.

    Args:
        num_samples: n, samples per problem. An integer, or a tensor broadcastable with ``num_correct``.
        num_correct: c, correct ones among them.
        k: how many samples per problem may use, 1 <= k <= n.

    Returns:
        A float for integers; for tensors a float64 tensor of the broadcast shape (float32 on MPS, where there is no
        float64).

    Raises:
        ValueError: k is not between 1 and n, or c is not between 0 and n.

    Example:
        >>> round(pass_at_k(16, 2, 8), 4)
        0.7667
        >>> pass_at_k(4, torch.tensor([0, 1, 4]), 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    n, c = torch.as_tensor(num_samples), torch.as_tensor(num_correct)
    if isinstance(num_samples, int):
        n = n.to(c.device)
    if isinstance(num_correct, int):
        c = c.to(n.device)
    if k < 1:
        raise ValueError(f"pass@k needs k >= 1, got k = {k}")
    if n.numel() and k > int(n.min()):
        raise ValueError(
            f"pass@{k} needs at least {k} samples per problem, got {int(n.min())}: sample more, or leave k = {k} out"
        )
    if ((c < 0) | (c > n)).any():
        raise ValueError("num_correct must be between 0 and num_samples")
    dtype = torch.float32 if c.device.type == "mps" else torch.float64
    j = torch.arange(k, device=c.device)
    n, c = n[..., None], c[..., None]
    # Once n - c < k a factor is exactly 0; the clamp keeps later, negative factors from showing as -0.
    all_wrong = ((n - c - j).clamp(min=0).to(dtype) / (n - j).to(dtype)).prod(-1)
    result = 1 - all_wrong
    if isinstance(num_samples, int) and isinstance(num_correct, int):
        return float(result)
    return result


def any_of_k(correct: Tensor, k: int) -> Tensor:
    """Whether any of the FIRST k samples of each problem is correct.

    With n = k samples drawn for the purpose its mean is what the paper's tables report: an estimate of pass@k with more
    variance than :func:`pass_at_k` over n > k samples.

    Args:
        correct: ``[B, n]`` bool.
        k: how many samples count, 1 <= k <= n.

    Returns:
        ``[B]`` bool.

    Raises:
        ValueError: ``correct`` is not ``[B, n]``, or k is not between 1 and n.

    Example:
        >>> any_of_k(torch.tensor([[False, True, False], [False, False, True]]), 2)
        tensor([ True, False])
    """
    if correct.dim() != 2:
        raise ValueError(f"correct must be [B, n], got {list(correct.shape)}")
    if not 1 <= k <= correct.shape[1]:
        raise ValueError(f"any-of-k needs 1 <= k <= {correct.shape[1]} samples, got k = {k}: sample more, or lower k")
    return correct[:, :k].bool().any(-1)
