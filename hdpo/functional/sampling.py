"""Drawing tokens with given random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, numbers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw tokens by inverting the cumulative distribution at uniform numbers.

    Args:
        logits: ``[R, V]``.
        numbers: ``[R]`` float64 in [0, 1), see :func:`hdpo.functional.random.uniform`; ``[R, K]`` for K tokens per row.
        temperature: 0 takes the most likely token.

    Returns:
        Token ids and their log-probabilities (nats) in the shape of ``numbers``, under the distribution that was
        sampled; with temperature 0 under the one of temperature 1.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20_000, 3)
        >>> ids, _ = draw(logits, (torch.arange(20_000) + 0.5).double() / 20_000, 1.0)
        >>> (ids.bincount() / 20_000 - logits[0].softmax(-1)).abs().max().item() < 0.001
        True
    """
    wanted = numbers.contiguous().view(len(numbers), -1)
    scaled = logits if temperature in (0, 1) else logits / temperature
    log_probs = scaled.log_softmax(-1)
    if temperature == 0:
        picked = logits.argmax(-1, keepdim=True).expand_as(wanted)
    else:
        # float64, because the sum of 150,000 float32 probabilities misses the tail's.
        cumulative = log_probs.to(torch.float64, copy=True).exp_().cumsum_(-1)
        picked = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)
        picked.clamp_(max=logits.shape[-1] - 1)
    return picked.view(numbers.shape), log_probs.gather(-1, picked).view(numbers.shape)
