"""Seconds and peak memory of one policy update from the same fixed rollouts: hdpo against TRL's GRPOTrainer.

    .venv-trl/bin/python benchmarks/update.py --json update.json

One update is what each library does between rollouts and the next step: all forward and backward passes, clipping and
AdamW, for prompts x completions in one optimizer step, float32. hdpo runs under its Trainer, with Lightning's overhead;
TRL's training_step, clipping, optimizer and scheduler are called the way its loop calls them, without its loop. The
two updates are compared: "gradient_cosine" must be 1. Memory is the peak above what the process held before, each
library in a process of its own. Without TRL in the environment hdpo is measured alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    SHAPES,
    add_arguments,
    check_arguments,
    child,
    environment,
    interleaved,
    median_ratio,
    peak_memory,
    policy_path,
    report,
    resting_memory,
)

LEARNING_RATE = 1e-6
VOCABULARIES = {"lab": 376, **{name: shape[0] for name, shape in SHAPES.items()}}


def fixed_rollouts(args: argparse.Namespace, zero_variance: float) -> Any:
    """An Experience with random tokens, ``zero_variance`` of whose groups have equal rewards."""
    import torch

    from hdpo.experience import Experience, Prompts, Rollouts

    rng = random.Random(0)
    num, samples, vocab = args.prompts, args.completions, VOCABULARIES[args.model]
    low, high = max(1, args.tokens // 2), args.tokens + args.tokens // 2
    lengths = torch.tensor([[rng.randint(low, high) for _ in range(samples)] for _ in range(num)])
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    ids = torch.tensor([rng.randrange(2, vocab) for _ in range(mask.numel())]).view(mask.shape) * mask
    rewards = torch.zeros(num, samples)
    for i in range(round(zero_variance * num), num):
        rewards[i, rng.sample(range(samples), max(1, samples // 2))] = 1.0
    texts = [""] * num
    prompts = Prompts(
        index=torch.arange(num),
        row=torch.arange(num),
        problem=texts,
        reference=texts,
        solution=texts,
        source=texts,
        prompt_ids=[[rng.randrange(2, vocab) for _ in range(rng.randint(24, 44))] for _ in range(num)],
        privileged_ids=[[]] * num,
        valid=torch.ones(num, dtype=torch.bool),
    )
    outcomes = [["correct" if reward else "wrong" for reward in group] for group in rewards.tolist()]
    truncated = torch.zeros(num, samples, dtype=torch.bool)
    rollouts = Rollouts(
        ids, mask, torch.zeros(mask.shape), truncated, rewards, outcomes, [[""] * samples for _ in range(num)]
    )
    return Experience(prompts, rollouts)


class HdpoUpdate:
    """hdpo's update on a fixed experience: a module whose trainer is in the middle of ``fit``."""

    def __init__(self, args: argparse.Namespace, path: str) -> None:
        import torch

        from hdpo.losses import UpdateConfig
        from hdpo.module import HDPOModule
        from hdpo.policy import PolicyConfig

        class WithoutStations(HDPOModule):
            """The experience is given."""

            def configure_callbacks(self) -> list[Any]:
                return []

        self.module = WithoutStations(
            policy=PolicyConfig(path=path),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01),
            distillation_weight=0.0,
            update=UpdateConfig(micro_batch_tokens=args.micro_batch_tokens),
        )

    def during(self, experience: Any, work: Callable[[Callable[[], None]], None]) -> None:
        """Call ``work(update)`` inside ``Trainer.fit``; each ``update()`` is one training step."""
        from lightning.pytorch import Callback, Trainer
        from torch.utils.data import DataLoader

        from hdpo.experience import Experience

        def update() -> None:
            batch = Experience(experience.prompts, experience.rollouts)
            batch.measurements.add("rollout/reward", 0.0)
            batch.measurements.add("cliff/fraction", 0.0)
            self.module.training_step(batch, 0)

        class Driver(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                # Lightning allows self.log in the training step only; progress bars are not part of the update.
                pl_module.log = lambda *args, **kwargs: None
                work(update)
                del pl_module.log

        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Driver()],
        )
        first = Experience(experience.prompts, experience.rollouts)
        first.measurements.add("rollout/reward", 0.0)
        first.measurements.add("cliff/fraction", 0.0)
        trainer.fit(self.module, DataLoader([first], batch_size=None, collate_fn=lambda batch: batch))

    def gradient(self) -> Any:
        """The last update's clipped gradient, flat."""
        import torch

        return torch.cat([p.grad.flatten() for p in self.module.student.parameters()])


