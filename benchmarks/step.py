"""Whole steps in the laboratory: HDPO against GRPO by station and cliff fraction, and GRPO against TRL's GRPOTrainer.

    .venv-trl/bin/python benchmarks/step.py --json step.json

Every hdpo step is ``python -m hdpo fit --config configs/lab.yaml`` with a learning rate of 0: the policy stays what it
is, so that HDPO and GRPO see the same rollouts and the same cliffs in every step and differ by the distillation alone.
The tiers of the problems set the cliff fraction. Short runs alternate (GRPO, HDPO, HDPO, GRPO, ...); the first two
steps of each are not counted. "step_s" is the time from the end of one step to the end of the next, loader and logging
included. "over_grpo" is the median of the ratios of neighbouring runs; "over_grpo_common" gives both the same time for
the rollouts, which are the same work, so that their noise does not pass for overhead.

TRL trains on the same problems (all six tiers in turn) and policy with the same sizes; its reward function compares
the last box as text, which costs next to nothing. Without TRL in the environment that part is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from common import LAB, ROOT, add_arguments, check_arguments, environment, report
from lightning.pytorch import Callback

STATIONS = ("rollouts", "scoring", "privileged", "teacher", "update")
WARMUP_STEPS = 2
#: Tiers (with weights) of the problems: from no cliffs to about half.
TIERS = {
    "none": "{1: 1, 2: 1, 3: 1}",
    "fifth": "{1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1}",
    "third": "{1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}",
    "half": "{3: 1, 4: 1, 5: 1, 6: 1}",
}

Step = dict[str, float]
_CLOCK: list[Step] = []


class StepClock(Callback):
    """Notes the seconds and the measurements of each step."""

    def __init__(self) -> None:
        self.last: float | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note one step."""
        now = time.perf_counter()
        if self.last is not None:
            wanted = ("cliff/fraction", "cliff/mixed", *(f"time/{name}" for name in STATIONS))
            _CLOCK.append({"step": now - self.last, **{name: batch.metrics.get(name, 0.0) for name in wanted}})
        self.last = now


def hdpo_steps(args: argparse.Namespace, folder: Path, tiers: str, weight: float, run: int) -> list[Step]:
    """The counted steps of one short run of the command line."""
    import step as this  # the class path of a callback names a module: the one that Lightning imports, not __main__

    from hdpo.cli import main as hdpo_main

    this._CLOCK.clear()
    options = {
        "seed_everything": run,
        "model.distillation_weight": weight,
        "model.optimizer.init_args.lr": 0.0,
        "data.source.kwargs": f"{{split: train, seed: 0, tiers: {tiers}}}",
        "data.selection.num_train_problems": 320,
        "data.selection.num_val_problems": 6,
        "data.prompts_per_step": args.prompts,
        "data.cache_dir": folder / "cache",
        "rollouts.num_generations": args.completions,
        "rollouts.max_new_tokens": args.new_tokens,
        "evaluation.before_fit": "false",
        "evaluation.after_fit": "false",
        "samples.every_n_steps": 1000,
        "checkpoint.every_n_steps": 1000,
        "trainer.max_steps": args.steps + WARMUP_STEPS,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "step.StepClock",
        "trainer.logger.init_args.save_dir": folder,
    }
    status = hdpo_main(
        ["fit", "--config", str(ROOT / "configs/lab.yaml"), *(f"--{name}={value}" for name, value in options.items())]
    )
    if status:
        raise RuntimeError("hdpo fit failed")
    return list(this._CLOCK[WARMUP_STEPS - 1 :])


