"""Steps of a random policy under Lightning's Trainer: what ``gpu_step.py`` and ``gpu_check.py`` run."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common import LAB, peak_memory, resting_memory
from lightning.pytorch import Trainer
from transformers import Qwen2Config, Qwen2ForCausalLM

from hdpo.callbacks import DistillationRefresh, RolloutGeneration, Station
from hdpo.commands.memory import GIB, Shape
from hdpo.experience import Experience, Prompts
from hdpo.files import resolve_path
from hdpo.generation import TransformersEngine, VLLMEngine
from hdpo.losses import UpdateConfig
from hdpo.losses.selection import select_rollouts
from hdpo.module import HDPOModule
from hdpo.optim import LinearWarmup
from hdpo.policy import PolicyConfig
from hdpo.policy.architecture import policy_config
from hdpo.rewards import Grade, Outcome, Verifier

STATIONS = ("rollouts", "scoring", "privileged", "teacher", "update")
SHAPES = ("toy", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")


class ScriptedVerifier(Verifier):
    """Decides by the reference and by how many of its completions were graded before; never reads a completion."""

    def __init__(self, num_generations: int) -> None:
        self.num_generations = num_generations
        self.seen: dict[str, int] = {}

    def grade(self, completions: Sequence[str], references: Sequence[str], **columns: Any) -> list[Grade]:
        """A cliff's first K completions are wrong; of all others every second one."""
        grades = []
        for reference in references:
            turn = self.seen.get(reference, 0)
            self.seen[reference] = turn + 1
            fails = turn % 2 == 1 or (reference.endswith("cliff") and turn < self.num_generations)
            grades.append(Grade(Outcome.WRONG, 0.0) if fails else Grade(Outcome.CORRECT, 1.0))
        return grades

    def usable(self, references: Sequence[str | None], **columns: Any) -> list[bool]:
        """All are."""
        return [True] * len(references)


def architecture(name: str) -> Any:
    """The policy's architecture."""
    if name != "toy":
        return policy_config(f"Qwen/{name}")
    return Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )


