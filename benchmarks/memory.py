"""Peak memory and seconds of the loss part alone, forward and backward, at a large vocabulary.

    .venv-trl/bin/python benchmarks/memory.py --json memory.json

The loss part starts at the last hidden states and the output layer and ends with the gradients of both; the model
before it is left out. "selected": log-probabilities of the sampled tokens (policy gradient). "jsd": the divergence to
a teacher's top 64 (distillation). Every method runs in a process of its own, one at a time. "peak" is the peak resident
memory above what the process held with inputs ready, gradients of both inputs included; "beyond" leaves out the
gradients, which no method can avoid ("gradients"). The dense methods are what a short implementation writes: logits,
log_softmax, gather. TRL's are those of its GRPOTrainer (without and with the entropy that it always computes), its
selective_log_softmax on full logits, and the loss of its experimental SDPO. That one takes the STUDENT's top 64, so
its value differs, and the logits of student and teacher over the whole vocabulary, as in its trainer. Without TRL in
the environment these are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from common import add_arguments, check_arguments, child, environment, peak_memory, report, resting_memory

TOPK = 64


def hdpo_selected(hidden: Any, weight: Any, targets: Any, _: Any) -> Any:
    """Chunked log-probabilities."""
    from hdpo.functional.logprobs import selected_logps

    return selected_logps(hidden, weight, None, targets[:, None]).mean()


def dense_selected(hidden: Any, weight: Any, targets: Any, _: Any) -> Any:
    """All logits, all log-probabilities."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).mean()


def trl_selective(hidden: Any, weight: Any, targets: Any, _: Any) -> Any:
    """TRL's selective_log_softmax on full logits."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax((hidden @ weight.T)[None], targets[None]).mean()


def _trl_fused(outputs: tuple[str, ...]) -> Callable[..., Any]:
    def run(hidden: Any, weight: Any, targets: Any, _: Any) -> Any:
        from trl.trainer import utils

        kernel, chunk = utils._ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE
        return kernel.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)[0].mean()

    return run


def hdpo_jsd(hidden: Any, weight: Any, _: Any, teacher: Any) -> Any:
    """Chunked gather of the teacher's ids, and the divergence from these alone."""
    from hdpo.functional import topk_jsd_from_logps
    from hdpo.functional.logprobs import selected_logps

    ids, logits = teacher
    logps = selected_logps(hidden, weight, None, ids)
    return topk_jsd_from_logps(logps, logits.log_softmax(-1)).mean()


def dense_jsd(hidden: Any, weight: Any, _: Any, teacher: Any) -> Any:
    """The divergence over the whole vocabulary, written out on dense distributions."""
    import torch

    ids, logits = teacher
    student = (hidden @ weight.T).float().log_softmax(-1)
    dense = torch.zeros_like(student).scatter(-1, ids, logits.softmax(-1))
    middle = ((dense + student.exp()) / 2).log()
    terms = torch.special.xlogy(dense, dense) - dense * middle + student.exp() * (student - middle)
    return 0.5 * terms.sum(-1).mean()


def trl_sdpo(hidden: Any, weight: Any, _: Any, teacher: Any) -> Any:
    """TRL's experimental SDPO loss on its own top 64 (the student's), with a tail bucket."""
    import torch
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    ids, logits = teacher
    with torch.no_grad():
        dense = torch.full((len(hidden), len(weight)), -20.0).scatter_(-1, ids, logits)
    return compute_topk_self_distillation_loss(
        (hidden @ weight.T)[None].float(),
        dense[None],
        distillation_topk=ids.shape[-1],
        distillation_alpha=0.5,
        distillation_add_tail=True,
    ).mean()


METHODS: dict[str, Callable[..., Any]] = {
    "hdpo-selected": hdpo_selected,
    "trl-fused-selected": _trl_fused(("log_probs",)),
    "trl-fused-selected+entropy": _trl_fused(("log_probs", "entropy")),
    "trl-selective-log-softmax": trl_selective,
    "dense-selected": dense_selected,
    "hdpo-jsd": hdpo_jsd,
    "trl-sdpo-topk-jsd": trl_sdpo,
    "dense-jsd": dense_jsd,
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One method in this process."""
    import torch

    torch.manual_seed(0)
    run = METHODS[args.only]
    dtype = getattr(torch, args.dtype)

    def inputs(tokens: int, vocab: int) -> tuple[Any, ...]:
        hidden = torch.randn(tokens, args.width).to(dtype).requires_grad_()
        weight = torch.empty(vocab, args.width, dtype=dtype).normal_(std=0.05).requires_grad_()
        topk = min(TOPK, vocab)
        ids = torch.stack([torch.randperm(vocab)[:topk] for _ in range(8)]).repeat(-(-tokens // 8), 1)[:tokens]
        return hidden, weight, torch.randint(vocab, (tokens,)), (ids, torch.randn(tokens, topk))

    run(*inputs(8, 128)).backward()  # imports and thread pools are not the loss's memory
    values = inputs(args.tokens, args.vocab)
    gradient_bytes = sum(x.numel() * x.element_size() for x in values[:2])
    seconds, peak, loss = [], 0, torch.zeros(())
    for _ in range(args.repeats):
        values[0].grad = values[1].grad = None
        resting = resting_memory()
        started = time.perf_counter()
        loss = run(*values)
        loss.backward()
        seconds.append(time.perf_counter() - started)
        peak = max(peak, peak_memory() - resting)
    return {"peak": peak, "gradients": gradient_bytes, "seconds": seconds, "loss": loss.item()}


def main() -> None:
    """Run every method, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936, help="vocabulary (default: 151936, Qwen2.5's)")
    parser.add_argument("--tokens", type=int, default=4096, help='of the "selected" methods (default: 4096)')
    parser.add_argument(
        "--jsd-tokens",
        type=int,
        default=2048,
        help="of the divergences: dense-jsd takes 10 GiB at 2048 (default: 2048)",
    )
    parser.add_argument("--width", type=int, default=896, help="hidden size (default: 896)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    add_arguments(parser, repeats=1)
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.only:
        print(json.dumps(measure(args)))
        return
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed here: see benchmarks/README.md", file=sys.stderr)
        args.methods = [m for m in args.methods if not m.startswith("trl")]
    env = environment()
    forwarded = ("vocab", "width", "dtype", "threads", "repeats")
    rows = []
    for method in args.methods:
        argv = [word for name in forwarded for word in (f"--{name}", str(getattr(args, name)))]
        tokens = args.jsd_tokens if method.endswith("jsd") else args.tokens
        found = child([*argv, "--tokens", str(tokens), "--only", method])
        rows.append(
            {
                "method": method,
                "tokens": tokens,
                "peak_MiB": found["peak"] / 2**20,
                "gradients_MiB": found["gradients"] / 2**20,
                "beyond_MiB": (found["peak"] - found["gradients"]) / 2**20,
                "seconds": statistics.median(found["seconds"]),
                "loss": found["loss"],
            }
        )
    peaks = {row["method"]: row["peak_MiB"] for row in rows}
    for row in rows:
        dense = peaks.get("dense-jsd" if row["method"].endswith("jsd") else "dense-selected")
        row["dense_over_this"] = dense / row["peak_MiB"] if dense else None
    report(rows, args, env)


if __name__ == "__main__":
    main()
