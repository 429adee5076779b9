"""The command line: LightningCLI with the stations forced in, and a few commands of its own beside it.

The three stations, the samples, evaluation records, checkpoints and the export are not entries of ``trainer.callbacks``
(a list that a second config replaces whole) but sections of their own: no YAML can drop or reorder them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["main"]

USAGE = """usage: python -m hdpo COMMAND [--config FILE] [--KEY VALUE] ...

Hybrid Distillation Policy Optimization: GRPO plus privileged self-distillation on cliff prompts.

commands that run a configuration (`COMMAND --help` lists every key):
  fit         train; --ckpt_path FILE resumes exactly
  validate    evaluate on the validation split: pass@k, greedy accuracy, one record a problem
  test        the same on the test split
  predict     write completions as JSON lines

commands about runs:
  plan        --config FILE [--devices N --memory_gb 80]  memory and seconds on GPUs: what fits, and with which overlay
  report      RUN [RUN ...]            table, picture and TensorBoard curves of the lambda trade-off
  sweep       --config FILE --weights 0,0.1,1 --seeds 3   one run after another; finished ones are kept
  export      --config FILE --ckpt_path FILE --out DIR    a checkpoint as a Hugging Face model

examples:
  python -m hdpo fit --config configs/lab.yaml
  python -m hdpo fit --config configs/hdpo.yaml --config configs/teacher/frozen.yaml
  python -m hdpo validate --config configs/hdpo.yaml --ckpt_path runs/hdpo/version_0/checkpoints/last.ckpt
"""

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    # The stream of prompts has no end and no epochs: validation counts steps.
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    # The data module's own sampler is exact on resume and independent of the number of ranks.
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


def _lightning_cli(args: Sequence[str]) -> None:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from hdpo.callbacks import (
        BestCheckpoint,
        CliffDetection,
        DistillationRefresh,
        Evaluation,
        LastCheckpoint,
        PolicyExport,
        PredictionWriter,
        RolloutGeneration,
        SampleLogger,
    )
    from hdpo.data import OpenMathDataModule
    from hdpo.data.sampler import TrainSampler
    from hdpo.distributed import check_strategy
    from hdpo.module import HDPOModule

    _quieten()

    class OneLineParser(LightningArgumentParser):
        """Tells what is wrong in one line, where the library prints hundreds of options first."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error or os.environ.get("HDPO_TRACEBACK") == "1":
                super().error(message, ex)
            message = (_message(ex) if ex is not None else None) or _explained(_one_line(message))
            print(f"hdpo: error: {message} (all keys: python -m hdpo {args[0]} --help)", file=sys.stderr)
            raise SystemExit(2)

    class HDPOCLI(LightningCLI):
        """LightningCLI for this module and data module."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # In the order in which they act on a step.
            parser.add_lightning_class_args(RolloutGeneration, "rollouts")
            parser.add_lightning_class_args(CliffDetection, "cliffs")
            parser.add_lightning_class_args(DistillationRefresh, "distillation")
            parser.add_lightning_class_args(SampleLogger, "samples")
            parser.add_lightning_class_args(Evaluation, "evaluation")
            parser.add_lightning_class_args(PredictionWriter, "predictions")
            parser.add_lightning_class_args(PolicyExport, "export")
            parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
            parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
            parser.link_arguments("model.policy.path", "data.tokenizer")
            parser.link_arguments("rollouts.temperature", "model.temperature")
            for section in ("rollouts", "distillation", "data"):
                parser.link_arguments("seed_everything", f"{section}.seed", compute_fn=_seed)

        def _check_checkpoint(self) -> None:
            path = self._get(self.config, "ckpt_path")
            if path is not None and path not in ("last", "best", "hpc") and not Path(path).exists():
                raise FileNotFoundError(f"--ckpt_path: there is no file or folder {path!r}")

        def _check(self) -> None:
            """Refuse what cannot work, before Lightning starts the other processes."""
            self._check_checkpoint()
            check_strategy(self.trainer.strategy, self._num_processes)

        @property
        def _num_processes(self) -> int:
            return int(self.trainer.num_devices * self.trainer.num_nodes)  # trainer.world_size is not known yet

        before_validate = before_test = before_predict = _check

        def before_fit(self) -> None:
            """As for the other commands, and refuse an indivisible batch."""
            self._check()
            TrainSampler(1, self.datamodule.prompts_per_step, num_ranks=self._num_processes, seed=0)

    HDPOCLI(
        HDPOModule,
        OpenMathDataModule,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_kwargs={"overwrite": True},
        parser_class=OneLineParser,
        parser_kwargs={"prog": "python -m hdpo", "description": "HDPO: see python -m hdpo --help"},
        args=list(args),
    )


def _one_line(message: str) -> str:
    """The library's indented explanation as one line, without the repetitions of the value at its end."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Given value type:", "Given value:")))


_TRUNCATED_SAMPLING = re.compile(r"\b(top_p|top_k|min_p)\b")


def _explained(message: str) -> str:
    """Say why there is no such key where a user looks for truncated sampling."""
    if found := _TRUNCATED_SAMPLING.search(message):
        return (
            f"{found[1]} is refused: the loss needs the log-probabilities of the distribution that was sampled, so "
            f"completions come from the full one ({message})"
        )
    return message


def _quieten() -> None:
    """Silence what says nothing about this run; errors and real warnings stay."""
    import transformers

    for message in (
        "LightningCLI's args parameter is intended to run from within Python",
        # The checkpoint holds the weights after the step, which is what is wanted.
        "Using ModelCheckpoint with manual optimization",
        r".*isinstance\(treespec, LeafSpec\)",
        # The metrics of an evaluation have merged all ranks' counts already.
        r"It is recommended to use `self\.log\(.*sync_dist=True",
        # Prompts are token ids already: there is nothing for loader processes to do.
        ".*does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    transformers.utils.logging.disable_progress_bar()


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise ValueError("seed_everything must be an integer: every random number of a run derives from it")
    return value


def _plan(args: Sequence[str]) -> int:
    from hdpo.analysis import plan

    return plan.main(list(args), run=main)


def _report(args: Sequence[str]) -> int:
    from hdpo.analysis import report

    return report.main(list(args))


def _sweep(args: Sequence[str]) -> int:
    from hdpo.analysis import sweep

    return sweep.main(list(args), run=main)


def _export(args: Sequence[str]) -> int:
    from hdpo.callbacks.export import export_main

    return export_main(list(args))


_OWN_COMMANDS = {"plan": _plan, "report": _report, "sweep": _sweep, "export": _export}
_LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def _message(error: BaseException) -> str | None:
    """The message of an error that this package raised itself, and thus wrote for the user; None for others.

    jsonargparse wraps what a constructor raises into errors of its own, so the chain of causes is followed.
    """
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        if frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
            return str(current)
        current = current.__cause__ or current.__context__
    return None


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command-line arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status: 0, or 2 after an error of the user's, which is told in one line. Set ``HDPO_TRACEBACK=1`` to
        see where it was raised.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from hdpo import __version__

        print(__version__)
        return 0
    try:
        if args[0] in _OWN_COMMANDS:
            return _OWN_COMMANDS[args[0]](args[1:])
        if args[0] not in _LIGHTNING_COMMANDS:
            known = ", ".join((*_LIGHTNING_COMMANDS, *_OWN_COMMANDS))
            raise ValueError(f"there is no command {args[0]!r}; choose one of {known}")
        _lightning_cli(args)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        message = _message(error)
        if message is None or os.environ.get("HDPO_TRACEBACK") == "1":
            raise
        print(f"hdpo: error: {message}", file=sys.stderr)
        return 2
    return 0
