"""How the policy attends where a plain causal mask does not say it.

Decoding, and prompts that are read once, put the keys of earlier tokens into a cache and need to say which of its
columns a query sees. Sequences that lie one after another in a row must not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hdpo.policy.architecture import layers_uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The kinds of layers that :func:`attention_masks` can say everything about.
MASKED_KINDS = frozenset({"full_attention", "sliding_attention"})

#: With more queries than this a head, the mask copied to every query head would cost more than the keys do.
_FOLDED_QUERIES = 512


def attention_kinds(model: PreTrainedModel) -> list[str]:
    """What each layer attends to; masks exist for :data:`MASKED_KINDS`."""
    config = model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    if not kinds:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return kinds


def attention_masks(model: PreTrainedModel, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Any:
    """Additive masks of queries and keys that stand at given positions: a query sees the keys up to its own position.

    Additive, because SDPA would otherwise make one of a boolean mask in every layer.

    Args:
        model: whose layers' kinds and window count.
        queries: positions ``[rows, m]``.
        keys: positions ``[columns]`` or ``[rows, columns]``; a column that nobody sees has a larger one than any query.
        dtype: of the computation.

    Returns:
        The mask ``[rows, 1, m, columns]``, or where layers differ one for each kind.
    """
    window: int = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    keys = keys.expand(len(queries), -1)[:, None]
    found = {}
    for kind in dict.fromkeys(attention_kinds(model)):
        hidden = keys > queries[..., None]
        if kind == "sliding_attention":
            hidden |= keys <= queries[..., None] - window
        found[kind] = (hidden.to(dtype) * torch.finfo(dtype).min)[:, None]
    return found if len(found) > 1 else next(iter(found.values()))


class _PrefixLayer(DynamicLayer):
    """Takes the keys and values of the prefixes first; later calls see them before their own."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        keys, values = (x.index_select(0, self.rows) for x in (self.keys, self.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


class PrefixCache(Cache):
    """Keys and values of prefixes that several sequences share, with gradient: the gradients of all of them add up.

    Args:
        num_layers: of the model.
        rows: ``[n]``, which prefix each of the n sequences continues.
    """

    def __init__(self, num_layers: int, rows: Tensor) -> None:
        super().__init__(layers=[_PrefixLayer(rows) for _ in range(num_layers)])


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
    if attention_mask is None or heads == key_heads or heads // key_heads * length > _FOLDED_QUERIES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shared = heads // key_heads
    mask = attention_mask
    if length > 1:
        mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
    folded = query.reshape(rows, key_heads, shared * length, width)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


#: torch 2.12 wants to be told that query heads share keys, 2.11 cannot be.
_SHARES_KEYS: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA; where bounds of packed sequences are given, causal attention within each, by torch's kernel for that.

    Under autocast rotated queries and keys have the weights' dtype; SDPA would cast them, this kernel does not.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries, keys, values = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    given: Any = queries, keys, values, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    out: Any = varlen_attn(*given, scale=scaling, window_size=(-1, 0), **_SHARES_KEYS)
    return out[None], None


_GROUPED, _CAUSAL = "hdpo_grouped_sdpa", "hdpo_causal_sdpa"
AttentionInterface.register(_GROUPED, _grouped_sdpa)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)
# For a name without a function for masks transformers makes none; SDPA is then causal by itself.
AttentionInterface.register(_CAUSAL, _sdpa)
# Layers that are recomputed attend outside of the context that made the forward pass.
AttentionInterface.register("sdpa", _sdpa)


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend with :func:`_grouped_sdpa`, unless it was loaded with eager attention or looks none up.

    Compiled layers run as they are: there is a cache.
    """
    eager = model.config.get_text_config()._attn_implementation == "eager"
    as_it_is = eager or not model._supports_attention_backend
    with nullcontext() if as_it_is else _attending(model, _GROUPED), layers_uncompiled(model.base_model):
        yield


@contextmanager
def causal_attention(model: PreTrainedModel) -> Iterator[None]:
    """Spare an SDPA model without windows its mask, and the search for packed sequences, for which the host waits."""
    with _attending(model, _CAUSAL) if _is_plain(model) else nullcontext():
        yield


def packs_in_kernel(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sequences that lie in one row can be told apart by torch itself: on a GPU, in 16 bits."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not _is_plain(model):
        return False
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _attends_to_packed(device, dtype, heads, getattr(config, "num_key_value_heads", None) or heads, width)


@cache
def _attends_to_packed(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Whether torch's kernel takes heads of that number and width, forward and backward; older GPUs have none."""
    with torch.inference_mode(False), torch.enable_grad():
        query, key = (
            torch.ones(2, n, width, dtype=dtype, device=device, requires_grad=True) for n in (heads, key_heads)
        )
        bounds = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
        given: Any = query, key, key, bounds, bounds, 1, 1
        try:
            out: Any = varlen_attn(*given, scale=1.0, window_size=(-1, 0), **_SHARES_KEYS)
            out.sum().backward()
        except (RuntimeError, ValueError):
            return False
    return True


def _is_plain(model: PreTrainedModel) -> bool:
    """SDPA without windows, of a model that looks attention up by name (to Falcon an unknown one is eager)."""
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa" and model._supports_attention_backend
    return sdpa and set(attention_kinds(model)) == {"full_attention"}


@contextmanager
def _attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before
