"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: the policy's own weights stay as they are.

The initial policy, which a frozen teacher, the reference of a KL penalty and an initial sampler need, is then the same
weights with the adapter off: there is no second copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hdpo.errors import ConfigError, check_at_least, check_positive, first_line

_SEED = 0
"""Of the first matrices, so that all ranks and a resumed run begin with the same; the second ones begin at 0."""
_BASE, _ADAPTER = ".base_layer.", "default"


@dataclass
class LoRAConfig:
    """Which low-rank matrices are trained in place of the policy's weights; needs peft.

    Attributes:
        r: rank of the matrices.
        alpha: their product is scaled by ``alpha / r``.
        target_modules: names of the linear layers that get them (``[q_proj, v_proj]``), or ``all-linear`` for all but
            the output layer.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        check_at_least(1, model__policy__lora__r=self.r)
        check_positive(model__policy__lora__alpha=self.alpha)


def _peft_config(config: LoRAConfig) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"model.policy.lora needs peft ({first_line(error)}): pip install 'hdpo[lora]', or leave it null"
        ) from error
    targets = config.target_modules
    return LoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.alpha),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def add_adapter(model: Any, config: LoRAConfig) -> None:
    """Put an adapter into a model, in place; afterwards its parameters alone have gradients.

    Raises:
        ConfigError: peft is missing, no layer bears the names, or the output layer or an embedding does.
    """
    prepared = _peft_config(config)
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            inject_adapter_in_model(prepared, model, adapter_name=_ADAPTER)
        except ValueError as error:
            raise ConfigError(f"model.policy.lora.target_modules: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        if is_adapter(name) and parameter.dtype.itemsize < 4:  # in which small updates are rounded away
            parameter.data = parameter.data.float()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = [name for name in names if not name.startswith(model.base_model_prefix) or not is_adapter(name)]
    if outside:
        raise ConfigError(
            f"model.policy.lora.target_modules must not name embeddings or the output layer, but {outside[0]} is one"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_frozen(name: str) -> bool:
    """Whether a checkpoint of a policy with an adapter leaves this one of a module's weights out: it never changes."""
    return name.startswith(("policy.", "teacher.")) and not is_adapter(name)


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that have an adapter."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


@contextmanager
def adapter_off(layers: Sequence[Any]) -> Iterator[None]:
    """Let all :func:`adapter_layers` of a model compute as they did before they had an adapter."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: nn.Module, *, adapter: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights that a model without an adapter would have, under its names, one at a time.

    Args:
        model: with or without an adapter.
        adapter: whether the adapter is added to them; if not, they are the initial ones.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        plain = name.replace(_BASE, ".")
        yield plain, merged_weight(model, plain) if adapter and plain != name else parameter.detach()


@torch.no_grad()
def merged_weight(model: nn.Module, name: str, *, adapter: bool = True) -> Tensor:
    """One of the weights that :func:`merged_weights` names."""
    path, _, kind = name.rpartition(".")
    layer: Any = model.get_submodule(path)
    if not hasattr(layer, "base_layer"):
        return model.get_parameter(name).detach()
    weight: Tensor = getattr(layer.base_layer, kind).detach()
    return (weight + layer.get_delta_weight(_ADAPTER)).to(weight.dtype) if adapter and kind == "weight" else weight


def save_adapter(model: Any, folder: Path) -> None:
    """Write a model's adapter in peft's format."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    folder.mkdir(parents=True, exist_ok=True)
    # The names that peft's own models have.
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[_ADAPTER].save_pretrained(folder)
