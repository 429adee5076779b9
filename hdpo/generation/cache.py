"""Keys and values of the tokens decoded so far, and attention to them.

A key stands in the column of its position: row r's token at position p is in column p, whatever else is in the batch.
So rows need no common start, a row may take any number of tokens at a time, and a token that was guessed wrongly is
overwritten by the right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hdpo.policy import Policy

__all__ = ["SlotCache", "attention_kinds", "decode_attention"]

#: Columns are added in steps of this factor: completions are mostly far shorter than their limit.
_GROWTH = 1.5


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
            x.new_zeros(x.shape[0], self.slots.capacity, x.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, used = self.slots, self.slots.used
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if slots.cells is None:
                buffer[:, :used] = new.transpose(1, 2)
            else:
                cells = buffer.view(-1, *buffer.shape[2:])
                cells.index_copy_(0, slots.cells, new.transpose(1, 2).reshape(-1, *buffer.shape[2:]))
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
        kinds: the attention of each layer, see :func:`attention_kinds`.
        width: columns of the prompts.
        limit: columns that may be needed in all.
    """

    def __init__(self, kinds: Sequence[str], width: int, limit: int) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in kinds])
        self.used, self.limit = width, limit
        self.capacity = min(limit, int(width * _GROWTH) + 64)
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


def attention_kinds(policy: Policy) -> list[str]:
    """What each layer attends to: ``full_attention`` or ``sliding_attention``.

    Raises:
        ValueError: a layer is of another kind.
    """
    config = policy.model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    if not kinds:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"the transformers engine cannot decode a {config.model_type} with layers of kind {', '.join(unknown)}; "
            "choose hdpo.generation.VLLMEngine"
        )
    return kinds


def masks(policy: Policy, kinds: Sequence[str], positions: Tensor, num_columns: int, dtype: torch.dtype) -> Any:
    """Additive masks ``[rows, 1, m, columns]`` of queries at ``positions``: each sees its own column and those before.

    Additive, because SDPA would otherwise make one of a boolean mask in every layer.

    Returns:
        The mask, or where layers differ one for each kind.
    """
    columns = torch.arange(num_columns, device=positions.device)
    window: int = getattr(policy.model.config.get_text_config(), "sliding_window", None) or 0
    found = {}
    for kind in dict.fromkeys(kinds):
        hidden = columns > positions[..., None]
        if kind == "sliding_attention":
            hidden |= columns <= positions[..., None] - window
        found[kind] = (hidden.to(dtype) * torch.finfo(dtype).min)[:, None]
    return found if len(found) > 1 else next(iter(found.values()))


def _grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA that reads each key/value head once for all query heads that share it.

    transformers copies keys and values to every query head first where there is a mask, which for one query token
    costs more than the attention itself. Here these heads are further queries of one head.
    """
    rows, heads, length, width = query.shape
    key_heads = key.shape[1]
    if attention_mask is None or heads == key_heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shared = heads // key_heads
    mask = attention_mask
    if length > 1:
        mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
    folded = query.reshape(rows, key_heads, shared * length, width)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


_NAME = "hdpo_grouped_sdpa"
AttentionInterface.register(_NAME, _grouped_sdpa)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def decode_attention(policy: Policy) -> Iterator[None]:
    """Let the policy attend with :func:`_grouped_sdpa`, unless it was loaded with transformers' eager attention."""
    config = policy.model.config.get_text_config()
    before = config._attn_implementation
    if before != "eager":
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
