"""Another device than the host's memory, on a machine that has none: tensors on it ("meta") have no values.

Whatever waits for its values raises, except for the two kinds of reads that are answered here, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OTHER", "Crossings", "crossings"]

OTHER = torch.device("meta")
_ATEN = torch.ops.aten


class Crossings(TorchDispatchMode):
    """What went between host and device since the block began.

    Attributes:
        reads: shapes of what the host has read from the device; all of it was 1.
        mixed: operations on tensors of both, which copy one of them first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, ...]] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in given if x.device == OTHER]
        to_host = func is _ATEN._to_copy.default and there and kwargs.get("device", OTHER) != OTHER
        if to_host or (there and func is _ATEN._local_scalar_dense.default):
            self.reads.append(tuple(there[0].shape))
            return torch.ones(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype) if to_host else 1
        if there and any(x.device != OTHER and x.dim() for x in given):
            self.mixed.append(func._schema.name)
        return func(*args, **kwargs)


@contextmanager
def crossings() -> Iterator[Crossings]:
    """Count what the block moves between host and device; autocast does not know this one."""
    seen = Crossings()
    with (
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        seen,
    ):
        yield seen
