"""The command line: every shipped configuration, every command, and bad input in one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hdpo.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TINY = [
    "--data.num_train_problems=32",
    "--data.num_val_problems=6",
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
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert [p.name for p in sorted((run / "evaluations").iterdir())] == ["step_000000.jsonl", "step_000002.jsonl"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["after"]["all"]["num_problems"] == 6
    assert all(json.loads(line)["problem"] for line in (run / "samples.jsonl").read_text().splitlines())

    checkpoint = str(run / "checkpoints" / "last.ckpt")
    for command in ("validate", "test", "predict"):
        assert main(lab(command, "--ckpt_path", checkpoint)) == 0
    capsys.readouterr()
    validated = (run_folder(workplace, 1) / "evaluations" / "step_000002.jsonl").read_text()
    assert validated == (run / "evaluations" / "step_000002.jsonl").read_text()
    assert (run_folder(workplace, 2) / "tests" / "step_000002.jsonl").read_text() == validated
    rows = [json.loads(line) for line in (run_folder(workplace, 3) / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(len(row["samples"]) == 2 and row["greedy"]["outcome"] for row in rows)

    assert main(["export", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint, "--out", "exported"]) == 0
    for folder in ("exported", run / "policy"):
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        trained = torch.load(checkpoint, weights_only=False)["state_dict"]
        assert all(torch.equal(weights[k], trained[f"policy.model.{k}"]) for k in weights)


def test_resume_takes_the_command_lines_values(workplace):
    assert main(lab("fit", "--trainer.max_steps=1")) == 0
    checkpoint = str(run_folder(workplace) / "checkpoints" / "last.ckpt")
    assert main(lab("fit", "--trainer.max_steps=2", "--ckpt_path", checkpoint, "--model.distillation_weight=0")) == 0
    config = yaml.safe_load((run_folder(workplace, 1) / "config.yaml").read_text())
    assert config["model"]["distillation_weight"] == 0
    from hdpo.lab.demo import read_curves

    curves = read_curves(run_folder(workplace, 1))
    assert [step for step, _ in curves["loss/total"]] == [1]
    assert "privileged/pass_rate" not in curves


def test_curves_that_the_design_names(workplace):
    from hdpo.lab.demo import read_curves

    assert main(lab("fit", "--trainer.max_steps=2", "--data.source.kwargs={'split':'train','tiers':[5,6]}")) == 0
    names = set(read_curves(run_folder(workplace)))
    assert names >= {
        "loss/total", "loss/policy", "loss/distillation",
        "rollout/reward", "rollout/length", "rollout/truncated", "rollout/entropy",
        "cliff/fraction", "cliff/solved", "cliff/mixed", "cliff/fraction/tier6",
        "privileged/pass_rate", "privileged/kept", "privileged/tokens", "privileged/student_mass",
        "privileged/copy_rate",
        "time/rollouts", "time/scoring", "time/privileged", "time/teacher", "time/update",
        "val/greedy_accuracy", "val/pass@1", "val/pass@2", "val/tier6/pass@2", "verifier/wrong",
    }  # fmt: skip


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
        else:
            assert config[key] == value


def test_the_papers_table_stands_in_hdpo_yaml():
    config = yaml.safe_load((CONFIGS / "hdpo.yaml").read_text())
    model, rollouts, distillation = config["model"], config["rollouts"], config["distillation"]
    assert model["policy"]["path"] == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    assert config["data"]["source"]["path"] == "nvidia/OpenMathInstruct-2"
    assert model["optimizer"]["init_args"] == {"lr": 1e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert model["lr_scheduler"]["init_args"] == {"num_warmup_steps": 50, "start_factor": 0.1}
    assert (model["clip_eps_low"], model["clip_eps_high"], model["kl_coef"], model["max_grad_norm"]) == (0.2, 0.2, 0, 1)
    assert (config["data"]["prompts_per_step"], rollouts["num_generations"]) == (32, 16)
    assert rollouts["max_new_tokens"] + config["data"]["max_prompt_tokens"] == 4096
    assert (distillation["topk"], distillation["max_cliffs_per_step"], distillation["success_reward"]) == (64, 32, 1.0)
    assert (config["cliffs"]["threshold"], config["seed_everything"]) == (0, 42)
    assert (config["trainer"]["max_steps"], config["trainer"]["val_check_interval"]) == (2000, 10)
    assert config["data"]["num_val_problems"] == 2048


def hdpo_yaml(command, parquet, policy, *extra):
    """configs/hdpo.yaml with only paths, sizes, precision and devices overridden."""
    return [
        command, "--config", str(CONFIGS / "hdpo.yaml"),
        f"--model.policy.path={policy}", f"--data.source.path={parquet}",
        "--data.num_train_problems=64", "--data.num_val_problems=8", "--data.prompts_per_step=4",
        "--data.val_batch_size=8", "--rollouts.num_generations=4", "--rollouts.max_new_tokens=16",
        "--distillation.max_new_tokens=16", "--distillation.topk=8", "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.enable_progress_bar=false", *extra,
    ]  # fmt: skip


def test_hdpo_yaml_runs_on_a_local_parquet_in_openmaths_schema(workplace, openmath_parquet, tiny_policy_dir):
    assert main(hdpo_yaml("fit", openmath_parquet, tiny_policy_dir)) == 0
    run = workplace / "runs" / "hdpo" / "version_0"
    rows = [json.loads(line) for line in (run / "evaluations" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(len(row["correct"]) == 8 for row in rows)
    assert (
        main(hdpo_yaml("validate", openmath_parquet, tiny_policy_dir, f"--ckpt_path={run}/checkpoints/last.ckpt")) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollouts.num_generations=1"], "rollouts.num_generations must be at least 2"),
        (["--model.pass_k=[1,16]"], "rollouts.num_val_samples is 2"),
        (["--model.distillation_weight=-1"], "model.distillation_weight must not be negative"),
        (["--rollouts.temperature=0"], "rollouts.temperature must be positive"),
        (["--model.policy.path=no/such/model"], "model.policy.path"),
        (["--data.source.path=missing.parquet"], "missing.parquet"),
        (["--ckpt_path=missing.ckpt"], "there is no file or folder 'missing.ckpt'"),
        (["--best_checkpoint.monitor=val/pass@8"], "best_checkpoint.monitor is val/pass@8, but model.pass_k gives"),
        (["--distillation.topk=0"], "distillation.topk must be at least 1"),
        (["--seed_everything=true"], "seed_everything must be an integer"),
        (["--model.engine=hdpo.generation.VLLMEngine"], "hdpo[vllm]"),
    ],
)
def test_bad_values_end_in_one_clear_line(workplace, capsys, arguments, message):
    if "hdpo[vllm]" in message and _has_vllm():
        pytest.skip("vllm is installed here")
    try:
        status = main(lab("fit", "--trainer.max_steps=1", *arguments))
    except SystemExit as exit_:  # jsonargparse exits itself
        status = exit_.code
    lines = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert status == 2
    assert lines, message
    assert "error" in lines[-1] or message in lines[-1]


def _has_vllm():
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.no_such_key=1"], "no_such_key"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--rollouts.num_generations=many"], "num_generations"),
        (["--model.teacher=professor"], "teacher"),
        (["--rollouts.top_p=0.9"], "top_p is refused: the loss needs the log-probabilities"),
        (["--rollouts={'top_k': 50}"], "top_k is refused: the loss needs the log-probabilities"),
    ],
)
def test_bad_keys_are_named_before_anything_runs(workplace, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(lab("fit", *arguments))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


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
