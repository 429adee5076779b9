"""Two tenants in one process: keeps an engine that runs in the trainer's thread from changing what the trainer sees."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def apart_from_training(device: str) -> Iterator[None]:
    """Keep the trainer's autocast and default dtype from the engine, and the engine from the trainer's random states.

    Args:
        device: type of the policy's device, whose autocast is switched off.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device, enabled=False), isolate_rng():
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what vLLM's start does to the whole process: threads, matrix precision, environment."""
    precision, set_num_threads, num_threads = (
        torch.get_float32_matmul_precision(),
        torch.set_num_threads,
        torch.get_num_threads(),
    )
    # LD_PRELOAD would reach every process that the trainer starts later.
    environment = {name: os.environ.get(name) for name in ("LD_PRELOAD", "RANK", "LOCAL_RANK", "VLLM_CACHE_ROOT")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM's, of torch's deprecations
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing
        torch.set_num_threads(num_threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