def trl_steps(args: argparse.Namespace, folder: Path) -> list[Step]:
    """The counted steps of one short run of TRL's GRPOTrainer on the laboratory's problems."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from hdpo.files import resolve_path
    from hdpo.lab.problems import rows
    from hdpo.rewards.boxed import last_boxed

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [float(last_boxed(c[0]["content"]) == gold) for c, gold in zip(completions, answer, strict=True)]

    data = [
        {"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["expected_answer"]}
        for row in itertools.islice(rows(split="train"), 320)
    ]
    total = args.prompts * args.completions
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(resolve_path(LAB), dtype="float32"),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=total,
            num_generations=args.completions,
            max_completion_length=args.new_tokens,
            temperature=1.0,
            learning_rate=0.0,
            max_steps=args.steps + WARMUP_STEPS,
            max_grad_norm=1.0,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(resolve_path(LAB)),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(times)][WARMUP_STEPS - 1 :]
    return [{"step": s} for s in seconds]


def alternate(runs: dict[str, Callable[[int], list[Step]]], repeats: int) -> dict[str, list[list[Step]]]:
    """Each run ``repeats`` times, in turn; the i-th runs of all have the same seed."""
    found: dict[str, list[list[Step]]] = {name: [] for name in runs}
    for turn in range(repeats):
        # A B, B A, A B, ...: whatever follows upon a run follows upon both.
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(runs[name](turn))
    return found


def _common(step: Step) -> float:
    """Seconds that HDPO and GRPO spend on the same work: the same rollouts of the same weights."""
    return step.get("time/rollouts", 0.0)


def _row(setting: str, method: str, runs: list[list[Step]], baseline: list[list[Step]]) -> dict[str, Any]:
    steps = [step for run in runs for step in run]
    row: dict[str, Any] = {"setting": setting, "method": method, "steps": len(steps)}
    for name in ("cliff/fraction", "cliff/mixed"):
        row[name] = statistics.fmean(s[name] for s in steps) if name in steps[0] else None
    row["step_s"] = statistics.median(s["step"] for s in steps)
    for name in STATIONS:
        key = f"time/{name}"
        row[name] = statistics.fmean(s[key] for s in steps) if key in steps[0] else None
    rest = [statistics.fmean(s["step"] - _common(s) for s in chain(*those)) for those in (runs, baseline)]
    common = statistics.fmean(_common(s) for s in chain(*runs, *baseline))
    row["over_grpo_common"] = (common + rest[0]) / (common + rest[1]) if method == "hdpo" else None
    totals = [sum(s["step"] for s in run) / len(run) for run in runs]
    others = [sum(s["step"] for s in run) / len(run) for run in baseline]
    row["over_grpo"] = statistics.median(a / b for a, b in zip(totals, others, strict=True))
    row["all_over_grpo"] = [a / b for a, b in zip(totals, others, strict=True)]
    return row


def main() -> None:
    """Run the comparisons, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cliffs", nargs="*", choices=TIERS, default=["none", "fifth", "half"], help="cliff fractions to measure"
    )
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each short run (default: 8)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8, help="rollouts per prompt (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=72, help="token limit of a completion (default: 72)")
    parser.add_argument("--no-trl", action="store_true", help="leave the comparison with TRL out")
    add_arguments(parser, repeats=5)
    args = parser.parse_args()
    check_arguments(parser, args)
    env = environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def hdpo(tiers: str, weight: float) -> Callable[[int], list[Step]]:
            return lambda turn: hdpo_steps(args, folder, tiers, weight, turn)

        for name in args.cliffs:
            found = alternate({"grpo": hdpo(TIERS[name], 0.0), "hdpo": hdpo(TIERS[name], 1.0)}, args.repeats)
            rows += [_row(f"cliffs: {name}", method, runs, found["grpo"]) for method, runs in found.items()]
        if not args.no_trl and importlib.util.find_spec("trl"):
            runs = {"grpo": hdpo(TIERS["third"], 0.0), "trl": lambda _: trl_steps(args, folder)}
            found = alternate(runs, args.repeats)
            rows += [_row("against TRL", method, steps, found["grpo"]) for method, steps in found.items()]
        elif not args.no_trl:
            print("TRL is not installed here: see benchmarks/README.md", file=sys.stderr)
    report(rows, args, env)


if __name__ == "__main__":
    main()
