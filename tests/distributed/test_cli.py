"""The strategy overlays from the command line, with Lightning's own launcher."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from hdpo.checkpoints import saved_checkpoints
from hdpo.evaluation.records import read_records
from hdpo.trainer import check_strategy
from tests.helpers.processes import ROOT, environment, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = {
    "model.verifier": "tests.helpers.toy.BoxedVerifier",
    "model.pass_k": "[1,2]",
    "data.prompts_per_step": 4,
    "data.selection.num_train_problems": 40,
    "data.selection.num_val_problems": 5,
    "data.selection.check_references": "false",
    "rollouts.num_generations": 2,
    "rollouts.num_val_samples": 2,
    "rollouts.max_new_tokens": 24,
    "distillation.max_new_tokens": 24,
    "trainer.max_steps": 2,
    "trainer.devices": 2,
    "trainer.enable_progress_bar": "false",
}


def fit(folder, overlay, *, expected=0, **options):
    """Run ``python -m hdpo fit`` on the laboratory with an overlay; return its output."""
    settings = {**SMALL, "data.cache_dir": folder / "cache", "trainer.logger.init_args.save_dir": folder / "runs"}
    settings |= options.pop("more", {})
    command = [sys.executable, "-m", "hdpo", "fit", "--config", "configs/lab.yaml"]
    command += ["--config", f"configs/strategy/{overlay}.yaml"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    log = folder / "log.txt"
    with log.open("wb") as file:
        # A session of its own, so that the processes that Lightning starts can be ended with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    wait([process], [log], 240, expected, whole_sessions=True)
    return log.read_text()


LESS = {"model.policy.gather_dtype": "bfloat16", "model.update.sync_every_micro_batch": "true"}


@pytest.mark.parametrize(("overlay", "options"), [("ddp", {}), ("fsdp2", {}), ("fsdp2", LESS), ("fsdp2_unbound", {})])
def test_fit_with_an_overlay(tmp_path, overlay, options):
    size = {"trainer.strategy.init_args.data_parallel_size": 2} if overlay.startswith("fsdp2") else {}
    text = fit(tmp_path, overlay, more=size | options)
    assert "sync_dist" not in text  # what is logged is the same on all ranks already
    assert "Warning" not in text
    (run,) = (tmp_path / "runs/lab").iterdir()
    assert sorted(f.name for f in (run / "evaluations").iterdir()) == ["step_000000.jsonl.gz", "step_000002.jsonl.gz"]
    assert len(read_records(run / "evaluations/step_000002.jsonl.gz").rows) == 5
    assert (run / "summary.json").is_file()
    assert (run / "policy/model.safetensors").is_file()
    assert (run / "checkpoints/last.ckpt").is_dir() == overlay.startswith("fsdp2")


class AskedToEnd(Callback):
    """Asks the first process to end in its second step, once; it then takes longer to end than the others."""

    def __init__(self, flag: str) -> None:
        self.flag = Path(flag)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.is_global_zero and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGTERM)
            # As a logger that uploads; Lightning looks every five seconds whether a process that it started is gone.
            atexit.register(time.sleep, 12)


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_processes_that_lightning_starts_end_with_status_75_and_go_on_with_the_same_command(tmp_path, overlay):
    callback = {"class_path": "tests.distributed.test_cli.AskedToEnd", "init_args": {"flag": str(tmp_path / "asked")}}
    more = {"trainer.callbacks": json.dumps([callback]), "trainer.max_steps": 3, "resume": "auto"}
    more |= {"trainer.strategy.init_args.data_parallel_size": 2} if overlay == "fsdp2" else {}
    assert "ended (SIGTERM); fit goes on with --resume auto" in fit(tmp_path, overlay, more=more, expected=75)
    (run,) = (tmp_path / "runs/lab").iterdir()
    assert [p.name for p in saved_checkpoints(run / "checkpoints")] == ["last-000002.ckpt"]
    assert "--resume auto: " in fit(tmp_path, overlay, more=more)
    assert [p.name for p in (tmp_path / "runs/lab").iterdir()] == [run.name]
    assert sorted(f.name for f in (run / "evaluations").iterdir()) == ["step_000000.jsonl.gz", "step_000003.jsonl.gz"]
    assert saved_checkpoints(run / "checkpoints")[0].name == "last-000003.ckpt"


DATA_PARALLEL = "trainer.strategy.init_args.data_parallel_size"


@pytest.mark.parametrize(("overlay", "more", "message"), [
    (
        "ddp",
        {"data.prompts_per_step": 5},
        "data.prompts_per_step=5 cannot be split evenly over 2 ranks: choose a positive multiple of 2",
    ),
    (
        "fsdp2",
        {},
        f"{DATA_PARALLEL} is 8, but must be 2 with 2 processes (trainer.devices x trainer.num_nodes): "
        f"add --{DATA_PARALLEL} 2",
    ),
], ids=["batch", "strategy"])  # fmt: skip
def test_what_cannot_be_split_is_refused_in_one_line(tmp_path, overlay, more, message):
    text = fit(tmp_path, overlay, more=more, expected=2)
    assert [line for line in text.splitlines() if "rror" in line] == [f"hdpo: error: {message}"]
    assert "Traceback" not in text
    assert "MEMBER" not in text, "refused only after the other processes were started"


@pytest.mark.parametrize(("data", "tensor", "message"), [
    (2, 1, "data_parallel_size is 2, but must be 4"),
    (8, 1, "data_parallel_size is 8, but must be 4"),
    ("auto", 1, "data_parallel_size is auto, but must be 4"),
    (2, 2, "tensor_parallel_size is 2, but must be 1"),
    (4, "auto", "tensor_parallel_size is auto, but must be 1"),
])  # fmt: skip
def test_fsdp2_must_split_the_data_and_nothing_else(data, tensor, message):
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    with pytest.raises(ValueError, match=f"trainer.strategy.init_args.{message} with 4 processes"):
        check_strategy(strategy, 4)


def test_a_fitting_strategy_passes():
    check_strategy(ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1), 4)
    check_strategy(DDPStrategy(), 4)
