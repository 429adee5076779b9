"""``python -m hdpo plan``: what a configuration needs of its GPUs, before anything is loaded.

The formulas stand in :mod:`hdpo.analysis.cost`. They were compared with tensors that PyTorch really allocates for
parameters, gradients, optimizer state and saved activations, not with the memory of a GPU.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hdpo.analysis.cost import (
    GIB,
    PHASES,
    SHAPES,
    Hardware,
    Lengths,
    Setup,
    Shape,
    Workload,
    memory,
    num_parameters,
    peak,
    step_cost,
)

__all__ = ["fitted", "main", "setup_of", "shape_of", "workload_of"]

_STRATEGIES: tuple[Literal["ddp", "fsdp2"], ...] = ("ddp", "fsdp2")
_ENGINES: tuple[Literal["transformers", "vllm"], ...] = ("transformers", "vllm")
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
#: Hub ids whose shape is built in, so that they need no network.
_QWEN = re.compile(r"Qwen/Qwen2\.5-(?:Math-|Coder-)?(0\.5|1\.5|7)B(?:-Instruct)?")
_OVERLAY = {"ddp": "configs/strategy/ddp.yaml", "fsdp2": "configs/strategy/fsdp2.yaml"}
_VLLM_OVERLAY = "configs/engine/vllm.yaml"
_SMALLEST_MICRO_BATCH, _SMALLEST_WAVE = 2048, 16


# ---------------------------------------------------------------------- from the configuration


def _get(config: dict[str, Any], path: str, default: Any = None) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, dict) or value.get(key) is None:
            return default
        value = value[key]
    return value


def _count(config: dict[str, Any], path: str, lowest: int = 1) -> int:
    value = _get(config, path)
    if not isinstance(value, int) or value < lowest:
        raise ValueError(f"{path} must be at least {lowest}, got {value}")
    return value


def workload_of(config: dict[str, Any]) -> Workload:
    """Read the sizes of a step from a complete configuration, as ``fit --print_config`` writes it.

    Raises:
        ValueError: a size below 1; the message names the key.
    """
    weight_bytes = _BYTES[_get(config, "model.policy.dtype", "float32")]
    precision = str(_get(config, "trainer.precision", "32-true"))
    optimizer = str(_get(config, "model.optimizer.class_path", "torch.optim.AdamW")).rpartition(".")[2]
    states = 2
    if optimizer == "SGD":
        states = 1 if _get(config, "model.optimizer.init_args.momentum", 0) else 0
    distils = _get(config, "model.distillation_weight", 0.1) > 0
    new_tokens = _count(config, "rollouts.max_new_tokens")
    return Workload(
        prompts=_count(config, "data.prompts_per_step"),
        num_generations=_count(config, "rollouts.num_generations"),
        max_prompt_tokens=_count(config, "data.max_prompt_tokens"),
        max_new_tokens=new_tokens,
        max_privileged_tokens=_count(config, "data.max_privileged_tokens"),
        num_privileged=_count(config, "distillation.num_privileged") if distils else 0,
        max_cliffs=_count(config, "distillation.max_cliffs_per_step", 0),
        privileged_new_tokens=_count(config, "distillation.max_new_tokens"),
        topk=_count(config, "distillation.topk"),
        val_batch_size=_count(config, "data.val_batch_size"),
        num_val_samples=_count(config, "rollouts.num_val_samples"),
        val_new_tokens=_get(config, "rollouts.val_max_new_tokens") or new_tokens,
        micro_batch_tokens=_count(config, "model.micro_batch_tokens"),
        checkpointing=bool(_get(config, "model.policy.gradient_checkpointing", False)),
        weight_bytes=weight_bytes,
        compute_bytes=min(weight_bytes, 2) if "16" in precision else weight_bytes,
        optimizer_states=states,
        extra_copies=(distils and _get(config, "model.teacher") in ("frozen", "ema"))
        + (_get(config, "model.kl_coef", 0.0) > 0),
    )


def setup_of(config: dict[str, Any], devices: int | None, memory_bytes: int) -> Setup:
    """Read strategy and engine from a complete configuration.

    Args:
        config: as ``fit --print_config`` writes it.
        devices: number of GPUs; None for that of the configuration (1 where it says ``auto``).
        memory_bytes: of one GPU.
    """
    strategy = _get(config, "trainer.strategy", "auto")
    name = strategy.get("class_path", "") if isinstance(strategy, dict) else str(strategy)
    if devices is None:
        per_node = _get(config, "trainer.devices", 1)
        per_node = len(per_node) if isinstance(per_node, list) else int(per_node) if str(per_node).isdigit() else 1
        devices = max(1, per_node) * int(_get(config, "trainer.num_nodes", 1))
    engine = str(_get(config, "model.engine.class_path", ""))
    options = _get(config, "model.engine.init_args", {})
    return Setup(
        devices=devices,
        memory=memory_bytes,
        strategy="fsdp2" if "ModelParallel" in name else "ddp",
        engine="vllm" if "VLLM" in engine else "transformers",
        max_sequences=int(options.get("max_sequences") or Setup.max_sequences),
        share=float(options.get("gpu_memory_utilization") or Setup.share),
        sleeps=bool(options.get("free_memory_during_update", True)),
    )


def shape_of(path: str, revision: str | None = None) -> tuple[str, Shape]:
    """Name and shape of ``model.policy.path``, from its config.json alone.

    Raises:
        ValueError: it cannot be read, or is of an unknown architecture.
    """
    if match := _QWEN.fullmatch(path):
        name = f"qwen2.5-{match[1]}b"
        return f"{path} (built-in shape {name})", SHAPES[name]
    from transformers import AutoConfig

    from hdpo.paths import resolve_path

    try:
        config = AutoConfig.from_pretrained(resolve_path(path), revision=revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.policy.path: cannot read the configuration of {path!r} ({first}). Give a folder with config.json, "
            f"a hub id that this machine can reach, or --shape {'|'.join(SHAPES)}"
        ) from error
    return path, Shape.from_config(config.get_text_config())


# ---------------------------------------------------------------------- what fits


def fitted(shape: Shape, work: Workload, setup: Setup) -> tuple[Workload, Setup] | None:
    """The smallest change with which the work fits this strategy and engine; None if it does not fit at all.

    ``micro_batch_tokens`` and the transformers engine's ``max_sequences`` are halved, which changes no result; nothing
    else is touched.
    """
    while True:
        total, phase = peak(memory(shape, work, setup))
        if total <= setup.memory:
            return work, setup
        if phase in ("update", "teacher") and work.micro_batch_tokens > _SMALLEST_MICRO_BATCH:
            work = replace(work, micro_batch_tokens=work.micro_batch_tokens // 2)
        elif phase == "rollouts" and setup.engine == "transformers" and setup.max_sequences > _SMALLEST_WAVE:
            setup = replace(setup, max_sequences=setup.max_sequences // 2)
        else:
            return None


def _alternatives(setup: Setup) -> list[Setup]:
    """Every strategy and engine, the configuration's own first."""
    strategies = _STRATEGIES if setup.devices > 1 else _STRATEGIES[:1]
    found = [replace(setup, strategy=s, engine=e) for e in _ENGINES for s in strategies]
    return sorted(found, key=lambda other: other != setup)


