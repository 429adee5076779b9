"""fit, validate, test and predict: LightningCLI for our module and data module.

The stations, the samples, evaluation records, checkpoints and the export are not entries of ``trainer.callbacks`` (a
list that a second config replaces whole) but sections of their own: no YAML can drop or reorder them.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hdpo.callbacks import (
    BestCheckpoint,
    CliffDetection,
    CliffReplay,
    DistillationRefresh,
    Evaluation,
    LastCheckpoint,
    PolicyExport,
    PredictionWriter,
    Progress,
    RolloutGeneration,
    SampleLogger,
)
from hdpo.checkpoints import read_header, saved_checkpoints
from hdpo.commands.parsing import OneLineParser, find_cause, join_evaluation_sets, with_config_files
from hdpo.commands.run_folder import RunFolder, find_run, is_finished, mark_finished
from hdpo.data import OpenMathDataModule
from hdpo.data.batches import check_batch
from hdpo.errors import ConfigError, TrainingStopped, first_line
from hdpo.evaluation.curves import log_configuration
from hdpo.evaluation.runs import flat_config
from hdpo.files import FULL
from hdpo.module import HDPOModule
from hdpo.trainer import check_strategy
from hdpo.yaml_strings import keep_strings

TRAINER_DEFAULTS: dict[str, Any] = {
    # The stream of prompts has no end and no epochs: validation counts steps.
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    # The data module's own sampler is exact on resume and independent of the number of ranks.
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}

_MODEL_DEFAULTS = {
    "model.engine": {"class_path": "hdpo.generation.TransformersEngine"},
    "model.verifier": {"class_path": "hdpo.rewards.MathVerifier"},
    "model.policy_loss": {"class_path": "hdpo.losses.ClippedPolicyLoss"},
    "model.divergence": {"class_path": "hdpo.losses.JSD"},
    "model.teacher": {"class_path": "hdpo.teacher.DriftingTeacher"},
}
"""So that `--model.divergence.init_args.tail paper` needs no class."""

_SECTIONS = {
    "progress": Progress,
    "replay": CliffReplay,
    "samples": SampleLogger,
    "evaluation": Evaluation,
    "predictions": PredictionWriter,
    "export": PolicyExport,
    "checkpoint": LastCheckpoint,
    "best_checkpoint": BestCheckpoint,
}
"""Callbacks beside the step, in the order in which they act."""


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml`` and hands the configuration to the loggers.

    Not through ``save_hyperparameters``, whose values would override the command line's on resume.
    """

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give each logger the flat configuration, with the names of its files as ``method``."""
        config = flat_config(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        config["method"] = "+".join(Path(str(file)).stem for file in self.config.get("config") or [])
        log_configuration(trainer.loggers, config)


class _NothingToDo(Exception):
    """The run that was to be resumed is finished."""


class HDPOCLI(LightningCLI):
    """LightningCLI for this module and data module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.folder: RunFolder | None = None
        try:
            super().__init__(*args, **kwargs)
        except (ConfigError, MisconfigurationException):
            if self.folder is not None:
                self.folder.withdraw()
            raise
        finally:
            if self.folder is not None:
                self.folder.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections, and hand the stations to the module that brings them."""
        for name, station in (
            ("rollouts", RolloutGeneration),
            ("cliffs", CliffDetection),
            ("distillation", DistillationRefresh),
        ):
            parser.add_class_arguments(station, name)
            parser.link_arguments(name, f"model.{name}", apply_on="instantiate")
        for name, callback in _SECTIONS.items():
            parser.add_lightning_class_args(callback, name)
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: continue the newest run of this configuration from its last good checkpoint; start anew where "
            "there is none",
        )
        parser.set_defaults(_MODEL_DEFAULTS)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)

    def instantiate_classes(self) -> None:
        """As Lightning does; a value out of range and a missing package are for the user to correct."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            # The library tries every type of a Union, and makes an error of its own of what each of them says.
            if mistake := find_cause(error, ConfigError):
                raise mistake from error
            if missing := find_cause(error, ModuleNotFoundError):
                raise ConfigError(f"{first_line(missing)}: install it, or name another class") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """As Lightning does; it knows the names of strategies and accelerators here only."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise find_cause(error, ConfigError) or ConfigError(f"trainer: {first_line(error)}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave our progress bar out where the user has another, or wants none."""
        given = config.get("callbacks") or []
        others = [c for c in (given if isinstance(given, list) else [given]) if isinstance(c, ProgressBar)]
        if others or config.get("enable_progress_bar") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Progress)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Lightning reads the whole checkpoint here, for hyper-parameters that ours does not hold."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint that is meant, and claim the run's folder, before anything is loaded or written."""
        command = self.subcommand
        config = self.config[command]
        if config["trainer"].get("logger") in (None, True):  # Lightning's own default, in a folder that is known here
            place = {"save_dir": config["trainer"].get("default_root_dir") or ".", "name": "lightning_logs"}
            kind = "lightning.pytorch.loggers.TensorBoardLogger"
            config["trainer"]["logger"] = Namespace(class_path=kind, init_args=Namespace(**place, version=None))
        self.folder = RunFolder.of(config["trainer"])
        resume, wanted = config["resume"], config["ckpt_path"]
        if command == "predict" and config["return_predictions"] is None:
            config["return_predictions"] = False  # they are in the file, and Lightning would keep all of them in memory
        if config.get("weights_only") is None:
            config["weights_only"] = True  # a checkpoint's pickle must not run code
        if resume is not None and (command != "fit" or wanted is not None):
            raise ConfigError("--resume is for fit, and without --ckpt_path, which names a checkpoint itself")
        run = checkpoint = None
        if resume == "auto" or wanted in ("last", "best"):
            for section in ("checkpoint", "best_checkpoint"):
                if command == "fit" and config[section]["dirpath"] is not None:
                    raise ConfigError(
                        f"{section}.dirpath: --resume auto, --ckpt_path last and --ckpt_path best look into the runs' "
                        "own folders, since nothing says whose the checkpoints elsewhere are; leave it null, or name "
                        "the file with --ckpt_path"
                    )
            text = self._parser(command).dump(config, skip_none=False)
            run, checkpoint = find_run(self.folder, text, wanted or "last")
            if wanted and checkpoint is None:
                raise ConfigError(
                    f"--ckpt_path {wanted}: {self.folder.root} holds no run of this configuration with {wanted}.ckpt; "
                    f"name the file{', or leave --ckpt_path out to start anew' if command == 'fit' else ''}"
                )
            if resume and run is not None and is_finished(run):
                raise _NothingToDo(f"{run} is finished: there is nothing to resume")
            where = f"{run} from {checkpoint.name}" if checkpoint else "nothing to resume: the run starts anew"
            if _get_rank() in (None, 0):
                print(f"{'--resume auto' if resume else f'--ckpt_path {wanted}'}: {where}", flush=True)
        elif wanted is not None:
            read_header("--ckpt_path", wanted)
            checkpoint, run = Path(wanted), Path(wanted).resolve().parent.parent
        config["ckpt_path"] = None if checkpoint is None else str(checkpoint)
        # From an older checkpoint or the best one a new run begins, so that the later steps stay what they are.
        newest = run is not None and (
            checkpoint is None
            or checkpoint.name == "last.ckpt"
            or checkpoint.resolve() in saved_checkpoints(run / "checkpoints")[:1]
        )
        continues = command == "fit" and newest and (cast(Path, run) / "config.yaml").is_file()
        if continues and self.folder.version is None:
            self.folder.use(cast(Path, run))
        self.folder.claim(again=continues and self.folder.path.resolve() == run)

    def after_fit(self) -> None:
        """Note that the run is finished."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # log_dir is a collective
        if self.trainer.is_global_zero and self.trainer.state.finished:
            mark_finished(Path(folder))

    @property
    def _num_processes(self) -> int:
        return int(self.trainer.num_devices * self.trainer.num_nodes)  # trainer.world_size is not known yet

    def _check(self) -> None:
        """Refuse what cannot work, before Lightning starts the other processes."""
        check_strategy(self.trainer.strategy, self._num_processes)

    before_validate = before_test = before_predict = _check

    def before_fit(self) -> None:
        """As for the other commands, and refuse an indivisible batch."""
        self._check()
        check_batch(self.datamodule.prompts_per_step, self._num_processes, self.model.update.num_minibatches)


def _seed(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise ConfigError(
            f"seed_everything must be an integer of 32 bits, got {value}: every random number of a run derives from it"
        )
    return value


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


def main(args: Sequence[str]) -> int:
    """Run a command of LightningCLI.

    Args:
        args: the command and its arguments.

    Returns:
        The exit status: 0; 3 where training stopped itself.

    Raises:
        ConfigError: a mistake of the user's.
        StopRequested: it was asked to end, and can be resumed.
    """
    _quieten()
    keep_strings()
    try:
        HDPOCLI(
            HDPOModule,
            OpenMathDataModule,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=OneLineParser,
            parser_kwargs={"prog": "python -m hdpo", "description": "HDPO: see python -m hdpo --help"},
            args=join_evaluation_sets(with_config_files(args)),
        )
    except _NothingToDo as done:
        print(done)
    except TrainingStopped as stop:
        print(f"hdpo: stopped: {stop}", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"hdpo: stopped: {error}; free space, then go on with --resume auto", file=sys.stderr)
        return 3
    except MisconfigurationException as error:  # Lightning's own name for a mistake of the user's
        raise ConfigError(first_line(error)) from error
    return 0


def read_config(args: Sequence[str]) -> dict[str, Any]:
    """The complete configuration that ``fit`` would run, as :func:`flat_config` writes it, without keys that are null.

    Args:
        args: of ``fit``; where it would refuse them, the process ends as it would.
    """
    with redirect_stdout(io.StringIO()) as printed:
        try:
            main(["fit", *args, "--print_config"])
        except SystemExit as exit_:
            if exit_.code:
                raise
    return {k: v for k, v in flat_config(yaml.safe_load(printed.getvalue())).items() if v is not None}
