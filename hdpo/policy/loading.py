"""Which model is trained, and how it comes from a hub or a folder; everything that is wrong with it is one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError

from hdpo.errors import ConfigError, first_line
from hdpo.files import resolve_path
from hdpo.policy.architecture import check_architecture, compile_layers
from hdpo.policy.lora import LoRAConfig, add_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class PolicyConfig:
    """Which model is trained, and how it is held.

    Attributes:
        path: hub id, local folder, or ``pkg://package/folder`` for weights that ship inside a Python package.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the master weights. Keep ``float32``: at a learning rate of 1e-6 updates of bfloat16 weights
            are rounded away. With ``lora``, ``bfloat16`` is safe: the adapter stays in float32. The computation's dtype
            is ``trainer.precision``.
        attn_implementation: attention of transformers: ``sdpa``, ``flash_attention_2``, ``eager``.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more compute.
        compile: compile the decoder layers (``torch.compile``): fewer passes over memory in the update, for a minute or
            two at its start. Checkpoints are the same.
        gather_dtype: dtype in which FSDP2 gathers weights for the computation; null for their own. Gradients are
            summed in float32. bfloat16 halves what is sent and held of gathered weights, and makes norms and the
            residual stream bfloat16 too, which ``trainer.precision: bf16-mixed`` leaves in float32.
        trust_remote_code: allow model code from the hub.
        lora: train low-rank matrices in place of the weights (keys ``r``, ``alpha``, ``target_modules``); null for all
            weights.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    gather_dtype: Literal["float32", "bfloat16"] | None = None
    trust_remote_code: bool = False
    lora: LoRAConfig | None = None


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside the policy.

    Raises:
        ConfigError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    path = resolve_path(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _load_error("tokenizer", config.path, error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {config.path!r} has no end-of-sequence token: completions could not end")
    if not tokenizer.encode("1 + 1", add_special_tokens=False):  # what transformers makes of a folder without one
        raise ConfigError(f"model.policy.path: the tokenizer of {config.path!r} has no vocabulary: add its files")
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_model(config: PolicyConfig) -> PreTrainedModel:
    """Load weights and architecture.

    Raises:
        ConfigError: nothing loadable at ``config.path``; the message names the key.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options: dict[str, Any] = {
        **source,
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "output_loading_info": True,
    }
    try:
        path = resolve_path(config.path)
        check_architecture(AutoConfig.from_pretrained(path, **source))
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _load_error("causal language model", config.path, error) from error
    model, info = loaded
    # transformers draws at random what it does not find.
    for what, names in (
        ("lacks the weights", sorted(info["missing_keys"])),
        ("holds values that are not finite in", [n for n, p in model.named_parameters() if not p.isfinite().all()]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"model.policy.path: {config.path!r} {what} {', '.join(names[:3])}{more}")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.config.use_cache = False
    if config.lora is not None:
        add_adapter(model, config.lora)
    if config.compile:
        compile_layers(model.base_model)
    return cast("PreTrainedModel", model)


def _load_error(what: str, path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.policy.path: cannot load a {what} from {path!r} ({first_line(error)}). Give a hub id that this machine "
        "can reach or a local folder with config.json, the weights and the tokenizer."
    )