def _arguments(work: Workload, setup: Setup, before: Workload, start: Setup, shards: int | None) -> list[str]:
    """Command-line arguments that lead from one plan to another.

    Args:
        work: what fits.
        setup: what fits.
        before: as configured.
        start: as configured; ``auto`` is DDP.
        shards: as configured, FSDP2's ``data_parallel_size``.
    """
    found = []
    if setup.strategy != start.strategy:
        found.append(f"--config {_OVERLAY[setup.strategy]}")
        shards = 8  # the overlay's
    if setup.strategy == "fsdp2" and setup.devices != shards:
        found.append(f"--trainer.strategy.init_args.data_parallel_size {setup.devices}")
    if setup.engine != start.engine:
        found.append(f"--config {_VLLM_OVERLAY}" if setup.engine == "vllm" else "--model.engine TransformersEngine")
    if work.micro_batch_tokens != before.micro_batch_tokens:
        found.append(f"--model.micro_batch_tokens {work.micro_batch_tokens}")
    if setup.engine == "transformers" and setup.max_sequences != start.max_sequences:
        found.append(f"--model.engine.init_args.max_sequences {setup.max_sequences}")
    return found


# ---------------------------------------------------------------------- printing


def _strategy_name(setup: Setup) -> str:
    return {"ddp": "DDP", "fsdp2": "FSDP2"}[setup.strategy] if setup.devices > 1 else "one GPU"


