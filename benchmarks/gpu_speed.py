"""Parts B and C of ``gpu_check.py``: how fast is it, against what was counted without a GPU?

Expected figures are of an H100 (RESULTS.md, "Counted without a GPU"); where torch runs on a CPU they are null.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_correct import DEVICE, ON_GPU, autocast, policy
from gpu_run import architecture, update_flops
from gpu_step import PEAKS

from hdpo.commands.memory import GIB, Shape, _update
from hdpo.experience import Sequences
from hdpo.functional import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.weights import named_weights, weights_fingerprint
from hdpo.policy import Policy, TokenBatch
from hdpo.policy.architecture import compile_layers

LARGE = "Qwen2.5-1.5B"
#: Share of the peak that the roofline allows an update at 1.5B, by (recomputation, tokens of a micro-batch).
ROOFLINE = {(True, 16_384): 0.352, (True, 8_192): 0.339, (False, 16_384): 0.430, (False, 8_192): 0.413}


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median, after one uncounted call; the GPU is awaited."""
    found = []
    for _ in range(repeats + 1):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name(0) if ON_GPU else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def decoding(size: str) -> dict[str, Any]:
    """Milliseconds per token of the transformers engine by rows and columns; expected are 8 to 12 at 1.5B."""
    subject, full = policy(size, LARGE), size == "full"
    grid = [(r, c) for r in (512, 64, 256) for c in (300, 1000)] if full else [(4, 20)]
    found = {}
    for rows, columns in grid:

        def sample(limit: int, rows: int = rows, columns: int = columns) -> float:
            sampling = SamplingConfig(limit, 1.0, (subject.vocab_size,))
            seeds = derive_seeds(torch.arange(rows // 4)[:, None], torch.arange(4))
            prompts = [[3 + i] * columns for i in range(rows // 4)]
            with autocast():
                return seconds(lambda: TransformersEngine().generate(subject, prompts, seeds, sampling), 1)

        few, many = (4, 36) if full else (2, 6)
        found[f"{rows}x{columns}"] = 1000 * (sample(many) - sample(few)) / (many - few)
    largest = found.get("512x300", 0.0)
    return {"ok": largest < 15 if ON_GPU and full else None, "ms_per_token": found, "expected": [8, 12]}


def _micro_batch(subject: Policy, tokens: int) -> TokenBatch:
    prompt, completion = (256, 768) if tokens > 1024 else (8, 24)
    num = tokens // (prompt + completion)
    items = Sequences([[3 + i] * prompt for i in range(num)], [[5 + i] * completion for i in range(num)])
    return TokenBatch.from_sequences(items, DEVICE)


def _updated(size: str, recompute: bool) -> Policy:
    subject = policy(size, LARGE).train()
    if recompute:
        subject.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return subject


def _pass(subject: Policy, batch: TokenBatch) -> None:
    with autocast():
        subject(batch).mean().backward()


def update(size: str) -> dict[str, Any]:
    """Tokens per second, utilisation and peak of a forward and backward pass, in four settings."""
    full, found, ok = size == "full", {}, True
    for recompute in (True, False):
        for tokens in (16_384, 8_192) if full else (128, 64):
            torch.cuda.empty_cache()
            subject = _updated(size, recompute)
            shape, batch = Shape.of(subject.model.config), _micro_batch(subject, tokens)
            config = {
                "model.policy.dtype": "float32", "trainer.precision": "bf16-mixed",
                "model.policy.gradient_checkpointing": recompute,
            }  # fmt: skip
            row: dict[str, Any] = {"roofline_mfu": ROOFLINE.get((recompute, tokens))}
            row["planned_GiB"] = (8 * shape.num_parameters + _update(shape, config, tokens)) / GIB
            subject.zero_grad()
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            try:
                took = seconds(lambda subject=subject, batch=batch: _pass(subject, batch))
            except torch.OutOfMemoryError:
                row["fits"] = False
                ok &= row["planned_GiB"] > torch.cuda.get_device_properties(0).total_memory / GIB / 1.1
            else:
                row["tokens_per_s"] = tokens / took
                flops, peak_flops = update_flops(shape, tokens, len(batch.targets)), _peak_flops()
                row["mfu"] = flops / took / peak_flops if peak_flops else None
                row["peak_GiB"] = torch.cuda.max_memory_allocated() / GIB if ON_GPU else None
                if ON_GPU and full:
                    ok &= abs(row["peak_GiB"] / row["planned_GiB"] - 1) < 0.1
                    ok &= row["mfu"] is None or row["mfu"] > 0.75 * row["roofline_mfu"]
            found[f"{'recomputed' if recompute else 'kept'}, {tokens} tokens"] = row
            del subject, batch
    return {"ok": ok if ON_GPU and full else None, **found}


def optimizer(size: str) -> dict[str, Any]:
    """AdamW fused, which is what hdpo takes on a GPU, against torch's own choice."""
    found = {}
    for option in ("fused", "foreach"):
        subject = policy(size, LARGE)
        adamw = torch.optim.AdamW(subject.parameters(), lr=1e-6, **{option: True})  # type: ignore[arg-type]
        for parameter in subject.parameters():
            parameter.grad = torch.ones_like(parameter)
        found[f"{option}_ms"] = 1000 * seconds(adamw.step)
        del subject, adamw
    # 28 bytes are read and written of each parameter.
    num = Shape.of(architecture(LARGE if size == "full" else "toy")).num_parameters
    return {**found, "roofline_ms": 1000 * 28 * num / 3.35e12}


def weights(size: str) -> dict[str, Any]:
    """What vLLM's synchronisation costs before vLLM: the fingerprint, and the stream of weights in 16 bits."""
    subject = policy(size, LARGE)
    return {
        "fingerprint_ms": 1000 * seconds(lambda: weights_fingerprint(subject)),
        "stream_ms": 1000 * seconds(lambda: [tensor.shape for _, tensor in named_weights(subject, torch.bfloat16)]),
    }


def compiled(size: str) -> dict[str, Any]:
    """Forward and backward passes with ``model.policy.compile`` against those without."""
    if not ON_GPU:
        return {"ok": None, "skipped": "no GPU"}
    found = {}
    for recompute, tokens in ((False, 8_192), (True, 16_384)):
        subject = _updated(size, recompute)
        batch, peak = _micro_batch(subject, tokens), _peak_flops()
        flops = update_flops(Shape.of(subject.model.config), tokens, len(batch.targets))
        eager = seconds(lambda subject=subject, batch=batch: _pass(subject, batch))
        compile_layers(subject.backbone)
        took = seconds(lambda subject=subject, batch=batch: _pass(subject, batch))
        row = {"eager_s": eager, "compiled_s": took, "mfu": peak and flops / took / peak}
        found[f"{'recomputed' if recompute else 'kept'}, {tokens} tokens"] = row
        del subject, batch
    return found


def step(size: str) -> dict[str, Any]:
    """``gpu_step.py``: every station, and peaks against the plan."""
    toy = "--shape toy --prompts 4 --completions 2 --new-tokens 24 --mean-tokens 16 --prompt-tokens 10 --repeats 1"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "step.json"
        script = [str(Path(__file__).with_name("gpu_step.py")), "--json", str(target)]
        options = f"{toy} --privileged-tokens 30 --threads 1" if size == "toy" else "--repeats 2"
        # Python's own options, among them those of a test that hides what is installed, stand before the script.
        begin = sys.orig_argv[: next(i for i, a in enumerate(sys.orig_argv) if a.endswith("gpu_check.py"))]
        done = subprocess.run([*begin, *script, *options.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"ok": False, "error": done.stderr[-500:]}
        result = json.loads(target.read_text())
    rows = {row.pop("station"): row for row in result["rows"]}
    fits = all(r["peak_GiB"] <= 1.1 * r["plan_GiB"] for r in rows.values() if r["plan_GiB"] and r["peak_GiB"])
    return {"ok": fits if ON_GPU else None, "engine": result["environment"]["settings"]["engine"], **rows}


def kernels(size: str) -> dict[str, Any]:
    """Kernels of one decoded token; about 1,960 before weights and keys were cast once, at 28 layers."""
    subject, counts = policy(size, LARGE), []
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    for limit in (4, 12):
        sampling = SamplingConfig(limit, 1.0, (subject.vocab_size,))
        seeds = derive_seeds(torch.arange(4)[:, None], torch.arange(4))
        with autocast(), torch.profiler.profile(activities=[activity]) as profile:
            TransformersEngine().generate(subject, [[3, 4, 5]] * 4, seeds, sampling)
        counts.append(len([e for e in profile.events() if not ON_GPU or e.device_type.name == "CUDA"]))
    return {"per_token": (counts[1] - counts[0]) / 8}


def validation(size: str) -> dict[str, Any]:
    """Seconds of an evaluation of 256 problems, eight samples and a greedy one of up to 1,024 tokens each."""
    num, limit, mean, length = (256, 1024, 512, 200) if size == "full" else (4, 12, 8, 10)
    subject = policy(size, LARGE)
    ends = tuple(range(10, 10 + max(1, round(subject.vocab_size / mean))))
    seeds = derive_seeds(torch.arange(num)[:, None], torch.arange(9))
    prompts = [[3 + i] * length for i in range(num)]
    _wait()
    started = time.perf_counter()
    with autocast():
        TransformersEngine().generate(subject, prompts, seeds, SamplingConfig(limit, 1.0, ends))
    _wait()
    return {"evaluation_s": time.perf_counter() - started, "problems": num}


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
    **{check.__name__: check for check in (decoding, update, optimizer, weights, compiled)},
    **{check.__name__: check for check in (step, kernels, validation)},
    "step_again": step,
}
