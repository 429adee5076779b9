"""Keys and values of the tokens decoded so far.

A key stands in the column of its position: row r's token at position p is in column p, whatever else is in the batch.
So rows need no common start, a row may take any number of tokens at a time, and a token that was guessed wrongly is
overwritten by the right one.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

#: Columns beyond the prompt at first, and the factor by which they grow. Completions are mostly far shorter than their
#: limit, and each time rows leave, the others move to fresh memory, whose pages a CPU must clear.
_SPARE, _GROWTH = 24, 1.5


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, ``[rows, columns, heads, width]``, written in place.

    ``DynamicLayer`` concatenates, that is, copies the whole cache for every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: what an attention weight of 0 is multiplied with must not be a NaN that happened to lie there.
        self.keys, self.values = (
            x.new_zeros(x.shape[0], self.slots.capacity, x.shape[1], x.shape[3], dtype=self.slots.dtype)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, used = self.slots, self.slots.used
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if slots.cells is None:
                buffer[:, :used] = new.transpose(1, 2)  # also casts
            else:
                cells = buffer.view(-1, *buffer.shape[2:])
                cells.index_copy_(0, slots.cells, new.transpose(1, 2).reshape(-1, *buffer.shape[2:]).to(buffer.dtype))
        return self.keys[:, :used].transpose(1, 2), self.values[:, :used].transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.slots.used if self.is_initialized else 0

    def take(self, rows: Tensor | None, filled: int) -> None:
        """Move to a buffer of the cache's capacity; keep only ``rows`` where given."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            num = old.shape[0] if rows is None else len(rows)
            new = old.new_empty(num, self.slots.capacity, *old.shape[2:])
            new[:, filled:] = 0
            new[:, :filled] = old[:, :filled] if rows is None else old[:, :filled].index_select(0, rows)
            setattr(self, name, new)


class SlotCache(Cache):
    """A transformers cache whose columns are positions.

    Args:
        num_layers: of the model.
        width: columns of the prompts.
        limit: columns that may be needed in all.
        dtype: of the computation. Under autocast rotated keys have the weights' dtype and would be cast again, all of
            them, for every token; cast once they have the same values.
    """

    def __init__(self, num_layers: int, width: int, limit: int, dtype: torch.dtype) -> None:
        # Layers that held the cache itself would keep it alive, all its memory with it, until Python looks for cycles.
        super().__init__(layers=[_SlotLayer(weakref.proxy(self)) for _ in range(num_layers)])
        self.used, self.limit, self.dtype = width, limit, dtype
        self.capacity = min(limit, width + _SPARE)
        self.cells: Tensor | None = None

    def write_at(self, positions: Tensor, num_columns: int) -> None:
        """Say where the next forward pass writes.

        Args:
            positions: ``[rows, m]``.
            num_columns: one more than the largest of them, or more.
        """
        if num_columns > self.capacity:
            self.capacity = min(self.limit, max(num_columns, int(self.capacity * _GROWTH)))
            self._take(None)
        self.used = num_columns
        rows = torch.arange(len(positions), device=positions.device)
        self.cells = (rows[:, None] * self.capacity + positions).flatten()

    def select(self, rows: Tensor) -> None:
        """Keep only these rows; one that occurs twice is copied."""
        self._take(rows)

    def _take(self, rows: Tensor | None) -> None:
        for layer in self.layers:
            cast(_SlotLayer, layer).take(rows, self.used)
