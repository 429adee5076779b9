"""``python -m hdpo export``: a checkpoint's policy as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from hdpo.checkpoints import all_finite, check_alpha, read_header
from hdpo.commands.parsing import config_file
from hdpo.commands.suggestions import CommandParser
from hdpo.errors import ConfigError, first_line
from hdpo.policy import Policy, PolicyConfig, load_tokenizer
from hdpo.policy.lora import LoRAConfig, is_adapter

_PREFIX = "policy."


def _checkpoint_weights(path: Path, lora: LoRAConfig | None) -> dict[str, torch.Tensor]:
    """Weights of the policy's model in a checkpoint: one file, or the folder that FSDP2 writes."""
    read_header("--ckpt_path", path)
    if path.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        checkpoint = _load_distributed_checkpoint(path)  # its meta.pt with weights_only
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if lora is not None:
        check_alpha(lora.alpha, checkpoint, f"--ckpt_path {path}")
    weights = {k.removeprefix(_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(_PREFIX)}
    if not all_finite(weights.values()):
        raise ConfigError(f"--ckpt_path: {path} holds weights that are not finite; export the one before")
    return weights


def export_checkpoint(config: PolicyConfig, checkpoint: str | Path, out: str | Path) -> None:
    """Write a checkpoint's policy, whatever strategy saved it, as a Hugging Face model with its tokenizer.

    Raises:
        ConfigError: there is no such checkpoint, it holds no policy, or one of another architecture than ``config``
            names, or ``out`` cannot be written.
    """
    weights = _checkpoint_weights(Path(checkpoint), config.lora)
    policy = Policy.load(config)
    if policy.has_adapter:  # the checkpoint holds nothing else
        weights = {k: v for k, v in policy.state_dict().items() if not is_adapter(k)} | weights
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"--ckpt_path: the weights in {checkpoint} do not fit model.policy.path={config.path!r}; give the "
            "config.yaml of the run that wrote them"
        ) from error
    try:
        policy.save(out, load_tokenizer(config))
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({first_line(error)}): free space, or give another folder"
        ) from error


def main(args: Sequence[str]) -> int:
    """Run ``python -m hdpo export``; returns the exit status."""
    import yaml

    parser = CommandParser("export", description="Write a checkpoint's policy and tokenizer as a Hugging Face model.")
    parser.add_argument("--config", action="append", required=True, help="the run's config.yaml; later ones override")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint: a file, or a folder where it is sharded")
    parser.add_argument("--out", required=True, help="folder to write")
    options = parser.options(args)
    settings: dict[str, Any] = {}
    for file in options.config:
        content = yaml.safe_load(Path(config_file(file)).read_text(encoding="utf-8")) or {}
        model = content.get("model") or {}
        policy = (model.get("policy") or {}) if isinstance(model, dict) else model
        if not isinstance(policy, dict):
            raise ConfigError(f"--config: {file}: model.policy must be a section with a path, not {policy!r}")
        settings.update(policy)
    if "path" not in settings:
        raise ConfigError(f"--config: model.policy.path is in none of {', '.join(options.config)}")
    reader = ArgumentParser(exit_on_error=False)
    reader.add_argument("--policy", type=PolicyConfig)
    try:
        chosen = reader.instantiate(reader.parse_object({"policy": settings})).policy
    except ArgumentError as error:
        raise ConfigError(f"--config: model.policy: {' '.join(str(error).split())}") from None
    export_checkpoint(chosen, options.ckpt_path, options.out)
    print(f"policy: {options.out}")
    return 0
