"""One full HDPO step of a large random policy, station by station: seconds, tokens, peak memory, utilisation.

    python benchmarks/gpu_step.py --json gpu_step.json                 # Qwen2.5-1.5B's shape on the first GPU
    python benchmarks/gpu_step.py --shape toy --prompts 4 --completions 2 --new-tokens 24      # a CPU, seconds

Every step is HDPOModule under Lightning's Trainer with the stations of `fit`; only the data, the policy's weights and
the verdicts are made up. Prompts are random tokens of fixed lengths. The policy is random too, and as many of its
tokens end a completion as give the mean length asked for, so that lengths spread as they do in training (up to the
limit). The verifier is scripted: every rollout of exactly the share --cliffs of the prompts is wrong, of all other
groups every second one, and every second privileged rollout is right. So grading costs nothing here.

"seconds" are medians over --repeats counted steps after one uncounted, each station's work on the GPU awaited. "tokens"
are sampled ones (rollouts, privileged), those read (teacher), or those that go through the policy (update). "TFLOP" is
the update's model FLOPs: 6 a parameter and token, the output layer at completion tokens alone, recomputation and
attention's quadratic part not counted; "mfu" is that over seconds and the GPU's dense 16-bit peak. "peak_GiB" is what
torch allocated at most before the update (row rollouts), in it (update) and in all (step); on a CPU the resident
memory. vLLM's own pool may not be in it. "plan_GiB" is what `python -m hdpo plan` computes, without its overhead.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common import LAB, add_arguments, check_arguments, environment, peak_memory, report, resting_memory
from lightning.pytorch import Trainer
from transformers import Qwen2Config, Qwen2ForCausalLM

from hdpo.callbacks import DistillationRefresh, RolloutGeneration, Station
from hdpo.commands.memory import GIB, Shape, memory
from hdpo.commands.plan import policy_config
from hdpo.commands.run import read_config
from hdpo.experience import Experience, Prompts
from hdpo.files import resolve_path
from hdpo.losses import UpdateConfig
from hdpo.losses.selection import select_rollouts
from hdpo.module import HDPOModule
from hdpo.optim import LinearWarmup
from hdpo.policy import PolicyConfig
from hdpo.rewards import Grade, Outcome, Verifier

STATIONS = ("rollouts", "scoring", "privileged", "teacher", "update")
SHAPES = ("toy", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
#: Dense 16-bit TFLOP/s by a part of the GPU's name, from the data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}


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


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All steps; the first is not to be counted."""
    transformers.utils.logging.disable_progress_bar()
    write_policy(folder / "policy", args)
    if args.engine == "vllm":
        from hdpo.generation import VLLMEngine

        engine: Any = VLLMEngine()
    else:
        from hdpo.generation import TransformersEngine

        engine = TransformersEngine(max_sequences=args.max_sequences)
    steps: list[dict[str, Any]] = []
    sampled: list[int] = []
    module = HDPOModule(
        policy=PolicyConfig(path=str(folder / "policy"), gradient_checkpointing=not args.no_checkpointing),
        engine=counting(engine, sampled),
        verifier=ScriptedVerifier(args.completions),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler=lambda optimizer: LinearWarmup(optimizer, num_warmup_steps=0),
        update=UpdateConfig(micro_batch_tokens=args.micro_batch_tokens),
        pass_k=(1,),
        rollouts=RolloutGeneration(num_generations=args.completions, max_new_tokens=args.new_tokens, num_val_samples=1),
        distillation=DistillationRefresh(
            num_privileged=args.privileged, max_cliffs_per_step=args.prompts, max_new_tokens=args.new_tokens, topk=64
        ),
    )
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=args.precision,
        max_steps=args.repeats + 1,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Watch(steps, sampled, Shape.of(architecture(args.shape)))],
    )
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(batches(args), batch_size=None))  # type: ignore
    return steps


