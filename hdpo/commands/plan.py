"""``python -m hdpo plan``: the memory that a configuration needs of its GPUs, before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from hdpo.commands.memory import (
    GIB,
    OVERHEAD,
    PHASES,
    Config,
    Shape,
    is_sharded,
    lora_config,
    memory,
    vllm_bytes,
)
from hdpo.commands.run import read_config
from hdpo.distributed import SHARDED_ADAPTER
from hdpo.errors import ConfigError, check_at_least, check_positive, did_you_mean
from hdpo.policy.architecture import policy_config

_SIZES = (
    "data.prompts_per_step", "data.val_batch_size", "data.selection.max_prompt_tokens",
    "data.selection.max_privileged_tokens", "rollouts.num_generations", "rollouts.max_new_tokens",
    "rollouts.num_val_samples", "rollouts.val_max_new_tokens", "distillation.num_privileged",
    "distillation.max_new_tokens", "model.update.micro_batch_tokens", "model.engine.max_sequences",
)  # fmt: skip

_TOKENS, _RECOMPUTE = "model.update.micro_batch_tokens", "model.policy.gradient_checkpointing"
_WAVE, _SHARE = "model.engine.max_sequences", "model.engine.gpu_memory_utilization"
_SHARDS, _SYNC = "trainer.strategy.data_parallel_size", "model.update.sync_every_micro_batch"
_SMALLEST = {_TOKENS: 2048, _WAVE: 16}

#: How to change to a strategy or an engine on the command line, and what that changes.
_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("--trainer.strategy auto", {"trainer.strategy": "auto"}),
    "DDP": (
        "--config strategy/ddp",
        {"trainer.strategy": "DDPStrategy", "trainer.strategy.gradient_as_bucket_view": True},
    ),
    "FSDP2": ("--config strategy/fsdp2", {"trainer.strategy": "ModelParallelStrategy", _SHARDS: 8}),
    "transformers": (
        "--model.engine hdpo.generation.TransformersEngine",
        {"model.engine": "hdpo.generation.TransformersEngine", _WAVE: 512},
    ),
    "vLLM": (
        "--config engine/vllm",
        {
            "model.engine": "VLLMEngine",
            _SHARE: 0.3,
            "model.engine.free_memory_during_update": True,
        },
    ),
}


def _fitted(shape: Shape, config: Config, devices: int, gpu_bytes: int) -> dict[str, Any] | None:
    """The smallest change with which the run fits this strategy and engine; None if it does not fit at all.

    Micro-batches and the transformers engine's waves are halved, activations recomputed, sharded gradients summed in
    every micro-batch, vLLM's share made large enough for its weights: memory and speed change, results do not.
    """
    now, vllm = dict(config), "VLLM" in config["model.engine"]
    if vllm:
        now[_SHARE] = max(now[_SHARE], math.ceil(10 * vllm_bytes(shape, config) / gpu_bytes) / 10)
    if is_sharded(config):
        now[_SHARDS] = devices
    while True:
        peaks = memory(shape, now, devices, gpu_bytes)
        phase = max(peaks, key=peaks.__getitem__)
        if peaks[phase] + OVERHEAD <= gpu_bytes:
            return now
        key = _TOKENS if phase in ("teacher", "update", "optimizer") else _WAVE
        if phase != "optimizer" and not (vllm and key == _WAVE) and now[key] > _SMALLEST[key]:
            now[key] //= 2
        elif phase == "update" and not now[_RECOMPUTE]:
            now |= {_RECOMPUTE: True, _TOKENS: config[_TOKENS]}
        elif phase == "update" and is_sharded(config) and not now[_SYNC]:  # whole gradients do not fit
            now |= {_SYNC: True, _TOKENS: config[_TOKENS]}
        else:
            return None


def _rows(path: str, config: Config, devices: int, gpu_bytes: int) -> Iterator[list[str]]:
    """One row of the table for each engine and strategy, the configured engine first."""
    lora = lora_config(config)
    if lora and is_sharded(config):
        raise ConfigError(SHARDED_ADAPTER)
    shape = Shape.of(policy_config(path, config.get("model.policy.revision")), lora)
    engine = "vLLM" if "VLLM" in config["model.engine"] else "transformers"
    strategies = (("DDP",) if lora else ("DDP", "FSDP2")) if devices > 1 else ("none",)
    configured = engine, "FSDP2" if is_sharded(config) else strategies[0]
    for names in product(sorted(("transformers", "vLLM"), key=lambda name: name != engine), strategies):
        changes = [_CHANGES[name] for name in names if name not in configured]
        switched = dict(config)
        for _, change in changes:
            switched |= change
        found = _fitted(shape, switched, devices, gpu_bytes)
        peaks = memory(shape, found or switched, devices, gpu_bytes)
        cells = {phase: f"{(peak + OVERHEAD) / GIB:.1f}" for phase, peak in peaks.items()}
        largest = max(peaks, key=peaks.__getitem__)
        cells[largest] = f"**{cells[largest]}**"
        words = [word for word, _ in changes]
        words += [f"--{key} {str(value).lower()}" for key, value in (found or {}).items() if value != switched.get(key)]
        verdict = " ".join(words) or "as configured" if found else "does not fit"
        columns = [cells.get(phase, "-") for phase in PHASES]
        yield [path.rpartition("/")[2], str(devices), *reversed(names), *columns, verdict]


def main(args: Sequence[str]) -> int:
    """Run ``python -m hdpo plan``; returns 0 if the run fits in some way, 1 if it does not.

    Raises:
        ConfigError: an argument is bad, or the policy's shape cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hdpo plan",
        description="GiB on each GPU at the peak of each phase, by strategy and engine, and what makes the run fit. "
        "Memory only, computed by hdpo/commands/memory.py. The exit status is 1 if nothing fits.",
        epilog="All other arguments are those of `fit`: --config FILE, --model.update.micro_batch_tokens 8192, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, metavar="N", help="GPUs (default: trainer.devices x num_nodes)")
    parser.add_argument("--memory_gb", type=float, default=80.0, help="GiB of one GPU (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="print docs/what-fits-where.md's table instead")
    options, rest = parser.parse_known_args(args)
    for word in rest:  # what `fit` would know nothing of
        own = ("--devices", "--memory_gb", "--table") if word.startswith("--") and "." not in word else ()
        if meant := did_you_mean(word, own):
            raise ConfigError(f"plan: there is no {word}{meant}")
    check_at_least(1, **{"--devices": options.devices})
    check_positive(**{"--memory_gb": options.memory_gb})
    config: dict[str, Any] = {_WAVE: 512, "model.optimizer": ""} | read_config(rest)
    check_at_least(1, **{key.replace(".", "__"): config.get(key) for key in _SIZES})
    if "model.policy.path" not in config:
        raise ConfigError("plan: model.policy.path is not set; name the policy with --config or --model.policy.path")
    devices = options.devices or _num_devices(config)
    plans = [(config["model.policy.path"], devices)]
    if options.table:
        plans = [(f"Qwen/Qwen2.5-{size}B", devices) for size in ("1.5", "7") for devices in (1, 8)]
    rows = [["policy", "GPUs", "strategy", "engine", *PHASES, f"fits {options.memory_gb:g} GiB with"], ["---"] * 11]
    for path, devices in plans:
        rows += _rows(path, config, devices, int(options.memory_gb * GIB))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |")
    return 0 if options.table or any(row[-1] != "does not fit" for row in rows[2:]) else 1


def _num_devices(config: Config) -> int:
    """GPUs that the configuration names; 1 where it leaves their number to the machine."""
    named = str(config["trainer.devices"])
    count = int(named) if named.isdigit() else named.count(",") + 1  # a list, or "0,1"
    return count * int(config["trainer.num_nodes"])
