"""Evaluation as a record of every sample, before training and at each interval, and a summary at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from hdpo.callbacks.station import Station
from hdpo.distributed import gather_objects
from hdpo.evaluation.provenance import Spending, write_provenance
from hdpo.evaluation.records import evaluation_files, read_records, recompute, record_path, write_gzip
from hdpo.evaluation.settings import write_config
from hdpo.experience import Experience
from hdpo.files import run_folder, write_text
from hdpo.rewards.boxed import last_boxed


class Evaluation(Callback):
    """Writes a record of every evaluation, evaluates before the first step, and summarises the run.

    Each evaluation becomes ``evaluations/step_<n>.jsonl.gz`` in the run's folder, one row per problem and sample (see
    :data:`hdpo.evaluation.records.COLUMNS`), so that every number can be recomputed; ``provenance.json`` says which
    code and machine it is from and what had been spent. A run from Python gets a ``config.yaml`` here; the command line
    writes its own. At the end of ``fit`` a table compares before and after, overall, by named set and by
    source, and ``summary.json`` holds its numbers; ``validate`` and ``test`` print theirs and add them to
    ``summary.json`` under the name of the split.

    Args:
        before_fit: evaluate once before the first step.
        after_fit: evaluate once more after the last step, unless the interval has just done so.
        summary: print the table of results.
    """

    def __init__(self, before_fit: bool = True, after_fit: bool = True, summary: bool = True) -> None:
        self.before_fit = before_fit
        self.after_fit = after_fit
        self.summary = summary
        self.spending = Spending()
        self._records: list[dict[str, Any]] = []
        self._evaluated_step: int | None = None

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the initial policy, or the one of a checkpoint: it is from before the evaluation of its step."""
        self._evaluated_step = None
        for logger in trainer.loggers if trainer.is_global_zero else []:  # other ranks' loggers write nothing
            _forget_later_curves(logger, trainer.global_step)
        if self.before_fit if trainer.global_step == 0 else _is_due(trainer):
            self._run(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the final policy, unless the last step was evaluated, and summarise the run."""
        if self.after_fit and self._evaluated_step != trainer.global_step:
            self._run(trainer)
        self._summarise(trainer, pl_module)

    def _run(self, trainer: Any) -> None:
        """Run the validation loop inside ``fit``, as the epoch loop does at its interval."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if not trainer.enable_validation:
            return
        # A loop that a checkpoint restored counts the batches of the evaluation before, and would end early.
        loop.restarting = False
        loop.reset_restart_stage()
        trainer.validating = True
        loop.run()
        trainer.training = True

    # ------------------------------------------------------------------ records

    @staticmethod
    def _step(trainer: Any, module: Any) -> int:
        """Optimizer steps that the evaluated weights have seen."""
        return int(trainer.global_step if trainer.state.fn == "fit" else module.loaded_step)

    def _collect(self, trainer: Any, module: Any, batch: Experience) -> None:
        prompts = batch.prompts
        common = {"split": evaluated_split(trainer), "step": self._step(trainer, module), "dataset": prompts.dataset}
        for greedy, rollouts in ((False, batch.rollouts), (True, batch.greedy)):
            assert rollouts is not None
            assert rollouts.seeds is not None
            seeds, tokens = rollouts.seeds.tolist(), rollouts.completion_mask.sum(-1).tolist()
            truncated = rollouts.truncated.tolist()
            for i, sample in ((i, k) for i in range(len(batch)) for k in range(rollouts.num_generations)):
                if bool(prompts.valid[i]):
                    text = rollouts.texts[i][sample]
                    self._records.append(
                        common
                        | {
                            "row": int(prompts.row[i]),
                            "problem_hash": hashlib.sha256(prompts.problem[i].encode()).hexdigest()[:16],
                            "source": prompts.source[i],
                            "reference": prompts.reference[i],
                            "greedy": greedy,
                            "sample": sample,
                            "seed": seeds[i][sample],
                            "temperature": rollouts.temperature,
                            "outcome": rollouts.outcomes[i][sample],
                            "tokens": tokens[i][sample],
                            "truncated": truncated[i][sample],
                            "answer": last_boxed(text),
                            "completion": text,
                        }
                    )

    def _write(self, trainer: Any, module: Any, folder: str) -> None:
        step, split = self._step(trainer, module), evaluated_split(trainer)
        records = [r for part in gather_objects(self._records) for r in part]
        self._records = []
        self._evaluated_step = step
        path = run_folder(trainer)
        if trainer.is_global_zero and records:
            records.sort(key=lambda r: (r["dataset"], r["row"], r["greedy"], r["sample"]))
            write_config(path, trainer, module, [c for c in trainer.callbacks if isinstance(c, Station)])
            write_provenance(path, split, step, self.spending.so_far())
            file = record_path(path / folder, step)
            write_gzip(file, records)
            if trainer.state.fn != "fit":
                scores = recompute(read_records(file), module.pass_k)
                self._tell(path, {split: {"step": step, "scores": scores}}, f"{split} at step {step}", scores)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Start an empty record."""
        self._records = []
        if self.summary and trainer.state.fn != "fit":
            getattr(trainer, f"{trainer.state.fn.value}_loop").verbose = False  # the table says more

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the batch's rows."""
        self._collect(trainer, pl_module, batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the evaluation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "evaluations")

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the evaluation on the test split."""
        self._write(trainer, pl_module, "tests")

    # ------------------------------------------------------------------ what was spent

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Count the step."""
        self.spending.add(batch.metrics)

    def state_dict(self) -> dict[str, Any]:
        """What was spent; the same on all ranks."""
        return self.spending.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count."""
        self.spending.load_state_dict(state_dict)

    # ------------------------------------------------------------------ summary

    def _summarise(self, trainer: Any, pl_module: Any) -> None:
        """Print and write the summary of the run."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        files = evaluation_files(folder / "evaluations")
        if not files:
            return
        evaluations = {step: recompute(read_records(file), pl_module.pass_k) for step, file in files.items()}
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            "before": evaluations[min(evaluations)],
            "after": evaluations[max(evaluations)],
            "evaluations": {str(step): values["all"] for step, values in evaluations.items()},
        }
        title = f"step {min(evaluations)} -> step {max(evaluations)}"
        self._tell(folder, summary, title, summary["after"], summary["before"])

    def _tell(
        self, folder: Path, numbers: dict[str, Any], title: str, after: dict[str, Any], before: Any = None
    ) -> None:
        """Write ``summary.json``, or add to what is in it, and print the table."""
        path = folder / "summary.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_text(path, json.dumps(known | {"run": str(folder)} | numbers, indent=2))
        if self.summary:
            _print_scores(title, after, folder, before)


