"""How fast could it be? Kernels, bytes and FLOPs of the real code at full size, counted without a GPU.

    PYTHONPATH=. python benchmarks/roofline.py                     # Qwen2.5-1.5B on an H100, a minute of one CPU

Floating-point tensors are fake (tests/helpers/counting.py), all else is the code of a run. The roofline lets each
kernel take the longer of its bytes over the memory's bandwidth and its FLOPs over the dense 16-bit peak, and nothing
else: launches, latencies and imperfect kernels come on top, so that these are bounds. "mfu" counts 6 FLOPs a parameter
and token, the output layer at completion tokens alone, and no recomputation, as ``gpu_step.py`` does.

update: a micro-batch of sequences of 256 prompt and 768 completion tokens, forward and backward, gradients added to
those of another one; with an optimizer's step for every 16 of 16,384 tokens. decoding: one token of 512 rows at 300
columns, bfloat16 autocast, transformers engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from common import add_arguments, check_arguments, environment, report
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from hdpo.commands.memory import GIB, Shape
from hdpo.experience import Sequences
from hdpo.functional import derive_seeds, logprobs
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation import transformers as engine
from hdpo.policy import Policy, TokenBatch
from hdpo.policy.architecture import policy_config
from tests.helpers import counting

#: An H100's dense 16-bit peak and the bandwidth of its memory.
FLOPS, BYTES = 989e12, 3.35e12
PER_STEP = 16 * 16_384


class Roofline(counting.Counts):
    """Counts, with the seconds that the roofline lets them take."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.moved
        out = super().__torch_dispatch__(func, types, args, kwargs)
        flops = 0.0
        if func._overloadpacket in flop_registry:
            matrices = [x for x in args if not isinstance(x, torch.dtype)]  # of what products are, where it is said
            options = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            flops = flop_registry[func._overloadpacket](*matrices, **options, out_val=out)
        elif "attention" in func._schema.name:  # of a CPU: two products forward, five backward; half of them causal
            backward = "backward" in func._schema.name
            query, key = args[1:3] if backward else args[:2]
            rows, heads, length, width = query.shape
            flops = (10 if backward else 4) * rows * heads * length * key.shape[2] * width / (2 if length > 1 else 1)
        self.flops += flops
        self.seconds += max(flops / FLOPS, (self.moved - before) / BYTES)
        return out


@contextmanager
def counted() -> Iterator[Roofline]:
    """Fake tensors, counted."""
    with patch.object(counting, "Counts", Roofline), counting.counted() as counts:
        yield counts  # type: ignore[misc]


def since(counts: Roofline, start: tuple[float, ...]) -> dict[str, float]:
    """What came since a :func:`mark`."""
    names = "seconds", "kernels", "GiB_moved", "TFLOP"
    values = [now - then for now, then in zip(mark(counts), start, strict=True)]
    return dict(zip(names, (values[0], values[1], values[2] / GIB, values[3] / 1e12), strict=True))


def mark(counts: Roofline) -> tuple[float, ...]:
    """Where the counts stand."""
    return counts.seconds, counts.kernels.total(), counts.moved, counts.flops


def built(shape: str, recompute: bool) -> Policy:
    """A policy of the shape, as `fit` holds it."""
    config = policy_config(f"Qwen/{shape}")
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return Policy(model).train()


def update(shape: str, recompute: bool, tokens: int, chunk: int, option: str) -> dict[str, Any]:
    """One setting of the update."""
    num = tokens // 1024
    items = Sequences([[3] * 256 for _ in range(num)], [[5] * 768 for _ in range(num)])
    with counted() as counts:
        policy = built(shape, recompute)
        policy.chunk_elements = 1 << chunk
        optimizer = torch.optim.AdamW(policy.parameters(), **{option: True})  # type: ignore[arg-type]
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        batch, size = TokenBatch.from_sequences(items, policy.device), Shape.of(policy_config(f"Qwen/{shape}"))
        counts.start_peak()
        start = mark(counts)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            policy(batch).sum().backward()
        micro, peak, start = since(counts, start), counts.peak, mark(counts)
        optimizer.step()
        stepped = since(counts, start)
    layers = size.num_parameters - size.head * (1 if size.tied else 2)
    flops = 6.0 * (layers * tokens + size.head * 768 * num)
    took = micro["seconds"] + stepped["seconds"] * tokens / PER_STEP
    return {
        "what": f"update, {'recomputed' if recompute else 'kept'}, {tokens} tokens, chunk 2^{chunk}, {option}",
        "ms": 1000 * took, **{k: v for k, v in micro.items() if k != "seconds"},
        "optimizer_ms": 1000 * stepped["seconds"],
        "mfu": flops / took / FLOPS, "tokens_per_s": tokens / took, "peak_GiB": peak / GIB,
    }  # fmt: skip


def decoding(shape: str, rows: int, columns: int) -> dict[str, Any]:
    """One token, as the difference of two calls."""
    found = []
    prompts = [[3 + i] * columns for i in range(rows // 16)]
    seeds = derive_seeds(torch.arange(rows // 16)[:, None], torch.arange(16))
    with counted() as counts:
        policy = built(shape, False)
        for limit in (4, 12):
            start = mark(counts)
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                TransformersEngine().generate(policy, prompts, seeds, SamplingConfig(limit, 1.0, (policy.vocab_size,)))
            found.append(since(counts, start))
    token = {name: (found[1][name] - found[0][name]) / 8 for name in found[0]}
    return {"what": f"decoding, {rows} rows, {columns} columns", "ms": 1000 * token.pop("seconds"), **token}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen2.5-1.5B", help="policy (default: Qwen2.5-1.5B)")
    add_arguments(parser, repeats=1)
    args = parser.parse_args()
    check_arguments(parser, args)
    settings = [
        (True, 16_384, 25, "foreach"), (True, 16_384, 28, "fused"), (True, 8192, 28, "fused"),
        (False, 16_384, 28, "fused"), (False, 8192, 28, "fused"),
    ]  # fmt: skip
    with ExitStack() as stack:
        for bounds in (engine._SAMPLE_ELEMENTS, logprobs.CHUNK_ELEMENTS):
            if isinstance(bounds, dict):  # those of a GPU
                stack.enter_context(patch.dict(bounds, cpu=bounds["cuda"]))
        stack.enter_context(patch.object(logprobs, "_multiplies_into_float32", lambda device: True))
        rows = [decoding(args.shape, 512, 300), *(update(args.shape, *setting) for setting in settings)]
    report(rows, args, environment())


if __name__ == "__main__":
    main()
