"""The command line: every shipped configuration, every command, and bad input in one clear line."""

import gzip
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
import torch
import yaml

from hdpo.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TINY = [
    "--data.selection.num_train_problems=32",
    "--data.selection.num_val_problems=6",
    "--data.selection.num_test_problems=5",
    "--data.prompts_per_step=4",
    "--rollouts.num_generations=2",
    "--rollouts.num_val_samples=2",
    "--rollouts.max_new_tokens=64",
    "--distillation.max_new_tokens=72",
    "--model.pass_k=[1,2]",
    "--samples.every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Run in an empty folder, as an installed package would."""
    monkeypatch.chdir(tmp_path)
    # Lightning's handler writes to the standard error of the first test.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return tmp_path


def lab(command="fit", *extra):
    return [command, "--config", str(CONFIGS / "lab.yaml"), *TINY, *extra]


def run_folder(workplace, version=0):
    return workplace / "runs" / "lab" / f"version_{version}"


def test_fit_validate_test_predict_and_export(workplace, capsys):
    from transformers import AutoModelForCausalLM

    assert main(lab("fit", "--trainer.max_steps=2")) == 0
    printed = capsys.readouterr().out
    run = run_folder(workplace)
    assert "step 0 -> step 2" in printed
    assert "greedy_accuracy" in printed
    assert "runs/lab/version_0/policy" in printed
    assert {"last.ckpt", "best.ckpt"} < {p.name for p in (run / "checkpoints").iterdir()}
    assert [p.name for p in sorted((run / "evaluations").iterdir())] == ["step_000000.jsonl.gz", "step_000002.jsonl.gz"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["after"]["all"]["num_problems"] == 6
    assert all(json.loads(line)["problem"] for line in (run / "samples.jsonl").read_text().splitlines())

    checkpoint = str(run / "checkpoints" / "last.ckpt")
    fewer = ("--rollouts.num_val_samples=1", "--model.pass_k=[2]")  # nothing is estimated of predictions
    for command, *more in (("validate",), ("test",), ("predict", *fewer)):
        assert main(lab(command, "--ckpt_path", checkpoint, *more)) == 0
    capsys.readouterr()
    validated = run_folder(workplace, 1) / "evaluations" / "step_000002.jsonl.gz"
    assert validated.read_bytes() == (run / "evaluations" / "step_000002.jsonl.gz").read_bytes()
    tested = run_folder(workplace, 2) / "tests" / "step_000002.jsonl.gz"
    rows = [list(map(json.loads, gzip.decompress(path.read_bytes()).splitlines())) for path in (validated, tested)]
    assert [{row["split"] for row in part} for part in rows] == [{"validation"}, {"test"}]
    hashes = [{row["problem_hash"] for row in part} for part in rows]
    assert list(map(len, hashes)) == [6, 5]
    assert not hashes[0] & hashes[1]
    rows = [json.loads(line) for line in (run_folder(workplace, 3) / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(len(row["samples"]) == 1 and row["greedy"]["outcome"] for row in rows)
    config = yaml.safe_load((run_folder(workplace, 3) / "config.yaml").read_text())
    assert config["return_predictions"] is False, "all of them would stay in memory"

    assert main(["export", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint, "--out", "exported"]) == 0
    for folder in ("exported", run / "policy"):
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        trained = torch.load(checkpoint, weights_only=False)["state_dict"]
        assert all(torch.equal(weights[k], trained[f"policy.model.{k}"]) for k in weights)


def test_resume_takes_the_command_lines_values(workplace):
    assert main(lab("fit", "--trainer.max_steps=1")) == 0
    checkpoint = str(run_folder(workplace) / "checkpoints" / "last.ckpt")
    assert main(lab("fit", "--trainer.max_steps=2", "--ckpt_path", checkpoint, "--model.distillation_weight=0")) == 0
    config = yaml.safe_load((run_folder(workplace) / "config.yaml").read_text())
    assert config["model"]["distillation_weight"] == 0
    from tests.helpers.curves import read_curves

    curves = read_curves(run_folder(workplace))
    assert [step for step, _ in curves["loss/total"]] == [0, 1], "the same run's curves"
    assert not any(step == 1 for step, _ in curves.get("privileged/pass_rate", []))


@pytest.mark.parametrize("trial", ["--trainer.fast_dev_run=1", "--trainer.overfit_batches=1"])
def test_lightnings_trials_run(workplace, trial):
    steps = [] if "fast" in trial else ["--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    assert main(lab("fit", *steps, trial)) == 0


def test_curves_that_the_design_names(workplace):
    from tests.helpers.curves import read_curves

    assert main(lab("fit", "--trainer.max_steps=2", "--data.source.kwargs={'split':'train','tiers':[5,6]}")) == 0
    names = set(read_curves(run_folder(workplace)))
    assert names >= {
        "loss/total", "loss/policy", "loss/distillation",
        "rollout/reward", "rollout/length", "rollout/truncated", "rollout/entropy",
        "cliff/fraction", "cliff/solved", "cliff/mixed", "cliff_by_source/fraction/tier6",
        "privileged/pass_rate", "privileged/kept", "privileged/tokens", "privileged/student_mass",
        "privileged/copy_rate",
        "time/rollouts", "time/scoring", "time/privileged", "time/teacher", "time/update",
        "val/greedy_accuracy", "val/pass@1", "val/pass@2", "val/tier6/pass@2", "verifier/wrong",
    }  # fmt: skip


def test_evaluations_stand_at_their_steps_and_the_configuration_in_hparams(workplace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    from hdpo.evaluation.records import read_records, recompute

    options = ("--trainer.max_steps=3", "--trainer.val_check_interval=2", "--model.divergence=hdpo.losses.ForwardKL")
    assert main(lab("fit", *options)) == 0
    run = run_folder(workplace)
    events = EventAccumulator(str(run))
    events.Reload()
    for name in ("pass@2", "greedy_accuracy"):
        found = [(event.step, event.value) for event in events.Scalars(f"val/{name}")]
        records = [read_records(run / "evaluations" / f"step_{step:06d}.jsonl.gz") for step in (0, 2, 3)]
        values = [recompute(one, [1, 2])["all"][name]["value"] for one in records]
        assert found == [(step, pytest.approx(value)) for step, value in zip((0, 2, 3), values, strict=True)]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(hparams) == {"method", "seed_everything", "distillation_weight", "teacher", "divergence", "lr"}
    assert (hparams["method"].string_value, hparams["divergence"].string_value) == ("lab", "ForwardKL")
    assert (hparams["distillation_weight"].number_value, hparams["seed_everything"].number_value) == (1.0, 0.0)
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert {"val/pass@1", "val/pass@2", "val/greedy_accuracy", "val/tier6/pass@2"} <= metrics
    assert not {"hp_metric", "epoch"} & set(events.Tags()["scalars"])
    assert yaml.safe_load((run / "hparams.yaml").read_text())["model.distillation_weight"] == 1.0


@pytest.mark.parametrize("name", ["hdpo.yaml", "lab.yaml"])
@pytest.mark.parametrize("overlay", [None, *sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))])
def test_every_shipped_configuration_parses(name, overlay, capsys):
    if overlay == name:
        pytest.skip("an overlay over itself")
    files = ["--config", str(CONFIGS / name)] + (["--config", str(CONFIGS / overlay)] if overlay else [])
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *files, "--print_config"])
    assert exit_.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["policy"]["path"]
    if overlay is not None:
        assert_contains(config, yaml.safe_load((CONFIGS / overlay).read_text()))


def assert_contains(config, part):
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(config[key], dict):
            assert_contains(config[key], value)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for mine, theirs in zip(config[key], value, strict=True):
                assert_contains(mine, theirs)
        elif key == "class_path":  # the parser prints the shortest name of a class
            assert locate(config[key]) is locate(value) is not None
        else:
            assert config[key] == value


def test_the_papers_table_stands_in_hdpo_yaml():
    config = yaml.safe_load((CONFIGS / "hdpo.yaml").read_text())
    model, rollouts, distillation = config["model"], config["rollouts"], config["distillation"]
    assert model["policy"]["path"] == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    assert config["data"]["source"]["path"] == "nvidia/OpenMathInstruct-2"
    assert model["optimizer"]["init_args"] == {"lr": 1e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert model["lr_scheduler"]["init_args"] == {"num_warmup_steps": 50, "start_factor": 0.1}
    loss = model["policy_loss"]["init_args"]
    assert (loss["clip_eps_low"], loss["clip_eps_high"], loss["kl_coef"]) == (0.2, 0.2, 0)
    assert model["update"] | {"micro_batch_tokens": 0} == {
        "num_epochs": 1, "num_minibatches": 1, "max_grad_norm": 1.0, "micro_batch_tokens": 0
    }  # fmt: skip
    assert (config["data"]["prompts_per_step"], rollouts["num_generations"]) == (32, 16)
    assert rollouts["max_new_tokens"] + config["data"]["selection"]["max_prompt_tokens"] == 4096
    assert (distillation["topk"], distillation["max_cliffs_per_step"], config["seed_everything"]) == (64, 32, 42)
    # Table 2's 1.0 and 0: as the verifier says, whose rewards are 1 and 0.
    assert (distillation["success_reward"], config["cliffs"]["threshold"]) == (None, None)
    assert (config["trainer"]["max_steps"], config["trainer"]["val_check_interval"]) == (2000, 10)
    assert config["data"]["selection"]["num_val_problems"] == 2048


def hdpo_yaml(command, parquet, policy, *extra):
    """configs/hdpo.yaml with only paths, sizes, precision and devices overridden."""
    return [
        command, "--config", str(CONFIGS / "hdpo.yaml"),
        f"--model.policy.path={policy}", f"--data.source.path={parquet}",
        "--data.selection.num_train_problems=64", "--data.selection.num_val_problems=8", "--data.prompts_per_step=4",
        "--data.val_batch_size=8", "--rollouts.num_generations=4", "--rollouts.max_new_tokens=16",
        "--distillation.max_new_tokens=16", "--distillation.topk=8", "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.enable_progress_bar=false", *extra,
    ]  # fmt: skip


def test_hdpo_yaml_runs_on_a_local_parquet_in_openmaths_schema(workplace, openmath_parquet, tiny_policy_dir):
    assert main(hdpo_yaml("fit", openmath_parquet, tiny_policy_dir)) == 0
    run = workplace / "runs" / "hdpo" / "version_0"
    rows = gzip.decompress((run / "evaluations" / "step_000002.jsonl.gz").read_bytes()).splitlines()
    assert len(rows) == 8 * (8 + 1)
    assert (
        main(hdpo_yaml("validate", openmath_parquet, tiny_policy_dir, f"--ckpt_path={run}/checkpoints/last.ckpt")) == 0
    )


def refused(capsys, arguments):
    """Run a command that must be refused; returns the one line that says why."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as exit_:  # jsonargparse exits itself
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("hdpo: error: ")]
    assert error.splitlines()[-1] == line, "nothing after the line that matters"
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # A value outside its range, wherever it is found.
        (["--rollouts.num_generations=1"], "rollouts.num_generations must be at least 2"),
        (["--model.pass_k=[1,16]"], "rollouts.num_val_samples is 2"),
        (["--model.distillation_weight=-1"], "model.distillation_weight must be a number of at least 0, got -1.0"),
        (["--model.distillation_weight=.nan"], "model.distillation_weight must be a number of at least 0, got nan"),
        (["--model.update.num_epochs=0"], "model.update.num_epochs must be a number of at least 1, got 0"),
        (["--model.policy_loss.init_args.kl_coef=-1"], "model.policy_loss.kl_coef must be a number of at least 0"),
        (["--rollouts.temperature=0"], "rollouts.temperature must be a positive number"),
        (["--distillation.topk=0"], "distillation.topk must be a number of at least 1"),
        (["--seed_everything=true"], "seed_everything must be an integer"),
        # What is not there.
        (["--model.policy.path=no/such/model"], "model.policy.path"),
        (["--data.source.path=missing.parquet"], "missing.parquet"),
        (["--ckpt_path=missing.ckpt"], "there is no file or folder 'missing.ckpt'"),
        (["--config", "missing.yaml"], "there is no file 'missing.yaml', and none of that name ships with hdpo"),
        (["--best_checkpoint.monitor=val/pass@8"], "best_checkpoint.monitor is val/pass@8, but model.pass_k gives"),
        (["--model.engine=hdpo.generation.VLLMEngine"], "hdpo[vllm]"),
        (["--trainer.accelerator=gpu"], "No supported gpu backend found"),
        (["--trainer.logger=MLFlowLogger"], "mlflow"),
        # Lightning's keys that are ours here.
        (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val must stay null: set model.update.max_grad_norm"),
        (["--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches must stay 1"),
        (
            ["--trainer.limit_train_batches=2"],
            "trainer.limit_train_batches must stay null: the stream of prompts has no",
        ),
        (["--trainer.limit_train_batches=1"], "trainer.limit_train_batches must stay null"),  # not 1.0, which is all
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval must be a positive number of steps"),
        (["--trainer.max_steps=-1"], "trainer.max_steps must be set"),
        # Unknown keys and words, with what would be right.
        (["--model.no_such_key=1"], "no_such_key"),
        (["--optimizer=torch.optim.SGD"], "optimizer"),  # a second place for model.optimizer
        (["--rollouts.num_generations=many"], "num_generations"),
        (["--model.teacher=Professor"], "teacher"),
        (["--model.divergence=jsd"], "divergence"),
        (["--model.divergence.init_args.tail=long"], "tail"),
        (["--rollouts.top_p=0.9"], "top_p is refused: the loss needs the log-probabilities"),
        (["--rollouts={'top_k': 50}"], "top_k is refused: the loss needs the log-probabilities"),
    ],
)
def test_bad_values_end_in_one_clear_line(workplace, capsys, arguments, message):
    if "hdpo[vllm]" in message and importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed here")
    assert message in refused(capsys, lab("fit", "--trainer.max_steps=1", *arguments))


def test_broken_yaml_names_its_file(workplace, capsys):
    Path("broken.yaml").write_text("model: {distillation_weight: 1\n")
    assert "broken.yaml" in refused(capsys, lab("fit", "--config", "broken.yaml"))


def test_a_policy_with_fewer_tokens_than_its_tokenizer(workplace, capsys, tiny_policy_dir):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_policy_dir, "policy")
    tokenizer = AutoTokenizer.from_pretrained("policy")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("policy")
    line = refused(capsys, lab("fit", "--trainer.max_steps=1", "--model.policy.path=policy"))
    assert re.search(r"model.policy.path: the policy has (\d+) tokens, but its tokenizer (\d+)", line)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, OSError, ImportError])
def test_a_defect_of_ours_keeps_its_traceback(workplace, monkeypatch, error):
    """Whatever an internal error is called, and although it is raised in our own frames."""

    def broken(*args, **kwargs):
        raise error("an internal shape mismatch")

    monkeypatch.setattr("hdpo.losses.policy_loss.clipped_surrogate", broken)
    monkeypatch.setattr("hdpo.losses.divergence.topk_jsd_from_logps", broken)
    with pytest.raises(error, match="an internal shape mismatch"):
        main(lab("fit", "--trainer.max_steps=8", "--rollouts.temperature=2"))


def test_running_out_of_memory_names_the_phase_and_the_keys(workplace, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("hdpo.losses.policy_loss.clipped_surrogate", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        main(lab("fit", "--trainer.max_steps=8", "--rollouts.temperature=2", "--model.distillation_weight=0"))
    (note,) = caught.value.__notes__
    assert "in the phase 'update'; lower model.update.micro_batch_tokens" in note


def test_unknown_command(capsys):
    assert main(["train"]) == 2
    assert "there is no command 'train'; choose one of fit, validate" in capsys.readouterr().err


def test_help_and_version_need_no_heavy_import():
    code = (
        "import sys; from hdpo.cli import main; main(['--help']); main(['--version']);"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "python -m hdpo COMMAND" in result.stdout
    assert "0.1.0" in result.stdout


def test_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "hdpo", "--help"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "validate" in result.stdout


def test_an_export_finds_the_configurations_that_ship(workplace, capsys):
    line = refused(capsys, ["export", "--config", "lab", "--ckpt_path", "missing.ckpt", "--out", "exported"])
    assert "--ckpt_path: there is no file or folder 'missing.ckpt'" in line


def test_a_batch_that_ranks_cannot_share_is_refused_before_any_process_starts(workplace, monkeypatch, capsys):
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", lambda *_, **__: pytest.fail("processes are started"))
    assert main(lab("fit", "--trainer.devices=3", "--trainer.strategy=ddp")) == 2
    assert "data.prompts_per_step=4 cannot be split evenly over 3 ranks" in capsys.readouterr().err


def test_a_run_may_end_by_time_alone(workplace, capsys):
    """Without ``max_steps`` a run with ``max_time`` is accepted; it stops at once where no time is left."""
    assert main(lab("fit", "--trainer.max_steps=-1", "--trainer.max_time=00:00:00:00")) == 0
    assert "max_steps must be set" not in capsys.readouterr().err
    assert list(json.loads((run_folder(workplace) / "summary.json").read_text())["evaluations"]) == ["0"]
    assert (run_folder(workplace) / "finished").exists()