def evaluated_split(trainer: Any) -> str:
    """The split that the current loop evaluates: as the data module says, else validation, or test in ``test``."""
    otherwise = "test" if trainer.state.fn == "test" else "validation"
    return str(getattr(trainer.datamodule, "evaluated_split", otherwise))


def _forget_later_curves(logger: Any, step: int) -> None:
    """Let TensorBoard drop what a run that broke off wrote from this step on: it comes again."""
    if isinstance(logger, TensorBoardLogger) and (writer := logger.experiment.file_writer) is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.add_event(Event(step=step, file_version="brain.Event:2"))
        writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def _is_due(trainer: Any) -> bool:
    """Whether the interval (``trainer.val_check_interval``) has an evaluation after the current step."""
    interval = trainer.val_check_batch
    return interval not in (None, float("inf")) and trainer.global_step % interval == 0


def _print_scores(title: str, after: dict[str, Any], folder: Path, before: dict[str, Any] | None = None) -> None:
    """Print the scores of all problems, each set and each source, with 95 % intervals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # any@k (the paper's estimate) is in the file; side by side with pass@k it would only confuse.
    found = {name for values in after.values() for name in values}
    names = sorted((name for name in found if name.startswith("pass@")), key=lambda name: int(name[5:]))
    names.append("greedy_accuracy")
    table = Table(title=f"{title} (95 % intervals)")
    table.add_column("source")
    table.add_column("problems", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for source, values in after.items():
        earlier = (before or {}).get(source, {})
        cells = [
            (f"{earlier[name]['value']:.3f} -> " if name in earlier else "")
            + f"{values[name]['value']:.3f} [{values[name]['low']:.2f}, {values[name]['high']:.2f}]"
            if name in values
            else "-"
            for name in names
        ]
        # As text: a source or an interval with brackets would be read as markup.
        table.add_row(*(Text(cell) for cell in (source, str(values["num_problems"]), *cells)))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(f"run:    {folder}", soft_wrap=True)
