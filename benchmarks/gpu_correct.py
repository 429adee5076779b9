"""Part A of ``gpu_check.py``: is what a GPU computes right?

Each check takes the size, "full" or "toy", and returns what it found, with "ok" where there is a bar. On a CPU the same
code runs; what only CUDA can say is then null.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_run import architecture, run
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from transformers import Qwen2ForCausalLM

from hdpo.experience import Completions, Sequences
from hdpo.functional import derive_seeds, selected_logps, topk_jsd_from_logps
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation import transformers as engine_module
from hdpo.generation.cache import SlotCache
from hdpo.policy import Policy, TokenBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BF16 = "bf16-mixed"


def policy(size: str, shape: str = "Qwen2.5-0.5B") -> Policy:
    """A random policy in float32, whose distributions are about as peaked as a trained one's.

    Where they are flat, tokens have a probability of 1e-5, and rounding moves the one that a random number falls on.
    """
    torch.manual_seed(0)
    config = architecture(shape if size == "full" else "toy")
    config.initializer_range = 0.06
    with DEVICE:
        model = Qwen2ForCausalLM(config).eval()
    model.model.norm.weight.data.fill_(5.0)  # logits five times as large
    return Policy(model)


def autocast(active: bool = True) -> Any:
    """What trainer.precision=bf16-mixed computes in."""
    # Without the cache of cast weights, as Lightning has it.
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False) if active else nullcontext()


def sequences(vocab_size: int, num: int, prompt: int, completion: int) -> Sequences:
    """Random ones, four of which share their prompt; lengths differ."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    prompts = [tokens(prompt - 3 * (i // 4) % prompt) for i in range(0, num, 4)]
    return Sequences(
        [prompts[i // 4] for i in range(num)], [tokens(completion - 2 * i % completion) for i in range(num)]
    )


def losses(size: str) -> dict[str, Any]:
    """Both losses and their gradients against float64 on the CPU, at a vocabulary of 151,936."""
    vocab, width, num = (151_936, 896, 256) if size == "full" else (2048, 64, 48)
    torch.manual_seed(1)
    hidden, weight = torch.randn(num, width), torch.randn(vocab, width) * 2 / width**0.5
    ids, advantages = torch.randint(vocab, (num, 65)), torch.randn(num)
    teacher = torch.randn(num, 64).log_softmax(-1)

    def values(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        h, w = (x.detach().to(device, dtype, copy=True).requires_grad_() for x in (hidden, weight))
        logps = selected_logps(h, w, None, ids.to(device))
        policy_loss = -(logps[:, 0] * advantages.to(logps)).mean()
        jsd = topk_jsd_from_logps(logps[:, 1:], teacher.to(logps)).mean()
        (policy_loss + jsd).backward()
        found = {"logps": logps.detach(), "policy": policy_loss.detach(), "jsd": jsd.detach()}
        return {name: x.double().cpu() for name, x in {**found, "hidden": h.grad, "weight": w.grad}.items()}

    exact, found = values(torch.device("cpu"), torch.float64), {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        near = values(DEVICE, dtype)
        found[name] = {
            "logps_mean": float((near["logps"] - exact["logps"]).abs().mean()),
            **{k: float((near[k] - exact[k]).norm() / exact[k].norm()) for k in ("policy", "jsd", "hidden", "weight")},
            "cosine": min(
                float(torch.cosine_similarity(near[k].flatten(), exact[k].flatten(), 0)) for k in ("hidden", "weight")
            ),
        }
    ok = all(found["float32"][k] < 1e-4 for k in ("policy", "jsd", "hidden", "weight"))
    return {"ok": ok and found["bfloat16"]["logps_mean"] < 0.02 and found["bfloat16"]["cosine"] > 0.999, **found}


def layouts(size: str) -> dict[str, Any]:
    """Log-probabilities and gradients in float32 do not depend on the layout; in bfloat16 all err alike."""
    subject, found = policy(size), {}
    items = sequences(subject.vocab_size, 8, 200 if size == "full" else 12, 120 if size == "full" else 9)
    for dtype in ("float32", "bfloat16"):
        for layout in ("padded", "shared", "packed"):
            batch = TokenBatch.from_sequences(items, DEVICE, layout)  # type: ignore[arg-type]
            subject.zero_grad()
            with autocast(dtype == "bfloat16"):
                logps = subject(batch)
            logps.mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in subject.parameters()])  # type: ignore[union-attr]
            found[dtype, layout] = torch.cat([logps.detach(), gradient]).double()
    exact = found["float32", "padded"]
    way = {" ".join(key): float((x - exact).norm() / exact.norm()) for key, x in found.items()}
    ok = max(way["float32 shared"], way["float32 packed"]) < 1e-4
    ok &= max(way["bfloat16 shared"], way["bfloat16 packed"]) < 1.5 * way["bfloat16 padded"]
    with autocast():
        layout = subject.pack(items, 4096).layout
    return {"ok": ok, "from_float32_padded": way, "taken_in_bfloat16": layout}


def _sample(subject: Policy, size: str, drafts: bool = False, max_sequences: int = 512) -> Completions:
    num, samples, prompt, limit = (16, 8, 100, 96) if size == "full" else (4, 3, 9, 12)
    prompts = sequences(subject.vocab_size, num, prompt, 1).prompt_ids
    seeds = derive_seeds(5, torch.arange(num)[:, None], torch.arange(samples))
    texts = [prompt * 3 for prompt in prompts] if drafts else None
    return TransformersEngine(max_sequences).generate(subject, prompts, seeds, SamplingConfig(limit, 1.0, (7,)), texts)


def _equal(a: Completions, b: Completions) -> float:
    pairs = zip(*([ids for group in x.token_lists() for ids in group] for x in (a, b)), strict=True)
    return sum(x == y for x, y in pairs) / a.truncated.numel()


def engine(size: str) -> dict[str, Any]:
    """Log-probabilities of the engine against the policy's in bfloat16; do drafts or other batches change tokens?"""
    subject, fewer = policy(size), 64 if size == "full" else 6
    with autocast():
        plain, drafted, alone = (_sample(subject, size, **o) for o in ({}, {"drafts": True}, {"max_sequences": fewer}))
        ids = [group[0] for group in plain.token_lists()]
        contexts = sequences(subject.vocab_size, len(ids), 100 if size == "full" else 9, 1).prompt_ids
        theirs = subject.completion_logps(Sequences(contexts, ids), token_budget=4096)
    gaps = torch.cat([(t - plain.logps[i, 0, : len(t)]).abs() for i, t in enumerate(theirs)])
    with autocast(False):
        exact = [_sample(subject, size, **o) for o in ({}, {"drafts": True})]
    gap, same = float(gaps.mean()), _equal(*exact)
    return {
        "ok": gap < 0.02 and same > 0.97, "gap_mean": gap, "gap_max": float(gaps.max()),
        "expected_gap_mean": [0.003, 0.02],
        "equal_with_drafts": _equal(plain, drafted), "equal_in_other_batches": _equal(plain, alone),
        "equal_with_drafts_float32": same,
    }  # fmt: skip


def shadow(size: str) -> dict[str, Any]:
    """Weights and keys that are cast once sample bit for bit what autocast samples that casts them at each use."""
    subject = policy(size)
    with autocast():
        once = _sample(subject, size)
        with (
            patch.object(engine_module, "cast_weights", lambda policy: nullcontext()),
            patch.object(engine_module, "SlotCache", lambda *given: SlotCache(*given[:3], torch.float32)),
        ):
            always = _sample(subject, size)
    same = torch.equal(once.ids, always.ids) and torch.equal(once.logps, always.logps)
    return {
        "ok": same,
        "largest_difference": float((once.logps - always.logps).abs().max())
        if once.ids.shape == always.ids.shape
        else None,
    }


def arguments(**options: Any) -> argparse.Namespace:
    """A small step, whose policy any device holds."""
    sizes = {
        "shape": "toy", "engine": "transformers", "prompts": 4, "completions": 4, "privileged": 2, "cliffs": 0.5,
        "new_tokens": 24, "mean_tokens": 16, "prompt_tokens": 10, "privileged_tokens": 20, "micro_batch_tokens": 128,
        "max_sequences": 512, "no_checkpointing": True, "precision": "32-true", "repeats": 2,
    }  # fmt: skip
    return argparse.Namespace(**{**sizes, **options})


def _trained(module: Any) -> Tensor:
    parameters = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.student.parameters())
    return torch.cat([p.detach().flatten() for p in parameters]).double().cpu()


def strategies(size: str) -> dict[str, Any]:
    """Three steps, and two, a checkpoint and the third: DDP and FSDP2 in one process against a single device."""
    kinds = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, strategy in kinds.items():
            folder = Path(temporary) / name
            whole = _trained(run(arguments(precision=BF16), folder, strategy=strategy())[1])
            _, _, trainer = run(arguments(precision=BF16, repeats=1), folder, strategy=strategy())
            trainer.save_checkpoint(folder / "saved")
            again = {"first": 2, "ckpt_path": str(folder / "saved"), "strategy": strategy()}
            resumed = run(arguments(precision=BF16), folder, **again)[1]
            found[name] = {"weights": whole, "resumed": float((_trained(resumed) - whole).abs().max())}
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    single = found["single"]["weights"]
    ways = {name: float((x.pop("weights") - single).abs().max()) for name, x in found.items()}
    # AdamW moves a weight by at most its learning rate, 1e-6; signs of tiny gradients may differ.
    return {
        "ok": all(x["resumed"] == 0 for x in found.values()) and max(ways.values()) < 6e-6,
        "from_single": ways,
        **found,
    }


def autocast_cache(size: str) -> dict[str, Any]:
    """Two updates per step in bfloat16, with autocast's cache of cast weights and without."""
    from lightning.pytorch.plugins import MixedPrecision

    found = []
    for cached in (False, True):

        def context(plugin: Any, cached: bool = cached) -> Any:
            return torch.autocast(plugin.device, dtype=torch.bfloat16, cache_enabled=cached)

        with tempfile.TemporaryDirectory() as folder, patch.object(MixedPrecision, "autocast_context_manager", context):
            steps, module, _ = run(arguments(precision=BF16), Path(folder), update={"num_epochs": 2})
            found.append((steps[-1]["loss"], _trained(module)))
    way = float((found[0][1] - found[1][1]).abs().max())
    return {"ok": way == 0, "losses": [loss for loss, _ in found], "largest_difference": way}


def not_finite(size: str) -> dict[str, Any]:
    """A gradient that is not a number: the step is not taken, the run goes on."""
    from lightning.pytorch import Callback

    class Poison(Callback):
        kept: Any = None

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.before = _trained(module)
            weight = module.student.model.lm_head.weight
            self.handle = weight.register_hook(lambda grad: grad * float("nan")) if batch_idx == 1 else None

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.handle is not None:
                self.handle.remove()
                self.kept = torch.equal(self.before, _trained(module)), batch.metrics["optim/skipped"]

    poison = Poison()
    with tempfile.TemporaryDirectory() as folder:
        steps, module, _ = run(arguments(), Path(folder), callbacks=[poison])
    ok = poison.kept == (True, 1.0) and not torch.equal(poison.before, _trained(module))
    return {"ok": ok, "weights_kept_and_skipped": poison.kept, "losses": [step["loss"] for step in steps]}


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Where the host waits for the GPU, as CUDA reports it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[str] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def synchronisations(size: str) -> dict[str, Any]:
    """Waits per decoded token and per micro-batch; the bars are 1 and 0."""
    if not ON_GPU:
        return {"ok": None, "skipped": "no GPU"}
    subject, numbers = policy(size), {}
    for limit in (16, 48):
        sampling = SamplingConfig(limit, 1.0, (subject.vocab_size,))
        with autocast(), _waits() as found:
            TransformersEngine().generate(subject, [[5, 6, 7]] * 8, derive_seeds(torch.arange(8)[:, None]), sampling)
        numbers[limit] = len(found)
    batch = TokenBatch.from_sequences(sequences(subject.vocab_size, 8, 60, 40), DEVICE)
    with autocast(), _waits() as found:
        subject(batch).sum().backward()
    token = (numbers[48] - numbers[16]) / 32
    return {"ok": token <= 1 and not found, "per_token": token, "per_micro_batch": len(found)}


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
    check.__name__: check
    for check in (losses, engine, shadow, layouts, strategies, not_finite, autocast_cache, synchronisations)
}
