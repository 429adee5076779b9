"""What a step measures: means, totals and maxima in the making, so that micro-batches and ranks merge exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Measurements", "timed"]


class Measurements:
    """Name -> (sum, count). A name that ends in ``_max`` is a maximum: the largest observation, on whatever rank.

    Tensors are kept as they are and read together: on a GPU each reading waits for all work that was queued before.

    Example:
        >>> measured = Measurements()
        >>> measured.add("rollout/reward", 3.0, count=4)
        >>> measured.add("rollout/reward", torch.tensor(0.0), count=4)
        >>> measured.add("verifier/timeout", 2.0, count=None)  # a plain total
        >>> measured.add("sampler/logprob_gap_max", 0.25)
        >>> measured.merge([("rollout/reward", 1.0, 8.0), ("sampler/logprob_gap_max", 0.125, None)])
        >>> measured.means()
        {'rollout/reward': 0.25, 'verifier/timeout': 2.0, 'sampler/logprob_gap_max': 0.25}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float | None] = {}
        self._unread: list[tuple[str, Tensor, bool]] = []  # name, value, whether it is a count

    def add(self, name: str, total: float | Tensor, count: float | Tensor | None = 1.0) -> None:
        """Add ``total``, the sum over ``count`` observations. ``count=None`` marks a total that is never divided."""
        if name.endswith("_max"):
            count = None
        self._counts.setdefault(name, None if count is None else 0.0)
        for value, is_count in ((count, True), (total, False)):
            if isinstance(value, Tensor):
                self._unread.append((name, value.detach(), is_count))
            elif value is not None:
                self._put(name, float(value), is_count)

    def _put(self, name: str, value: float, is_count: bool) -> None:
        if is_count:
            self._counts[name] = (self._counts[name] or 0.0) + value
        elif name.endswith("_max"):
            # Not the built-in order: a value that is not a number must not be lost.
            values = (value, self._sums.get(name, -math.inf))
            self._sums[name] = max(values, key=lambda v: (math.isnan(v), v))
        else:
            self._sums[name] = self._sums.get(name, 0.0) + value

    def items(self) -> list[tuple[str, float, float | None]]:
        """Return ``(name, sum, count)`` in the order in which the names were first added."""
        for device in dict.fromkeys(tensor.device for _, tensor, _ in self._unread):
            part = [entry for entry in self._unread if entry[1].device == device]
            values = torch.stack([tensor.double() for _, tensor, _ in part]).tolist()
            for (name, _, is_count), value in zip(part, values, strict=True):
                self._put(name, value, is_count)
        self._unread = []
        return [(name, self._sums[name], count) for name, count in self._counts.items()]

    def merge(self, items: Sequence[tuple[str, float, float | None]]) -> None:
        """Add what another rank counted, as returned by its :meth:`items`."""
        for name, total, count in items:
            self.add(name, total, count)

    def means(self) -> dict[str, float]:
        """Return name -> sum / count; names with a count of zero are left out, totals and maxima are as they are."""
        return {
            name: total if count is None else total / count
            for name, total, count in self.items()
            if count is None or count
        }


_LOWER = {
    "rollouts": "the engine's max_sequences (or gpu_memory_utilization), rollouts.max_new_tokens, data.val_batch_size",
    "privileged": "the engine's max_sequences, distillation.max_new_tokens, distillation.num_privileged",
    "teacher": "model.update.micro_batch_tokens, distillation.topk",
    "update": "model.update.micro_batch_tokens, or set model.policy.gradient_checkpointing to true",
}
"""Phase of a step -> keys that lower its memory."""


@contextmanager
def timed(measurements: Measurements, phase: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to ``time/<phase>``; running out of memory names the phase.

    ``speed/<phase>`` is completion tokens per second of one process: the block adds tokens with a count of 0, and the
    seconds are its count.
    """
    started = time.perf_counter()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            error.add_note(f"hdpo: out of memory in the phase {phase!r}; lower {_LOWER.get(phase, 'the sizes')}")
        raise
    seconds = time.perf_counter() - started
    measurements.add(f"time/{phase}", seconds)
    measurements.add(f"speed/{phase}", 0.0, seconds)
