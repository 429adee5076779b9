"""Every command, YAML block and Python file of the README, as a reader would use them."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from hdpo.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
#: What makes a run small; everything else is as it is written there.
SMALL = [
    "--data.selection.num_train_problems=16",
    "--data.selection.num_val_problems=6",
    "--data.selection.num_test_problems=6",
    "--data.prompts_per_step=4",
    "--rollouts.num_generations=2",
    "--rollouts.num_val_samples=8",
    "--model.pass_k=[1,8]",
    "--trainer.enable_progress_bar=false",
]
STEPS = ["--trainer.max_steps=2", "--trainer.val_check_interval=1"]
TINY = ["--rollouts.max_new_tokens=16", "--distillation.max_new_tokens=16", "--distillation.topk=8"]
TINY += [
    "--best_checkpoint.monitor=auto",
    "--trainer.precision=32-true",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]


def blocks(kind):
    return [text for name, text in BLOCKS if name == kind]


def commands():
    """Command lines, continued lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the shipped configurations and every Python file of the README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for text in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", text)
        assert name, "each Python block names its file in the first line"
        (tmp_path / name[1]).write_text(text, encoding="utf-8")
    return tmp_path


def test_no_kind_of_block_is_forgotten():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "yaml"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands():
        if line.startswith("make "):
            target = line.split()[1]
            assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.slow
def test_make_demo(tmp_path, monkeypatch, capfd):
    """The commands that the Makefile would run, on a hundredth of the work."""
    listed = subprocess.run(["make", "-n", "demo", "SEEDS=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in listed.stdout.splitlines() if "-m hdpo" in line]
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert main([*shlex.split(line)[3:], "--", *SMALL, *STEPS]) == 0
    report = json.loads(Path("runs/demo/report/report.json").read_text(encoding="utf-8"))
    arms = ["grpo", "sft_on_cliffs", "hdpo", "initial_frozen"]
    assert sorted(setting["label"] for setting in report["settings"]) == sorted(arms)
    assert {(row["first"][-11:], row["step"]) for row in report["policies"]} == {("grpo-seed_0", 2)}
    assert "written to runs/demo/report" in capfd.readouterr().out


@pytest.mark.slow
def test_the_commands_in_their_order(workplace, openmath_parquet, tiny_policy_dir):
    assert main(["fit", "--config", "configs/lab.yaml", *SMALL, *STEPS]) == 0, "the run that the commands speak of"
    ran = []
    for line in commands():
        if not line.startswith("python -m hdpo"):
            assert line.startswith(("make ", "tensorboard ")), line
            continue
        words = shlex.split(line)[3:]
        command = words[0]
        if "configs/hdpo.yaml" in words:
            words = [str(tiny_policy_dir) if "chat-model" in w else w for w in words]
            words = [str(openmath_parquet) if w == "problems.parquet" else w for w in words]
            words += [*SMALL, *STEPS, *TINY, "--rollouts.num_generations=4"] if command == "fit" else []
        elif command in ("fit", "validate", "test", "predict"):
            words += SMALL + (STEPS if command == "fit" else [])
        elif command == "sweep":
            words = [{"3": "1", "2": "1"}.get(w, w) for w in words] + ["--", *SMALL, *STEPS]
        assert main(words) == 0, line
        ran.append(command)
    assert set(ran) == {"fit", "sweep", "report", "validate", "test", "predict", "export", "show", "plan"}


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_each_yaml_block_is_an_overlay(workplace, capsys, number):
    Path("overlay.yaml").write_text(blocks("yaml")[number], encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "configs/lab.yaml", "--config", "overlay.yaml", "--print_config"])
    assert exit_.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["prompts_per_step"] == 16


@pytest.mark.parametrize("wanted", ["short_and_right", "CrossEntropy"])
def test_what_is_brought_from_outside_runs(workplace, wanted):
    (overlay,) = (text for text in blocks("yaml") if wanted in text)
    Path("overlay.yaml").write_text(overlay, encoding="utf-8")
    assert main(["fit", "--config", "configs/lab.yaml", "--config", "overlay.yaml", *SMALL, *STEPS]) == 0


def test_rewards_of_several_parts(workplace):
    from tests.helpers.curves import read_curves

    (overlay,) = (text for text in blocks("yaml") if "weights:" in text)
    Path("overlay.yaml").write_text(overlay, encoding="utf-8")
    hard = "--data.source.kwargs={split: train, tiers: [2, 6]}"
    assert main(["fit", "--config", "configs/lab.yaml", "--config", "overlay.yaml", hard, *SMALL, *STEPS]) == 0
    curves = {name: dict(points) for name, points in read_curves(Path("runs/lab/version_0")).items()}
    for step in (0, 1):
        at = {name: points[step] for name, points in curves.items() if step in points}
        assert at["reward/correct"] == pytest.approx(at["rollout/correct"]), "all have a verdict"
        assert 0 < at["reward/short"] < 1
        assert at["rollout/reward"] == pytest.approx(at["reward/correct"] + 0.2 * at["reward/short"])
    summary = json.loads(Path("runs/lab/version_0/summary.json").read_text(encoding="utf-8"))
    assert 0 < summary["after"]["all"]["pass@1"]["value"] < 1
    assert curves["cliff/fraction"][0] > 0, "a reward for shortness saves no prompt from being a cliff"


def test_the_python_script(workplace, capsys):
    text = next(text for text in blocks("python") if text.startswith("# my_run.py"))
    exec(compile(text, "my_run.py", "exec"), {"__name__": "__main__"})
    value = float(re.search(r"tensor\(([\d.]+)\)", capsys.readouterr().out)[1])
    run = "lightning_logs/version_0"
    summary = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))
    assert summary["after"]["all"]["pass@8"]["value"] == pytest.approx(value, abs=1e-4)
    assert main(["report", run]) == 0
    report = json.loads(Path(run, "report/report.json").read_text(encoding="utf-8"))
    assert report["settings"][0]["last"]["pass@8"]["value"] == pytest.approx(value, abs=1e-4)
    assert main(["show", run]) == 0


def test_paths_and_keys_that_the_text_names_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    overlays = {p.stem for p in (ROOT / "configs/method").glob("*.yaml")} | {"hdpo_plus"}
    named = set(re.findall(r"^\| `(\w+)` \|", README.partition("## Methods")[2].partition("## Evaluation")[0], re.M))
    assert named == overlays
