"""Random policies of two layers: small enough for any test, and as exact as the architecture allows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hdpo.policy import Policy

__all__ = ["EOS", "VOCAB", "random_ids", "random_model", "random_policy"]

EOS, VOCAB = 2, 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_GPT2 |= {"eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.3}
_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, SIZES),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**SIZES, "head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, SIZES),
    "mistral": (MistralConfig, MistralForCausalLM, SIZES),
    # Its norms and softmax are computed in the weights' dtype; those of the others are float32 in places.
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
}


def random_model(kind: str = "qwen2", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A transformers model with random weights; ``options`` go to its configuration."""
    config, model, sizes = _KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**{**sizes, **options}))


def random_policy(kind: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    """The same as a policy; in float64, so that no CPU's rounding draws other tokens."""
    return Policy(random_model(kind, seed, **options).to(dtype))


def random_ids(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Token ids, none of which ends a completion."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
