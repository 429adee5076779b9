"""Which weights vLLM holds, and whether it has taken over all that it was given."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hdpo.errors import TrainingStopped

#: vLLM holds several of a model's matrices as one, whose first rows are those of the first of them.
_PACKED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
_NUM_ROWS, _NUM_ELEMENTS = 2, 64


@torch.no_grad()
def first_rows(worker: Any) -> dict[str, Tensor]:
    """Return the beginnings of a vLLM worker's weights under the names that the policy gives them.

    Norms whole, since all of their elements move in every step; of matrices the first rows. What vLLM has packed for a
    CPU's kernels is left out.
    """
    rows, model = {}, worker.get_model()
    # Some policies (Phi-3, GLM-4) are packed themselves; vLLM's model says what each of its modules is made of.
    first = _PACKED | {whole: parts[0] for whole, parts in getattr(model, "packed_modules_mapping", {}).items()}
    for name, parameter in model.named_parameters():
        *parents, module, kind = name.split(".")
        if "norm" in module:
            num = len(parameter)
        else:
            num = _NUM_ROWS if parameter.dim() == 2 else _NUM_ELEMENTS
        if parameter.numel() and parameter.dim() <= 2:
            rows[".".join([*parents, first.get(module, module), kind])] = parameter.detach()[:num].clone()
    return rows


@contextmanager
def weights_all_loaded() -> Iterator[None]:
    """Make an error of vLLM's warning that some of its weights were not among those that it was given.

    Raises:
        TrainingStopped: after the block, with vLLM's words. Other warnings about weights become Python's.
    """
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.model_executor")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # the engine's own level may be ERROR
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    for message in messages:
        if "not loaded" in message:
            raise TrainingStopped(f"vLLM has not taken over all of the policy's weights: {message}")
        warnings.warn(f"vLLM: {message}", stacklevel=2)
