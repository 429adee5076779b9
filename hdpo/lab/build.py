"""Build or score a laboratory's policy: ``python -m hdpo.lab.build --task NAME --out DIR``.

Trains the tokenizer and, in a supervised Lightning run of some minutes on two cores, the policy; then scores both on
held-out problems and writes ``scores.json`` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hdpo.lab.scoring import score_policy
from hdpo.lab.task import STORIES, TASKS, Recipe, Task
from hdpo.lab.tokenizer import train_tokenizer
from hdpo.lab.warmup import WarmupBatches, WarmupModule, new_policy, warmup_texts

POLICY = STORIES.policy
"""The first laboratory's embedded policy."""

_NUM_TOKENIZER_PROBLEMS = 6000


def train(
    recipe: Recipe,
    task: Task = STORIES,
    *,
    progress: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train tokenizer and policy.

    Args:
        recipe: see :class:`~hdpo.lab.task.Recipe`; the same recipe gives the same weights on the same machine with
            the same number of threads.
        task: the laboratory.
        progress: show a progress bar.
        tokenizer: use this one and train none.

    Returns:
        the policy (float32, in evaluation mode) and its tokenizer.
    """
    seed_everything(recipe.seed, verbose=False)
    tokenizer = tokenizer or train_tokenizer(warmup_texts(_NUM_TOKENIZER_PROBLEMS, recipe.seed, task))
    policy = new_policy(tokenizer, task.sizes)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=recipe.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[TQDMProgressBar(refresh_rate=10)] if progress else [],
    )
    trainer.fit(WarmupModule(policy, recipe), DataLoader(WarmupBatches(tokenizer, recipe, task), batch_size=None))
    return policy.eval(), tokenizer


def save(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write policy (bfloat16), generation settings and tokenizer to ``out``."""
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a policy as reinforcement learning does: weights in float32, and the tokenizer that came with them.

    Raises:
        ValueError: ``folder`` holds no policy.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no policy (config.json is missing): build one with --out {folder}")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return policy.eval(), AutoTokenizer.from_pretrained(folder)


def evaluate(
    folder: Path, task: Task = STORIES, *, num_problems: int, num_samples: int, seed: int, recipe: Recipe | None
) -> dict[str, Any]:
    """Score the policy in ``folder``, write ``scores.json`` there and return its content.

    Args:
        folder: where the policy lies.
        task: the laboratory.
        num_problems: problems per tier.
        num_samples: samples per problem.
        seed: of problems and samples.
        recipe: how the policy was made; None keeps what an earlier ``scores.json`` says.
    """
    path = folder / "scores.json"
    earlier = json.loads(path.read_text()).get("recipe") if path.is_file() else None
    policy, tokenizer = load(folder)
    scores = score_policy(policy, tokenizer, num_problems=num_problems, num_samples=num_samples, seed=seed, task=task)
    record = {
        "recipe": earlier if recipe is None else asdict(recipe),
        "num_parameters": sum(p.numel() for p in policy.parameters()),
        "evaluation": {"split": "validation", "seed": seed, "problems_per_tier": num_problems, "samples": num_samples},
        "scores": scores,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def build(out: Path, recipe: Recipe, task: Task = STORIES) -> None:
    """Train tokenizer and policy and write them to ``out``, a folder that must not hold a policy yet.

    Raises:
        ValueError: ``out`` already holds a policy. Its tokenizer would be replaced, which is never right in place.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a policy: choose another --out, or remove the folder first")
    out.mkdir(parents=True, exist_ok=True)
    save(*train(recipe, task), out)


def _table(record: dict[str, Any]) -> str:
    scores: dict[str, dict[str, float]] = record["scores"]
    names = list(next(iter(scores.values())))
    lines = [" " * 12 + "".join(f"{source:>8}" for source in scores)]
    lines += [f"{name:<12}" + "".join(f"{values[name]:8.3f}" for values in scores.values()) for name in names]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdpo.lab.build", description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder for a new policy")
    target.add_argument("--evaluate-only", type=Path, metavar="DIR", help="score the policy in DIR and train nothing")
    parser.add_argument("--task", choices=TASKS, default=STORIES.name, help="the laboratory (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the laboratory's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per tier (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="samples per problem (default: %(default)s)")
    options = parser.parse_args(args)
    try:
        if options.problems < 1 or options.samples < 8:
            raise ValueError("--problems must be at least 1 and --samples at least 8 (for pass@8)")
        task, recipe = TASKS[options.task], None
        if not options.evaluate_only:
            recipe = replace(
                task.recipe, seed=options.seed, steps=task.recipe.steps if options.steps is None else options.steps
            )
            build(options.out, recipe, task)
        record = evaluate(
            options.evaluate_only or options.out,
            task,
            num_problems=options.problems,
            num_samples=options.samples,
            seed=options.seed,
            recipe=recipe,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
