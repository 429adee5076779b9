"""Counts what the real code allocates, launches and reads back at full size, on a machine that could not hold it.

Floating-point tensors are fake: they have shapes and dtypes, and no values. All else is real, so that token ids,
lengths and masks still decide what is computed. Fake CUDA tensors need a build of torch for CUDA, so these stand on the
CPU; where a CPU's default differs from a GPU's (optimizers: ``foreach``), ask for the GPU's.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counts", "counted"]


class Counts(TorchDispatchMode):
    """Bytes and operations since the block began; every number may be set to another start.

    Attributes:
        held: bytes of all tensors that are alive.
        peak: the most that ``held`` has been.
        kernels: number of calls of each operation that writes memory; views and empty tensors are none.
        moved: bytes that these have read and written.
        host_reads: times that a value of a fake tensor was asked for, which on a GPU waits for all that was queued.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.moved = self.host_reads = 0
        self.kernels: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.held

    def resized(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """A storage has as many bytes now: a new one, or one that FSDP2 frees and allocates again."""
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._freed, key)
        self.held += num_bytes - self._sizes.get(key, 0)
        self._sizes[key] = num_bytes
        self.peak = max(self.peak, self.held)

    def _freed(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what this rank holds
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_fake = any(isinstance(x, FakeTensor) for x in given)
        if func is torch.ops.aten._local_scalar_dense.default and is_fake:
            self.host_reads += 1
            return 1.0 if given[0].is_floating_point() else given[0].dtype == torch.bool  # finite; true; zero
        dtype = kwargs.get("dtype")
        makes_floats = dtype.is_floating_point if dtype is not None else not given and func not in _INTEGERS
        if is_fake or makes_floats:
            out = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        self._count(func, given, [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out

    def _count(self, func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        known = {x.untyped_storage()._cdata for x in given}
        fresh = [x.untyped_storage() for x in made if x.untyped_storage()._cdata not in known]
        for storage in fresh:
            if storage._cdata not in self._sizes:
                self.resized(storage, storage.nbytes())
        name = func._schema.name.removeprefix("aten::")
        if (fresh and "empty" not in name) or func._schema.is_mutable:
            self.kernels[name] += 1
            self.moved += sum(x.nbytes for x in (*given, *made))


_INTEGERS = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


@contextmanager
def counted() -> Iterator[Counts]:
    """Fake floating-point tensors inside the block, and count."""
    resize, counts = torch.UntypedStorage.resize_, Counts()

    def noted(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        if storage._cdata in counts._sizes:
            counts.resized(storage, num_bytes)
        return resize(storage, num_bytes)

    with patch.object(torch.UntypedStorage, "resize_", noted), FakeTensorMode(allow_non_fake_inputs=True), counts:
        yield counts
