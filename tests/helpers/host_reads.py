"""Notes where code waits for a device: on a GPU each of these operations ends only when all before it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Seen", "host_reads"]

_ATEN = torch.ops.aten
#: The size of what these return depends on values.
_SIZES = {_ATEN.nonzero.default, _ATEN.masked_select.default, _ATEN._unique2.default, _ATEN.unique_dim.default}


class Seen(TorchDispatchMode):
    """Operations since the block began.

    Attributes:
        names: of the operations that read values back, in order; ``tolist`` is one read, ``item`` and its like too.
        casts: shapes of the tensors that were cast to another floating-point dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.casts: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # under inference_mode composite operations come whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        reads = func in _SIZES
        if func in (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default):
            reads |= any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
        if func is _ATEN.repeat_interleave.Tensor:
            reads |= kwargs.get("output_size") is None
        if reads:
            self.names.append(func._schema.name.removeprefix("aten::"))
        if func is _ATEN._to_copy.default:
            dtype = kwargs.get("dtype")
            if dtype is not None and dtype != args[0].dtype and args[0].is_floating_point():
                self.casts.append(tuple(args[0].shape))
        return func(*args, **kwargs)


_TENSOR = torch.Tensor
_READS = {_TENSOR.item, _TENSOR.tolist, _TENSOR.numpy, _TENSOR.cpu, _TENSOR.__int__, _TENSOR.__float__}
_READS |= {_TENSOR.__bool__, _TENSOR.__index__}


class _Reads(TorchFunctionMode):
    """On a CPU these read the memory and dispatch nothing."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[Seen]:
    """Note what the block reads back."""
    seen = Seen()
    with _Reads(seen.names), seen:
        yield seen