def _print_table(rows: Sequence[Sequence[str]], out: Callable[[str], None]) -> None:
    """A Markdown table; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        out("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            out("| " + " | ".join("-" * width for width in widths) + " |")


def _gib(number: float) -> str:
    return f"{number / GIB:.1f}"


def _print_memory(shape: Shape, work: Workload, setup: Setup, out: Callable[[str], None]) -> None:
    parts = memory(shape, work, setup)
    total, phase = peak(parts)
    verdict = "fits" if total <= setup.memory else "does not fit"
    out(f"\n{_strategy_name(setup)}, {setup.engine} engine: {verdict}; peak {_gib(total)} GiB in phase {phase}\n")
    rows = [["GiB on each GPU", *PHASES]]
    rows += [[name, *(_gib(values[p]) for p in PHASES)] for name, values in parts.items() if any(values.values())]
    rows.append(["sum", *(_gib(sum(values[p] for values in parts.values())) for p in PHASES)])
    _print_table(rows, out)


def _print_time(
    shape: Shape, work: Workload, setup: Setup, hardware: Hardware, lengths: Lengths, out: Callable[[str], None]
) -> None:
    out(
        f"\nseconds a step, {setup.engine} engine on {setup.devices} GPU(s), if a GPU does "
        f"{hardware.peak_flops / 1e12:.0f} TFLOP/s and {hardware.bandwidth / 1e12:.2f} TB/s at best, prefill, teacher "
        f"and update\nreach {hardware.mfu:.0%} of it and decoding {hardware.bandwidth_share:.0%}, a completion has "
        f"{lengths.fill:.0%} of its limit, {lengths.cliffs:.0%} of the prompts are cliffs and {lengths.mixed:.0%} "
        "mixed (grading left out)\n"
    )
    costs = step_cost(shape, work, setup, hardware, lengths)
    rows = [["station", "tokens", "model PFLOP", "seconds"]]
    rows += [[n, f"{c.tokens:,.0f}", f"{c.flops / 1e15:.2f}", f"{c.seconds:.1f}"] for n, c in costs.items()]
    rows.append(
        [
            "sum",
            "",
            f"{sum(c.flops for c in costs.values()) / 1e15:.2f}",
            f"{sum(c.seconds for c in costs.values()):.1f}",
        ]
    )
    _print_table(rows, out)


def _print_fits(
    shape: Shape,
    work: Workload,
    setup: Setup,
    shards: int | None,
    hardware: Hardware,
    lengths: Lengths,
    out: Callable[[str], None],
) -> bool:
    fitting = [pair for other in _alternatives(setup) if (pair := fitted(shape, work, other))]
    out("")
    if not fitting:
        out(
            f"nothing fits: no strategy and engine, with micro_batch_tokens down to {_SMALLEST_MICRO_BATCH} and "
            f"max_sequences to {_SMALLEST_WAVE}; try more GPUs, shorter limits or gradient checkpointing"
        )
    for here, now in fitting:
        total, _ = peak(memory(shape, here, now))
        seconds = sum(cost.seconds for cost in step_cost(shape, here, now, hardware, lengths).values())
        changes = " ".join(_arguments(here, now, work, setup, shards)) or "as configured"
        name = f"{_strategy_name(now)}, {now.engine} engine"
        out(f"fits: {name}, {_gib(total)} GiB, about {seconds:.0f} s a step: {changes}")
    return bool(fitting)


def _print_overview(work: Workload, setup: Setup, out: Callable[[str], None]) -> None:
    """Every built-in shape on one and on eight GPUs."""
    rows = [["policy", "GPUs", "strategy", "transformers engine", "vLLM engine"]]
    for name, shape in SHAPES.items():
        if name == "toy":
            continue
        for devices, strategy in ((1, _STRATEGIES[0]), *((8, s) for s in _STRATEGIES)):
            cells = []
            for engine in _ENGINES:
                now = replace(setup, devices=devices, strategy=strategy, engine=engine)
                pair = fitted(shape, work, now)
                if pair is None:
                    cells.append("does not fit")
                    continue
                here, there = pair
                total, _ = peak(memory(shape, here, there))
                changes = []
                if here.micro_batch_tokens != work.micro_batch_tokens:
                    changes.append(f"micro_batch_tokens {here.micro_batch_tokens}")
                if there.max_sequences != now.max_sequences:
                    changes.append(f"max_sequences {there.max_sequences}")
                cells.append(f"{total / GIB:.0f} GiB" + (f" with {', '.join(changes)}" if changes else ""))
            label = {"ddp": "DDP", "fsdp2": "FSDP2"}[strategy] if devices > 1 else "none"
            rows.append([name, str(devices), label, *cells])
    _print_table(rows, out)


# ---------------------------------------------------------------------- command


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m hdpo plan",
        description="Memory by part and phase, whether it fits and with which overlay, and an estimate of seconds. "
        "Formulas, not measurements: see hdpo/analysis/cost.py.",
        epilog="Every other --KEY VALUE is a key of `fit`, for example --model.micro_batch_tokens 8192.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="as for fit; may be repeated")
    parser.add_argument("--devices", type=int, metavar="N", help="GPUs (default: trainer.devices x num_nodes)")
    parser.add_argument("--memory_gb", type=float, default=80.0, help="GiB of one GPU (default %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a built-in shape instead of model.policy.path")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of one GPU, dense (default: an H100's, 989)")
    parser.add_argument(
        "--mfu", type=float, default=Hardware.mfu, help="share of it that is reached (default %(default)s)"
    )
    parser.add_argument(
        "--fill", type=float, default=Lengths.fill, help="mean completion / limit (default %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="one table over the built-in shapes on 1 and 8 GPUs")
    options, extra = parser.parse_known_args(args)
    for name in ("devices", "memory_gb", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    for name in ("mfu", "fill"):
        if not 0 < getattr(options, name) <= 1:
            raise ValueError(f"--{name} must be in (0, 1], got {getattr(options, name)}")
    for file in options.config:
        if not Path(file).is_file():
            raise ValueError(f"--config: there is no file {file!r}")
    return options, extra


def _complete(options: argparse.Namespace, extra: list[str], run: Callable[[list[str]], int]) -> dict[str, Any] | int:
    """The configuration with all defaults, or the exit status of the parser that refused it."""
    arguments = ["fit", *(word for file in options.config for word in ("--config", file)), *extra, "--print_config"]
    with redirect_stdout(io.StringIO()) as printed:
        try:
            status: Any = run(arguments)
        except SystemExit as exit_:
            status = exit_.code
    if status:
        return int(status)
    config = yaml.safe_load(printed.getvalue())
    assert isinstance(config, dict)
    return config


def main(args: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Run ``python -m hdpo plan``.

    Args:
        args: command-line arguments.
        run: runs one command and returns its exit status; it is asked for ``fit --print_config``.

    Returns:
        0 if the work fits in some way, 1 if it does not, 2 if ``fit`` would refuse the configuration.

    Raises:
        ValueError: an argument is bad, or the policy's shape cannot be read.
    """
    options, extra = _parse(args)
    config = _complete(options, extra, run)
    if isinstance(config, int):
        return config
    work = workload_of(config)
    setup = setup_of(config, options.devices, int(options.memory_gb * GIB))
    hardware, lengths = Hardware(peak_flops=options.peak_tflops * 1e12, mfu=options.mfu), Lengths(fill=options.fill)
    if options.table:
        _print_overview(work, setup, print)
        return 0
    if options.shape:
        name, shape = options.shape, SHAPES[options.shape]
    else:
        name, shape = shape_of(_get(config, "model.policy.path"), _get(config, "model.policy.revision"))
    print(
        f"{name}: {num_parameters(shape):,} parameters; {setup.devices} GPU(s) of {options.memory_gb:g} GiB. "
        "Formulas (hdpo/analysis/cost.py), not measured on a GPU."
    )
    for strategy in _STRATEGIES if setup.devices > 1 else _STRATEGIES[:1]:
        _print_memory(shape, work, replace(setup, strategy=strategy), print)
    _print_time(shape, work, setup, hardware, lengths, print)
    shards = _get(config, "trainer.strategy.init_args.data_parallel_size")
    return 0 if _print_fits(shape, work, setup, shards, hardware, lengths, print) else 1
