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
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_arguments, check_arguments, environment, report
from gpu_run import SHAPES, STATIONS, architecture, run

from hdpo.commands.memory import GIB, Shape, memory

#: Dense 16-bit TFLOP/s by a part of the GPU's name, from the data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}


def planned(args: argparse.Namespace) -> dict[str, float]:
    """What the plan says of the phases before the update, of the update, and of all, in GiB without its overhead.

    Nothing where the packages of hdpo's command line are not installed.
    """
    try:
        from hdpo.commands.run import read_config
    except ModuleNotFoundError:
        return {}
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
    parser.add_argument("--completions", type=int, default=16, help="rollouts per prompt (default: 16)")
    parser.add_argument("--privileged", type=int, default=4, help="privileged rollouts per cliff (default: 4)")
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
        steps, _, _ = run(args, Path(temporary))
    report(table(args, steps[1:]), args, env)


if __name__ == "__main__":
    main()
