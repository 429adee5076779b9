"""Which architectures can be trained here: refused from their configuration, before any weight is read."""

from __future__ import annotations

from typing import Any

from hdpo.errors import ConfigError

__all__ = ["check_architecture"]

_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
#: As Qwen, Mixtral and gpt-oss, DeepSeek, DBRX and Ernie call the number of a layer's experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_architecture(config: Any) -> None:
    """Refuse what the policy, or vLLM with the policy's weights, would compute wrongly.

    Args:
        config: of transformers.

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
