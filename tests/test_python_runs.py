"""A plain Trainer, without the command line: the same records, and ``report`` and ``show`` read them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoModelForCausalLM

from hdpo import (
    ClippedPolicyLoss,
    Evaluation,
    FunctionVerifier,
    Grade,
    HDPOModule,
    MathVerifier,
    Outcome,
    PolicyConfig,
    RolloutGeneration,
    SampleLogger,
    Station,
    Verifier,
)
from hdpo.cli import main
from hdpo.evaluation.records import read_records, recompute, record_path
from hdpo.evaluation.runs import find_runs, name_settings
from hdpo.evaluation.settings import arguments
from hdpo.files import resolve_path
from hdpo.optim import LinearWarmup
from tests.helpers import toy


def right(completions, references):
    return [float(f"boxed{{{r}}}" in c) for c, r in zip(completions, references, strict=True)]


def fit(folder, weight, *callbacks, logger=True, seed=3, verifier=None, **options):
    module = HDPOModule(
        PolicyConfig(path="pkg://hdpo.lab/policy"),
        verifier=verifier or FunctionVerifier({"right": right}, in_process=True),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25),
        distillation_weight=np.float64(weight),
        rollouts=RolloutGeneration(num_generations=2, max_new_tokens=24, num_val_samples=2),
        pass_k=(1, 2),
        seed=seed,
        **options,
    )
    data = toy.datamodule(folder, num_val_problems=4)
    trainer = Trainer(
        max_steps=1, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=1, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, logger=logger,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer, module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    return folder, [fit(folder, weight)[0] for weight in (0.0, 1.0)]


def test_what_a_run_leaves_behind(runs):
    folder, trainers = runs
    for number, trainer in enumerate(trainers):
        run = folder / f"lightning_logs/version_{number}"
        summary = json.loads((run / "summary.json").read_text())
        evaluations = [read_records(record_path(run / "evaluations", step)) for step in (0, 1)]
        assert [summary["before"], summary["after"]] == [recompute(one, (1, 2)) for one in evaluations]
        expected = trainer.callback_metrics["val/pass@2"].item()
        assert summary["after"]["all"]["pass@2"]["value"] == pytest.approx(expected)
        assert json.loads((run / "provenance.json").read_text())["evaluations"].keys() == {
            "validation/0",
            "validation/1",
        }


def test_the_configuration_is_what_the_objects_were_given(runs):
    folder, _ = runs
    for number, run in enumerate(find_runs([folder])):
        assert (run.seed, run.weight, run.pass_k) == (3, number, (1, 2))
        expected = {
            "model.policy.path": "pkg://hdpo.lab/policy", "model.verifier": "hdpo.rewards.functions.FunctionVerifier",
            "model.verifier.function.right": "tests.test_python_runs.right", "model.optimizer.lr": 0.25,
            "rollouts.num_generations": 2, "data.selection.num_val_problems": 4, "trainer.max_steps": 1,
            "data.sources.train.kwargs.split": "train",
        }  # fmt: skip
        assert {name: run.config[name] for name in expected} == expected


def test_report_and_show_read_it(runs, capsys):
    folder, _ = runs
    assert main(["report", str(folder), "--out", str(folder / "report")]) == 0
    report = json.loads((folder / "report/report.json").read_text())
    assert [entry["label"] for entry in report["settings"]] == ["weight 0", "weight 1"]
    for number, entry in enumerate(report["settings"]):
        after = json.loads((folder / f"lightning_logs/version_{number}/summary.json").read_text())["after"]["all"]
        assert entry["last"]["pass@1"]["value"] == pytest.approx(after["pass@1"]["value"])
    run = folder / "lightning_logs/version_1"
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    capsys.readouterr()
    assert main(["show", str(run)]) == 0
    assert f"expected: {sample['reference']}" in capsys.readouterr().out


def test_arguments_that_are_handed_on_to_a_base_class_are_described():
    """Else ``report`` would take two runs that differ in one of them for repetitions of each other."""
    assert arguments(MathVerifier(timeout=1.5, num_workers=3)) == {
        "profile": "strict", "num_workers": 3, "timeout": 1.5, "memory_limit": 4.0, "batch_timeout": 60.0,
    }  # fmt: skip
    found = arguments(ClippedPolicyLoss(clip_eps_high=0.28, kl_coef=0.5))
    assert list(found) == [
        "clip_eps_low", "clip_eps_high", "advantage_scale", "aggregation", "mask_truncated", "count_zero_variance",
        "kl_coef", "sampler_correction", "sampler_correction_threshold", "off_policy_shaping",
    ]  # fmt: skip
    assert (found["clip_eps_high"], found["kl_coef"]) == (0.28, 0.5)


def test_tensorboard_compares_the_runs(runs):
    folder, _ = runs
    for number in (0, 1):
        events = EventAccumulator(str(folder / f"lightning_logs/version_{number}"))
        events.Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        shown = HParamsPluginData.FromString(content).session_start_info.hparams
        values = {name: value.string_value or value.number_value for name, value in shown.items()}
        assert values == {
            "seed_everything": 3, "distillation_weight": number, "teacher": "DriftingTeacher", "divergence": "JSD",
            "lr": 0.25,
        }  # fmt: skip
        assert {event.step for event in events.Scalars("val/pass@2")} == {0, 1}


class Mute(Verifier):
    """Comes to no verdict, as a reward function with a mistake in it does."""

    def grade(self, completions, references, **columns):
        return [Grade(Outcome.ERROR, 0.0, "KeyError: 'limit'") for _ in completions]

    def usable(self, references, **columns):
        return [True] * len(references)


class Penalty(Station):
    def __init__(self, per_token=0.001):
        super().__init__()
        self.per_token = per_token


def test_stations_and_schedules_make_settings(tmp_path):
    kinds = {"plain": (0, []), "again": (0, []), "penalty": (0, [Penalty()]), "warm-up": (9, [])}
    for seed, (name, (steps, stations)) in enumerate(kinds.items()):
        schedule = partial(LinearWarmup, num_warmup_steps=steps)
        fit(tmp_path / name, 0.0, *stations, seed=seed, lr_scheduler=schedule)
    found = find_runs([tmp_path])
    labels = {run.folder.parts[-3]: label for run, label in zip(found, name_settings(found)[0], strict=True)}
    assert labels["plain"] == labels["again"]
    assert len(set(labels.values())) == 3


def test_a_checker_that_fails_is_told_and_teaches_nothing(tmp_path):
    with pytest.warns(
        UserWarning, match=r"none of \d+ completions got a verdict \(the first: error: KeyError: 'limit'\)"
    ):
        trainer, module = fit(tmp_path, 1.0, verifier=Mute())
    initial = AutoModelForCausalLM.from_pretrained(resolve_path("pkg://hdpo.lab/policy"), dtype=torch.float32)
    assert trainer.global_step == 1
    assert all(torch.equal(module.policy.model.state_dict()[k], v) for k, v in initial.state_dict().items())


def test_validate_and_test_are_recorded_too(tmp_path):
    trainer, module = fit(tmp_path, 0.0, logger=CSVLogger(tmp_path, "csv"))
    trainer.validate(module, datamodule=trainer.datamodule)
    run = tmp_path / "csv/version_0"
    found = json.loads((run / "summary.json").read_text())
    assert found["validation"]["scores"]["all"]["num_problems"] == 4
    assert found["validation"]["scores"] == found["after"], "of the same weights, with the same seeds"
    assert sum(isinstance(callback, Evaluation) for callback in trainer.callbacks) == 1


def test_the_users_own_stay_and_without_a_folder_of_its_own_nothing_is_written(tmp_path):
    own = Evaluation(before_fit=False, summary=False), SampleLogger(every_n_steps=0)
    trainer, _ = fit(tmp_path / "own", 0.0, *own, logger=TensorBoardLogger(tmp_path, "tb", version="x"))
    found = [callback for callback in trainer.callbacks if isinstance(callback, Evaluation | SampleLogger)]
    assert found == list(own)
    assert [path.name for path in (tmp_path / "tb/x/evaluations").iterdir()] == ["step_000001.jsonl.gz"]
    fit(tmp_path / "none", 0.0, logger=False)
    assert not list((tmp_path / "none").rglob("evaluations"))
    (tmp_path / "tb/x/config.yaml").write_text("kept: true")
    again = tmp_path / "tb/x/config.yaml"
    fit(tmp_path / "own", 0.0, logger=TensorBoardLogger(tmp_path, "tb", version="x"))
    assert yaml.safe_load(again.read_text()) == {"kept": True}, "the command line's is left alone"