def planned(args: argparse.Namespace) -> dict[str, float]:
    """What the plan says of the phases before the update, of the update, and of all, in GiB without its overhead."""
    config = read_config(["--config", "hdpo", *(("--config", "engine/vllm") if args.engine == "vllm" else ())]) | {
        "data.prompts_per_step": args.prompts,
        "data.selection.max_prompt_tokens": args.prompt_tokens,
        "data.selection.max_privileged_tokens": args.privileged_tokens + args.prompt_tokens,
        "rollouts.num_generations": args.completions,
        "rollouts.max_new_tokens": args.new_tokens,
        "distillation.num_privileged": args.privileged,
        "distillation.max_cliffs_per_step": args.prompts,
        "distillation.max_new_tokens": args.new_tokens,
        "model.policy.gradient_checkpointing": not args.no_checkpointing,
        "model.update.micro_batch_tokens": args.micro_batch_tokens,
        "model.engine.max_sequences": args.max_sequences,
        "trainer.precision": args.precision,
        "trainer.limit_val_batches": 0,
    }
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB
    peaks = memory(Shape.of(architecture(args.shape)), config, 1, total)
    update = max(peaks.pop("update"), peaks.pop("optimizer")) / GIB
    before = max(peaks.values()) / GIB
    return {"rollouts": before, "update": update, "step": max(before, update)}


def table(args: argparse.Namespace, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a station, medians over the counted steps."""

    def median(name: str) -> float:
        return statistics.median(step[name] for step in steps)

    plan = planned(args)
    peaks = {"rollouts": median("peak_before"), "update": median("peak_update")}
    peaks["step"] = max(peaks.values())
    rows = []
    for name in (*STATIONS, "step"):
        seconds = median(name)
        row: dict[str, Any] = {"station": name, "seconds": seconds, "tokens": None, "tokens_per_s": None}
        if name in ("rollouts", "privileged", "teacher", "update"):
            row["tokens"] = median(f"{name}_tokens")
            row["tokens_per_s"] = row["tokens"] / seconds if seconds else None
        row |= {"peak_GiB": peaks.get(name), "plan_GiB": plan.get(name), "TFLOP": None, "mfu": None}
        if name == "update":
            row["TFLOP"] = median("flops") / 1e12
            row["mfu"] = row["TFLOP"] / seconds / args.peak_tflops if args.peak_tflops else None
        row["all_seconds"] = [step[name] for step in steps]
        rows.append(row)
    rows[-1] |= {name: [step[name] for step in steps] for name in ("cliffs", "kept", "loss")}
    return rows


def main() -> None:
    """Run the steps, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-1.5B", help="policy (default: Qwen2.5-1.5B)")
    parser.add_argument(
        "--engine", choices=("auto", "transformers", "vllm"), default="auto", help="auto: vLLM on a GPU"
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=16, help="rollouts a prompt (default: 16)")
    parser.add_argument("--privileged", type=int, default=4, help="privileged rollouts a cliff (default: 4)")
    parser.add_argument("--cliffs", type=float, default=0.25, help="share of the prompts (default: 0.25)")
    parser.add_argument("--new-tokens", type=int, default=1024, help="token limit of a completion (default: 1024)")
    parser.add_argument("--mean-tokens", type=int, default=512, help="mean completion without a limit (default: 512)")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="length of a prompt (default: 200)")
    parser.add_argument("--privileged-tokens", type=int, default=500, help="ground truth before it (default: 500)")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--max-sequences", type=int, default=512, help="of the transformers engine (default: 512)")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), help="default: bf16-mixed on a GPU")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--peak-tflops", type=float, help=f"dense 16-bit peak; known: {', '.join(PEAKS)}")
    add_arguments(parser, repeats=3)
    args = parser.parse_args()
    check_arguments(parser, args)
    if not 0 <= args.cliffs <= 1:
        parser.error(f"--cliffs must be in [0, 1], got {args.cliffs}")
    on_gpu = torch.cuda.is_available()
    if args.engine == "auto":
        args.engine = "vllm" if on_gpu and importlib.util.find_spec("vllm") else "transformers"
    elif args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error("--engine vllm: vLLM is not installed (pip install hdpo[vllm])")
    args.precision = args.precision or ("bf16-mixed" if on_gpu else "32-true")
    env = environment()
    env["settings"] = {name: value for name, value in vars(args).items() if name != "json"}
    if on_gpu:
        name = torch.cuda.get_device_name(0)
        env["hardware"] = f"{name}, {env['hardware']}"
        if args.peak_tflops is None:
            args.peak_tflops = next((peak for part, peak in PEAKS.items() if part in name), None)
    with tempfile.TemporaryDirectory() as temporary:
        steps = run(args, Path(temporary))
    report(table(args, steps[1:]), args, env)


if __name__ == "__main__":
    main()