def write_policy(folder: Path, args: argparse.Namespace) -> None:
    """A random policy of the shape, with the laboratory's tokenizer, which nothing here reads."""
    transformers.utils.logging.disable_progress_bar()
    config = architecture(args.shape)
    generator = torch.Generator().manual_seed(0)
    num_ends = max(1, round(config.vocab_size / args.mean_tokens))
    config.max_position_embeddings = args.privileged_tokens + args.prompt_tokens + args.new_tokens
    config.eos_token_id = torch.randperm(config.vocab_size, generator=generator)[:num_ends].tolist()
    shutil.copytree(resolve_path(LAB), folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(Path(resolve_path(LAB)) / "tokenizer_config.json", folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def batches(args: argparse.Namespace) -> list[Experience]:
    """One batch a step, as the data module would yield it."""
    generator = torch.Generator().manual_seed(1)
    num_cliffs, vocab_size = round(args.cliffs * args.prompts), architecture(args.shape).vocab_size

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    found = []
    for step in range(args.repeats + 1):
        references = [f"{step}-{i}-{'cliff' if i < num_cliffs else 'mixed'}" for i in range(args.prompts)]
        prompts = [tokens(args.prompt_tokens) for _ in references]
        privileged = [tokens(args.privileged_tokens) + prompt for prompt in prompts]
        nothing = [""] * args.prompts
        rows = torch.arange(args.prompts)
        valid = torch.ones(args.prompts, dtype=torch.bool)
        data = Prompts(rows, rows, nothing, references, nothing, ["random"] * args.prompts, prompts, privileged, valid)
        found.append(Experience(data))
    return found


def _await() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> float:
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()) / GIB


def update_flops(shape: Shape, tokens: int, completion_tokens: int) -> float:
    """Model FLOPs of a forward and backward pass: 6 per parameter that multiplies a token.

    Args:
        shape: of the policy.
        tokens: that go through the layers.
        completion_tokens: that meet the output layer.
    """
    layers = shape.num_parameters - shape.head * (1 if shape.tied else 2)
    return 6.0 * (layers * tokens + shape.head * completion_tokens)


class Watch(Station):
    """Notes what each step took, before and after its stations.

    Args:
        steps: where a step's measurements are noted.
        sampled: tokens of each call of the engine so far.
        shape: the policy's, for its FLOPs.
    """

    def __init__(self, steps: list[dict[str, Any]], sampled: list[int], shape: Shape) -> None:
        self.steps, self.sampled, self.shape = steps, sampled, shape

    def _start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            resting_memory()
        self.steps[-1]["started"] = time.perf_counter()

    def after_prompts(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Start the step's clock."""
        _await()
        self.sampled.clear()
        self.steps.append({})
        self._start()

    def after_distillation(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Start the update's clock and memory."""
        _await()
        step = self.steps[-1]
        step["before"] = time.perf_counter() - step["started"]
        step["peak_before"] = _peak()
        self._start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Await the update, and note seconds, tokens and memory."""
        started = time.perf_counter()
        _await()
        now = time.perf_counter()
        batch.measurements.add("time/update", now - started, 0.0)
        step = self.steps[-1]
        assert batch.rollouts is not None
        trained = select_rollouts(batch.rollouts, batch.prompts.prompt_ids, pl_module.policy_loss).sequences
        lengths, completions = sum(trained.lengths()), sum(map(len, trained.completion_ids))
        read = 0
        if batch.distillation is not None:
            lengths += sum(batch.distillation.student.lengths())
            completions += batch.distillation.num_tokens
            read = sum(batch.distillation.privileged.lengths())
        assert batch.is_cliff is not None
        # Sums: scoring is measured twice, for the rollouts and for the privileged ones.
        seconds = {name: total for name, total, _ in batch.measurements.items() if name.startswith("time/")}
        step |= {
            "step": step["before"] + now - step["started"],
            **{name: seconds.get(f"time/{name}", 0.0) for name in STATIONS},
            "cliffs": int(batch.is_cliff.sum()),
            "rollouts_tokens": self.sampled[0],
            "privileged_tokens": sum(self.sampled[1:]),
            "kept": len(batch.distillation) if batch.distillation is not None else 0,
            "teacher_tokens": read,
            "update_tokens": lengths,
            "flops": update_flops(self.shape, lengths, completions),
            "peak_update": _peak(),
            "loss": batch.metrics["loss/total"],
        }


def counting(engine: Any, sampled: list[int]) -> Any:
    """Let the engine note how many tokens each call sampled."""
    generate = engine.generate

    def noted(*arguments: Any) -> Any:
        completions = generate(*arguments)
        sampled.append(int(completions.mask.sum()))
        return completions

    engine.generate = noted
    return engine


def run(
    args: argparse.Namespace,
    folder: Path,
    *,
    first: int = 0,
    ckpt_path: str | None = None,
    update: Any = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], HDPOModule, Trainer]:
    """Run the steps, of which the first is not to be counted.

    Args:
        args: sizes, as ``gpu_step.py`` has them.
        folder: where the policy is written, unless it is there already.
        first: the first batch, where a run is resumed from ``ckpt_path``.
        ckpt_path: of Lightning.
        update: further options of UpdateConfig.
        options: further ones of the Trainer.

    Returns:
        What each step took, the module and its trainer.
    """
    if not (folder / "policy").exists():
        write_policy(folder / "policy", args)
    if args.engine == "vllm":
        engine: Any = VLLMEngine()
    else:
        engine = TransformersEngine(max_sequences=args.max_sequences)
    steps: list[dict[str, Any]] = []
    sampled: list[int] = []
    module = HDPOModule(
        policy=PolicyConfig(path=str(folder / "policy"), gradient_checkpointing=not args.no_checkpointing),
        engine=counting(engine, sampled),
        verifier=ScriptedVerifier(args.completions),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler=lambda optimizer: LinearWarmup(optimizer, num_warmup_steps=0),
        update=UpdateConfig(micro_batch_tokens=args.micro_batch_tokens, **(update or {})),
        pass_k=(1,),
        rollouts=RolloutGeneration(num_generations=args.completions, max_new_tokens=args.new_tokens, num_val_samples=1),
        distillation=DistillationRefresh(
            num_privileged=args.privileged, max_cliffs_per_step=args.prompts, max_new_tokens=args.new_tokens, topk=64
        ),
    )
    trainer = Trainer(
        devices=1,
        precision=args.precision,
        max_steps=args.repeats + 1,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,  # it would shuffle
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Watch(steps, sampled, Shape.of(architecture(args.shape))), *options.pop("callbacks", [])],
        **options,
    )
    loader: Any = torch.utils.data.DataLoader(batches(args)[first:], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, train_dataloaders=loader, ckpt_path=ckpt_path)
    return steps, module, trainer