class TrlUpdate:
    """TRL's update: GRPOTrainer's own training_step on prepared inputs, then clipping, AdamW and scheduler."""

    def __init__(self, args: argparse.Namespace, path: str, folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        from hdpo.files import resolve_path

        total = args.prompts * args.completions
        self.num_batches = -(-total // min(args.trl_batch, total))
        config = GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=total // self.num_batches,
            gradient_accumulation_steps=self.num_batches,
            num_generations=args.completions,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            max_grad_norm=1.0,
            beta=0.0,
            num_iterations=1,
            bf16=False,
            gradient_checkpointing=False,  # TRL's default is to recompute activations, which is slower
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(resolve_path(path), dtype="float32"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * max(8, args.prompts)}),
            processing_class=AutoTokenizer.from_pretrained(resolve_path("pkg://hdpo.lab/policy")),
        )
        self.trainer.model.train()
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self.trainer.model_wrapped = self.trainer.model
        self.trainer.current_gradient_accumulation_steps = self.num_batches
        # The inputs are prepared already: this is where the trainer would sample and score.
        self.trainer._prepare_inputs = lambda inputs: inputs

    def inputs(self, experience: Any) -> list[dict[str, Any]]:
        """The fixed rollouts as TRL's trainer holds them after sampling: padded, shuffled, split."""
        import torch
        from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict

        from hdpo.functional import group_advantages

        rollouts = experience.rollouts
        num_samples = rollouts.num_generations
        prompts = [torch.tensor(p) for p in experience.prompts.prompt_ids for _ in range(num_samples)]
        batch = {
            "prompt_ids": pad(prompts, padding_value=0, padding_side="left"),
            "prompt_mask": pad([torch.ones_like(p) for p in prompts], padding_value=0, padding_side="left"),
            "completion_ids": rollouts.completion_ids.flatten(0, 1),
            "completion_mask": rollouts.completion_mask.flatten(0, 1).long(),
            "advantages": group_advantages(rollouts.rewards).flatten(),
        }
        num_items = batch["completion_mask"].sum()
        batches = split_tensor_dict(shuffle_sequence_dict(batch), self.num_batches)
        return [{**part, "num_items_in_batch": num_items} for part in batches]

    def update(self, batches: list[dict[str, Any]]) -> None:
        """One optimizer step."""
        trainer = self.trainer
        trainer.model.zero_grad()
        for batch in batches:
            trainer.training_step(trainer.model, batch, batch["num_items_in_batch"])
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()

    def gradient(self) -> Any:
        """The last update's clipped gradient, flat."""
        import torch

        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters()])


def measure(args: argparse.Namespace, zero_variance: float, folder: Path, methods: list[str]) -> dict[str, Any]:
    """Interleaved seconds of the methods, and how well their first gradients agree."""
    import torch

    path = policy_path(args.model, folder)
    experience = fixed_rollouts(args, zero_variance)
    hdpo = HdpoUpdate(args, path)
    trl = TrlUpdate(args, path, folder) if "trl" in methods else None
    result: dict[str, Any] = {}

    def work(update: Callable[[], None]) -> None:
        runs = {"hdpo": update}
        if trl is not None:
            batches = trl.inputs(experience)
            runs["trl"] = lambda: trl.update(batches)
            update()
            trl.update(batches)
            pair = (hdpo.gradient(), trl.gradient())
            result["gradient_cosine"] = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
            result["gradient_norm_ratio"] = float(pair[0].norm() / pair[1].norm())
        result["seconds"] = interleaved(runs, args.repeats)

    hdpo.during(experience, work)
    return result


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak bytes of three updates of one method, above what its process held before the first."""
    path = policy_path(args.model, folder)
    experience = fixed_rollouts(args, args.memory_of[1])
    found: dict[str, Any] = {}

    def work(update: Callable[[], None]) -> None:
        resting = resting_memory()
        for _ in range(3):
            update()
        found["peak_bytes"] = peak_memory() - resting

    if args.memory_of[0] == "hdpo":
        HdpoUpdate(args, path).during(experience, work)
    else:
        trl = TrlUpdate(args, path, folder)
        batches = trl.inputs(experience)
        work(lambda: trl.update(batches))
    return found


def _row(args: argparse.Namespace, zero_variance: float, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"model": args.model, "zero_variance": zero_variance}
    for method, seconds in result["seconds"].items():
        row[f"{method}_s"] = statistics.median(seconds)
        row[f"{method}_all_s"] = seconds
        if not args.no_memory:
            argv = [*_forwarded(args), "--folder", str(folder), "--memory-of", method, str(zero_variance)]
            row[f"{method}_peak_MiB"] = child(argv)["peak_bytes"] / 2**20
    if "trl" in result["seconds"]:
        row["speedup"] = median_ratio(result["seconds"]["trl"], result["seconds"]["hdpo"])
        row |= {key: result[key] for key in ("gradient_cosine", "gradient_norm_ratio")}
    return row


def _forwarded(args: argparse.Namespace) -> list[str]:
    names = ("model", "prompts", "completions", "tokens", "micro_batch_tokens", "trl_batch", "threads")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


class _MemoryOf(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.memory_of = (values[0], float(values[1]))


def main() -> None:
    """Run the comparison, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(VOCABULARIES), default="lab", help="policy (default: lab)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8, help="rollouts per prompt (default: 8)")
    parser.add_argument("--tokens", type=int, default=40, help="mean completion length (default: 40)")
    parser.add_argument("--zero-variance", type=float, nargs="+", default=[0.0, 0.25, 0.5], help="shares of groups")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="hdpo's micro-batch (default: 4096)")
    parser.add_argument("--trl-batch", type=int, default=128, help="TRL's per_device_train_batch_size (default: 128)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of", nargs=2, action=_MemoryOf, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    if not all(0 <= share < 1 for share in args.zero_variance):
        parser.error("--zero-variance: shares are in [0, 1)")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.memory_of:
            print(json.dumps(measure_memory(args, folder)))
            return
        methods = ["hdpo", "trl"] if importlib.util.find_spec("trl") else ["hdpo"]
        if "trl" not in methods:
            print("TRL is not installed here: see benchmarks/README.md", file=sys.stderr)
        env = environment()
        rows = [_row(args, share, measure(args, share, folder, methods), folder) for share in args.zero_variance]
    report(rows, args, env)


if __name__ == "__main__":
    main()
