"""Evaluation as a record: one row a problem, before training and at each interval, and a summary at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from hdpo.analysis.records import ProblemRecord, read_records, recompute, write_records
from hdpo.callbacks.samples import run_folder
from hdpo.distributed import gather_objects
from hdpo.experience import Experience

__all__ = ["Evaluation"]


class Evaluation(Callback):
    """Writes a record of every evaluation, evaluates before the first step, and summarises the run.

    Each evaluation becomes ``evaluations/step_<n>.jsonl`` in the run's folder, one row a problem with the verdict on
    every sample, so that every number can be recomputed and any two evaluations compared problem by problem. At the
    end of ``fit`` a table compares before and after, overall and by source, and ``summary.json`` holds its numbers.

    Args:
        before_fit: evaluate once before the first step.
        after_fit: evaluate once more after the last step, unless the interval has just done so.
        summary: print the table.
    """

    def __init__(self, before_fit: bool = True, after_fit: bool = True, summary: bool = True) -> None:
        self.before_fit = before_fit
        self.after_fit = after_fit
        self.summary = summary
        self._records: list[ProblemRecord] = []
        self._evaluated_step: int | None = None

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the initial policy; a resumed run did so already."""
        if self.before_fit and trainer.global_step == 0:
            self._run(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the final policy, unless the last step was evaluated."""
        if self.after_fit and self._evaluated_step != trainer.global_step:
            self._run(trainer)

    def _run(self, trainer: Any) -> None:
        """Run the validation loop inside ``fit``, as the epoch loop does at its interval."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if not trainer.enable_validation:
            return
        trainer.validating = True
        loop.run()
        trainer.training = True

    # ------------------------------------------------------------------ records

    @staticmethod
    def _step(trainer: Any, module: Any) -> int:
        """Optimizer steps that the evaluated weights have seen."""
        return int(trainer.global_step if trainer.state.fn == "fit" else module.loaded_step)

    def _collect(self, step: int, batch: Experience) -> None:
        rollouts, greedy, prompts = batch.rollouts, batch.greedy, batch.prompts
        assert rollouts is not None
        assert greedy is not None
        correct = (rollouts.rewards >= 1.0).tolist()
        greedy_correct = (greedy.rewards[:, 0] >= 1.0).tolist()
        for i in range(len(batch)):
            if not bool(prompts.valid[i]):
                continue
            record = ProblemRecord(
                step=step,
                row=int(prompts.row[i]),
                problem_hash=hashlib.sha256(prompts.problem[i].encode()).hexdigest()[:16],
                source=prompts.source[i],
                reference=prompts.reference[i],
                correct=correct[i],
                greedy_correct=greedy_correct[i],
                outcomes=dict(Counter(rollouts.outcomes[i])),
            )
            self._records.append(record)

    def _write(self, trainer: Any, module: Any, folder: str) -> None:
        step = self._step(trainer, module)
        records = [r for part in gather_objects(self._records) for r in part]
        self._records = []
        self._evaluated_step = step
        path = run_folder(trainer) / folder
        if trainer.is_global_zero and records:
            records.sort(key=lambda r: r.row)
            write_records(path / f"step_{step:06d}.jsonl", records)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Start an empty record."""
        self._records = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the batch's rows."""
        self._collect(self._step(trainer, pl_module), batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the evaluation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "evaluations")

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the evaluation on the test split."""
        self._write(trainer, pl_module, "tests")

    # ------------------------------------------------------------------ summary

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Print and write the summary of the run."""
        folder = run_folder(trainer)
        # A run that was killed in its last evaluation resumes at its last step, where Lightning starts no training.
        if self.after_fit and self._evaluated_step != trainer.global_step:
            done = (folder / "evaluations" / f"step_{trainer.global_step:06d}.jsonl").exists()
            if not trainer.strategy.broadcast(done):
                self._run(trainer)
        export = next((c for c in trainer.callbacks if hasattr(c, "folder") and getattr(c, "enabled", False)), None)
        policy = str(export.folder(trainer)) if export is not None else None
        if not trainer.is_global_zero:
            return
        files = sorted((folder / "evaluations").glob("step_*.jsonl"))
        if not files:
            return
        evaluations = {int(f.stem.removeprefix("step_")): recompute(read_records(f), pl_module.pass_k) for f in files}
        summary = {
            "run": str(folder),
            "policy": policy,
            "steps": trainer.global_step,
            "before": evaluations[min(evaluations)],
            "after": evaluations[max(evaluations)],
            "evaluations": {str(step): values["all"] for step, values in evaluations.items()},
        }
        path = folder / "summary.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(summary, indent=2), encoding="utf-8")
        os.replace(partial, path)
        if self.summary:
            _print_summary(summary, min(evaluations), max(evaluations))


def _print_summary(summary: dict[str, Any], first: int, last: int) -> None:
    """Before and after, with 95 % intervals."""
    from rich.console import Console
    from rich.table import Table

    # any@k (the paper's estimate) is in the file; side by side with pass@k it would only confuse.
    names = [name for name in summary["after"]["all"] if name.startswith(("pass@", "greedy"))]
    table = Table(title=f"step {first} -> step {last} (95 % intervals)")
    table.add_column("source")
    table.add_column("problems", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for source, values in summary["after"].items():
        before = summary["before"].get(source, {})
        cells = [
            (f"{before[name]['value']:.3f} -> " if name in before else "")
            + f"{values[name]['value']:.3f} [{values[name]['low']:.2f}, {values[name]['high']:.2f}]"
            for name in names
        ]
        table.add_row(source, str(values["num_problems"]), *cells)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(f"run:    {Path(summary['run'])}", soft_wrap=True)
    if summary["policy"]:
        console.print(f"policy: {Path(summary['policy'])}", soft_wrap=True)
