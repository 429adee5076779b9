"""How far two computations of the same number may be apart, from the dtype and the length of the sums alone.

Exactness is tested in float64. Where something must be float32, a bound that some machine's rounding never came near is
no tolerance: CPUs, libraries and numbers of threads add up in other orders. The classical bound of a sum of n numbers
is n times half an eps times the sum of their magnitudes, whatever the order.
"""

from __future__ import annotations

import torch

__all__ = ["EXACT", "F32", "norms_in_float32", "of_sum"]

#: float64 sums of some hundred numbers of about 1.
EXACT = 1e-12
#: Distance of 1 from the next float32: two roundings of one number are not further apart.
F32 = torch.finfo(torch.float32).eps


def of_sum(length: int, magnitude: float, dtype: torch.dtype = torch.float32) -> float:
    """Bound between two sums of the same ``length`` numbers, whose absolute values add up to ``magnitude``."""
    return length * torch.finfo(dtype).eps * magnitude


def norms_in_float32(num_layers: int, width: int, magnitude: float) -> float:
    """Bound between two runs of a float64 policy whose norms are float32, as those of all Llama-like ones are.

    Two norms per layer and one at the end; each rounds the sum of ``width`` squares, and results of about
    ``magnitude`` pass it on.
    """
    return (2 * num_layers + 1) * of_sum(width, magnitude) / 2
