"""What it costs that nothing which is not finite is trained on or saved.

    python benchmarks/finite.py --model 100m --json finite.json

"saving": a checkpoint of policy and AdamW's state is written to one file and flushed, and before that every element of
both is looked at (hdpo.checkpoints.all_finite). "step": one update of four micro-batches of 1,024 tokens, forward to
optimizer step; "check" is what makes it safe: each micro-batch's loss carries its own finiteness into the gradient, and
the gradient's norm is looked at. Medians of interleaved runs; "share" is check / what it is a part of.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, add_arguments, check_arguments, environment, interleaved, random_model, report

from hdpo.checkpoints import DirectIO, all_finite

MICRO_BATCHES, TOKENS = 4, 1024


def row(what: str, model: str, runs: dict[str, Callable[[], Any]], repeats: int, **more: float) -> dict[str, Any]:
    """Time the whole and its check, interleaved."""
    seconds = {name: statistics.median(values) for name, values in interleaved(runs, repeats).items()}
    whole, check = seconds["whole"], seconds["check"]
    return {"what": what, "model": model, **more, "whole_s": whole, "check_s": check, "share": check / (whole + check)}


def measure(name: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """The two rows of one model."""
    model = random_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    parameters = list(model.parameters())
    ids = torch.randint(2, model.config.vocab_size, (4, TOKENS // 4))

    def update() -> None:
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            model(input_ids=ids, logits_to_keep=1).logits.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    one = torch.ones((), requires_grad=True)

    def check_step() -> None:
        for _ in range(MICRO_BATCHES):
            loss = one * 2.0
            (loss * (loss.detach() * 0 + 1)).backward()
        bool(one.isfinite())

    update()
    tensors = [*parameters, *(v for state in optimizer.state.values() for v in state.values())]

    def save() -> None:
        path = folder / "checkpoint.ckpt"
        DirectIO().save_checkpoint({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    return [
        row("saving", name, {"whole": save, "check": lambda: all_finite(tensors)}, repeats, MiB=size),
        row("step", name, {"whole": update, "check": check_step}, repeats, MiB=size),
    ]


def main() -> None:
    """Measure, print and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["20m", "100m"], help="default: 20m 100m")
    add_arguments(parser, repeats=5)
    args = parser.parse_args()
    check_arguments(parser, args)
    env = environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = [one for name in args.model for one in measure(name, args.repeats, Path(folder))]
    report(rows, args, env)


if __name__ == "__main__":
    main()
