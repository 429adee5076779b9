"""Which architectures can be trained here, and how their decoder layers are compiled."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hdpo.distributed import decoder_layers
from hdpo.errors import ConfigError, first_line
from hdpo.files import resolve_path

#: What logits are multiplied by or bounded with, as architectures call it; Falcon-H1, RecurrentGemma and xLSTM last.
_LOGITS = ["final_logit_softcapping", "logits_scaling", "logit_scale"]
_LOGITS += ["lm_head_multiplier", "logits_soft_cap", "output_logit_soft_cap"]
#: As Qwen, Mixtral and gpt-oss, DeepSeek, DBRX and Ernie call the number of a layer's experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

#: Qwen2.5 by size, so that its plan needs no network.
_QWEN25_KEYS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
_QWEN25_KEYS += ["intermediate_size", "tie_word_embeddings"]
_QWEN25 = {
    "0.5": (151_936, 896, 24, 14, 2, 4864, True),
    "1.5": (151_936, 1536, 28, 12, 2, 8960, True),
    "7": (152_064, 3584, 28, 28, 4, 18_944, False),
    "32": (152_064, 5120, 64, 40, 8, 27_648, False),
}


def check_architecture(config: Any) -> None:
    """Refuse what the policy, or vLLM with the policy's weights, would compute wrongly.

    Raises:
        ConfigError: the logits are transformed after the output layer, or there is a mixture of experts.
    """
    text = config.get_text_config()
    for name in _LOGITS:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"{config.model_type}: its logits pass through {name}, which the chunked output layer "
                "does not apply; choose a policy without it"
            )
    # Not by getattr: transformers has aliases, and config.json's own name is wanted.
    given = vars(text) | vars(getattr(text, "ffn_config", object))
    for name in _EXPERTS:
        if (given.get(name) or 0) > 1:
            raise ConfigError(
                f"model.policy.path: {config.model_type} is a mixture of experts ({name} is {given[name]}), which "
                "cannot be trained here: engine and policy would route the same token to different experts, and vLLM "
                "names their weights otherwise; choose a dense policy"
            )


def counts_columns(config: Any) -> bool:
    """Whether distances are counted in columns (ALiBi), of which a shorter prompt's padding would take some."""
    text = config.get_text_config()
    return reads_flat_mask(config) or getattr(getattr(text, "attn_config", None), "alibi", False)  # the latter is MPT


def reads_flat_mask(config: Any) -> bool:
    """Whether ALiBi is made of a mask without queries, which a cache whose columns are positions has not."""
    text = config.get_text_config()
    return text.model_type == "bloom" or (text.model_type == "falcon" and text.alibi)


def policy_config(path: str, revision: str | None = None) -> Any:
    """The architecture of ``model.policy.path`` as transformers' configuration; no weights are read.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    if qwen := re.fullmatch(r"Qwen/Qwen2\.5-(?:Math-|Coder-)?(0\.5|1\.5|7|32)B(?:-Instruct)?", path):
        return AutoConfig.for_model("qwen2", **dict(zip(_QWEN25_KEYS, _QWEN25[qwen[1]], strict=True)))
    try:
        config = AutoConfig.from_pretrained(resolve_path(path), revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.policy.path: cannot read the configuration of {path!r} ({first_line(error)}). Give a hub id that "
            "this machine can reach, or a local folder with config.json"
        ) from error
    check_architecture(config)
    return config


def compile_layers(backbone: nn.Module) -> None:
    """Compile each decoder layer in place, once for all lengths; names of weights stay."""
    for layer in decoder_layers(backbone):
        layer.compile(dynamic=True)


def is_compiled(backbone: nn.Module) -> bool:
    """Whether :func:`compile_layers` has been here."""
    return any(layer._compiled_call_impl is not None for layer in decoder_layers(backbone))


def layers_uncompiled(backbone: nn.Module) -> AbstractContextManager[Any]:
    """Let layers run as they are: a cache that grows would have them compiled again and again."""
    return torch.compiler.set_stance("force_eager") if is_compiled(backbone) else nullcontext()
