"""The paper's optimizer and schedule (Table 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hdpo.errors import ConfigError, check_at_least

__all__ = ["LinearWarmup", "paper_adamw", "prefer_fused"]


def paper_adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as in the paper's Table 2: learning rate 1e-6, betas (0.9, 0.999), eps 1e-8, weight decay 0.01."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def prefer_fused(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let one of torch's optimizers run fused on a GPU, where its options do not say how: one pass over the weights.

    torch's own choice there, ``foreach``, reads and writes a copy of all second moments besides.
    """
    for group in optimizer.param_groups if device.type == "cuda" else ():
        # Groups without the key belong to an optimizer that knows no fused form.
        if group.get("fused", False) is None and group.get("foreach") is None and not group.get("differentiable"):
            group["fused"] = True


class LinearWarmup(torch.optim.lr_scheduler.LinearLR):
    """Linear from ``start_factor`` to 1 over ``num_warmup_steps`` steps, then constant (paper, Table 2).

    Args:
        optimizer: whose learning rate is scaled.
        num_warmup_steps: steps until the full learning rate; 0 starts with it.
        start_factor: share of the learning rate in the first step, in (0, 1].

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_warmup_steps: int = 50, start_factor: float = 0.1) -> None:
        check_at_least(0, model__lr_scheduler__num_warmup_steps=num_warmup_steps)
        if not 0 < start_factor <= 1:
            raise ConfigError(f"model.lr_scheduler.start_factor must be in (0, 1], got {start_factor}")
        factor = start_factor if num_warmup_steps > 0 else 1.0
        super().__init__(optimizer, start_factor=factor, end_factor=1.0, total_iters=max(1, num_warmup_steps))
