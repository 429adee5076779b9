"""Ten journeys, each from an empty folder with only the wheel and files that the journey writes itself."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.journeys import Folder, boxed_right, scripted_policy, story_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def home(tmp_path, site):
    assert not list(tmp_path.iterdir())
    folder = Folder(tmp_path, site)
    where = folder.python("-c", "import hdpo; print(hdpo.__file__)").stdout.strip()
    assert where == str(site / "hdpo/__init__.py"), "the wheel's, not the checkout's"
    return folder


def readme(kind, words):
    """The README's only block of a kind that holds some words."""
    (text,) = (text for name, text in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
               if name == kind and words in text)  # fmt: skip
    return text


def stories(home):
    """A file of easy stories and one of hard ones to train on, with the settings that name them."""
    home.write("hard.jsonl", story_rows(24, tiers=(2, 6)))
    home.write("easy.jsonl", story_rows(6, "validation"))
    data = {"source": {"path": "hard.jsonl"}, "val_source": {"path": "easy.jsonl"}}
    return home.write("stories.yaml", {"data": data})


def test_gsm8k_by_the_readmes_mapping(home):
    rows = [
        {"question": row["problem"], "answer": f"{row['generated_solution']}\n#### {row['expected_answer']}"}
        for row in story_rows(30)
    ]
    rows[1:1] = [rows[0], {"question": "Ann has 2 pens. How many?", "answer": "Two."}]
    home.write("gsm8k.jsonl", rows)
    mapping = readme("yaml", "openai/gsm8k").replace("openai/gsm8k\n    name: main", "gsm8k.jsonl")
    assert "gsm8k.jsonl" in mapping
    everything = ("num_train_problems=null", "num_val_problems=30", "test_fraction=0.0")
    options = [f"--data.selection.{option}" for option in everything]
    home.hdpo("fit", "--config", home.write("gsm8k.yaml", mapping), *options)
    reports = home.preparation()
    assert reports.keys() == {"train", "validation"}
    assert sum(report["kept"] for report in reports.values()) == 30
    dropped = [reason for report in reports.values() for reason, count in report["dropped"].items() if count]
    assert sorted(set(dropped)) == ["duplicate", "missing_answer"]
    records, summary = home.read("evaluations/step_000002.jsonl.gz"), home.read("summary.json")
    assert summary["steps"] == 2
    assert {row["reference"] for row in records} <= {row["answer"].split("#### ")[-1] for row in rows}
    home.check_scores(records, summary["after"]["all"], boxed_right)
    assert summary["after"]["all"]["pass@1"]["value"] > 0.8, "stories of one step are solved"


def test_a_code_reward(home):
    scripted_policy(home.site, home.path / "coder", [["```python\n"], ["f = abs\n", "f = int\n"], ["```"]])
    value = {"abs": 2, "int": -2}
    rows = [
        {"task": f"Task {i}: write f.", "program": f"```python\nf = {name}\n```", "name": name,
         "tests": ["assert f(2) == 2", f"assert f(-2) == {value[name]}"]}
        for i, name in product(range(12), value)
    ]  # fmt: skip
    for row in rows:
        row["task"] += f" It is to be {row['name']}."
    rows.insert(0, {**rows[0], "task": "Task 99: write f.", "tests": ["assert f("]})
    home.write("programs.jsonl", rows)
    columns = {"problem": "task", "solution": "program", "answer": "name", "source": "name", "extra": ["tests"]}
    overlay = {
        "model": {
            "policy": {"path": "coder"},
            "verifier": {"class_path": "hdpo.rewards.PythonCodeVerifier", "init_args": {"num_workers": 2}},
        },
        "data": {"source": {"path": "programs.jsonl", "columns": columns}},
    }
    home.hdpo("fit", "--config", home.write("code.yaml", overlay))
    records, summary = home.read("evaluations/step_000000.jsonl.gz"), home.read("summary.json")
    assert {row["completion"] for row in records} == {f"```python\nf = {name}\n```" for name in value}
    home.check_scores(records, summary["before"]["all"], lambda row: f"= {row['reference']}\n" in row["completion"])
    assert 0 < summary["before"]["all"]["pass@1"]["value"] < 1
    samples = home.read("samples.jsonl")
    completions = [(row["reference"], one) for row in samples for one in row["completions"]]
    assert {one["reward"] for _, one in completions} == {0.0, 1.0}
    assert all(one["reward"] == (f"= {name}\n" in one["text"]) for name, one in completions)
    dropped = {name: report["dropped"] for name, report in home.preparation().items()}
    assert sum(counts.get("unusable", 0) for counts in dropped.values()) == 1, dropped


def test_multiple_choice(home):
    scripted_policy(
        home.site, home.path / "guesser", [["So it is "], ["\\boxed{B}.", "\\boxed{C}.", "\\boxed{B or C}."]]
    )
    answers = ["B", "(C) 12", "Z"]
    rows = [{"q": f"Question {i} of {a}?", "key": a} for i, a in product(range(10), answers)]
    home.write("choices.jsonl", rows)
    columns = {"problem": "q", "solution": None, "answer": "key", "source": "key"}
    overlay = {
        "model": {
            "policy": {"path": "guesser"},
            "verifier": {"class_path": "hdpo.rewards.MultipleChoiceVerifier", "init_args": {"choices": "ABCD"}},
        },
        "data": {"source": {"path": "choices.jsonl", "columns": columns}},
    }
    home.hdpo("fit", "--config", home.write("choice.yaml", overlay))
    records, summary = home.read("evaluations/step_000000.jsonl.gz"), home.read("summary.json")

    def right(row):
        return f"boxed{{{row['reference'].strip('()')[0]}}}" in row["completion"]

    home.check_scores(records, summary["before"]["all"], right)
    outcomes = {row["outcome"] for row in records}
    assert outcomes == {"correct", "wrong", "no_answer"}
    assert all((row["outcome"] == "no_answer") == ("or" in row["completion"]) for row in records)
    reports = home.preparation().values()
    assert {row["source"] for row in records} == {"B", "(C) 12"}
    assert sum(report["dropped"].get("unusable", 0) for report in reports) == 10


def test_a_base_model_with_a_template(home):
    for file in (home.site / "hdpo/lab/policy").iterdir():
        if file.suffix in (".json", ".safetensors"):
            (home.path / "base").mkdir(exist_ok=True)
            (home.path / "base" / file.name).write_bytes(file.read_bytes())
    files = ["--config", stories(home), "--model.policy.path=base"]
    refused = home.hdpo("fit", *files, status=2).stderr.strip().splitlines()[-1]
    assert "has no chat template" in refused
    assert "set data.prompts.chat_template to r1_zero or a Jinja file" in refused
    home.write("mine.jinja", "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>")
    home.hdpo("fit", *files, "--data.prompts.chat_template=mine.jinja")
    for row in home.read("samples.jsonl"):
        assert row["prompt"] == f"<|user|>{row['problem']}<|end|><|assistant|>"
    before = home.read("summary.json")["before"]["all"]
    home.check_scores(home.read("evaluations/step_000000.jsonl.gz"), before, boxed_right)
    assert before["greedy_accuracy"]["value"] > 0.8, "it reads what it was trained to read"
    home.hdpo("validate", "--config", "runs/mine/run/config.yaml", "--model.policy.path=runs/mine/run/policy",
              "--trainer.logger.init_args.version=again")  # fmt: skip
    named = ["--data.prompts.chat_template=r1_zero", "--trainer.logger.init_args.version=named"]
    home.hdpo("fit", *files, *named, "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
              "--best_checkpoint.monitor=null")  # fmt: skip
    for row in home.read("../named/samples.jsonl"):
        assert row["prompt"].endswith(f"\nUser: {row['problem']}\nAssistant: <think>")


def test_lora_fit_resume_export_and_reload(home):
    pytest.importorskip("peft")
    lora = {"model": {"policy": {"lora": {"r": 2, "alpha": 8}}}, "checkpoint": {"every_n_steps": 1}}
    files = ["--config", stories(home), "--config", home.write("lora.yaml", lora)]
    unwatched = ["--trainer.limit_val_batches=0", "--best_checkpoint.monitor=null"]
    home.hdpo("fit", *files, *unwatched, "--trainer.logger.init_args.version=whole")
    home.hdpo("fit", *files, *unwatched, "--trainer.logger.init_args.version=part", "--trainer.max_steps=1")
    (half,) = (home.path / "runs/mine/part/checkpoints").glob("last-000001.ckpt")
    home.hdpo("fit", *files, "--ckpt_path", str(half))
    (checkpoint,) = (home.run / "checkpoints").glob("last-000002.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    home.hdpo("export", *files, "--ckpt_path", str(checkpoint), "--out", "mine")
    exported = load_file(home.path / "mine/model.safetensors")
    whole = load_file(home.path / "runs/mine/whole/policy/model.safetensors")
    base = load_file(home.site / "hdpo/lab/policy/model.safetensors")
    assert all(torch.equal(exported[name], whole[name]) for name in whole), "as without the interruption"
    changed = {name.split(".")[-2] for name in base if not torch.equal(exported[name], base[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert json.loads((home.path / "mine/adapter/adapter_config.json").read_text())["lora_alpha"] == 8
    home.hdpo("validate", "--config", files[1], "--model.policy.path=mine", "--trainer.logger.init_args.version=again")
    (again,) = (home.path / "runs/mine/again").rglob("*.jsonl.gz")
    keys = ("row", "sample", "greedy", "completion", "outcome")
    after, reloaded = (
        [tuple(row[key] for key in keys) for row in home.read(path)]
        for path in ("evaluations/step_000002.jsonl.gz", again)
    )
    assert after == reloaded


def test_three_evaluation_sources_in_one_table(home):
    sources = {"one": (3, "1"), "two": (4, "2"), "six": (5, "6")}
    for name, (count, tier) in sources.items():
        home.write(f"{name}.jsonl", story_rows(count, "validation", (int(tier),)))
    sets = {name: {"path": f"{name}.jsonl", "num_samples": 2 + (name == "two")} for name in sources}
    done = home.hdpo("test", "--config", home.write("eval.yaml", {"data": {"test_sources": sets}}))
    scores = home.read("summary.json")["test"]["scores"]
    records = [row for path in (home.run / "tests").glob("*.gz") for row in home.read(path)]
    assert {name: scores[name]["num_problems"] for name in ("all", *sources)} == {
        "all": 12,
        "one": 3,
        "two": 4,
        "six": 5,
    }
    for name in sources:
        mine = [row for row in records if row["dataset"] == name]
        assert len(mine) == scores[name]["num_problems"] * (1 + sets[name]["num_samples"])
        home.check_scores(mine, scores[name], boxed_right)
    assert scores["one"]["pass@1"]["value"] > 0.8 > 0.2 > scores["six"]["pass@1"]["value"]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    for name in ("all", *sources):
        (row,) = (row for row in cells if row[0] == name)
        assert row[1] == str(scores[name]["num_problems"])
        assert f"{scores[name]['pass@1']['value']:.3f}" in " ".join(row)
    assert set(home.preparation()) == {f"test/{name}" for name in sources}, "no training set is prepared"


def test_the_readmes_script(home):
    done = home.python(home.write("my_run.py", readme("python", "# my_run.py")))
    printed = float(re.search(r"tensor\(([\d.]+)", done.stdout)[1])
    from tests.helpers.curves import read_curves

    curves = read_curves(home.path / "lightning_logs/version_0")
    assert 0 <= printed <= 1
    assert dict(curves["val/pass@8"])[2] == pytest.approx(printed, abs=1e-4)
    assert (home.path / "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt").is_file()
    kept = {name: report["kept"] for name, report in home.preparation().items()}
    assert kept == {"train": 64, "validation": 12}


def test_wandb_offline(home):
    pytest.importorskip("wandb")
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": "runs", "offline": True}}
    overlay = home.write("wandb.yaml", {"trainer": {"logger": logger}})
    home.hdpo("fit", "--config", stories(home), "--config", overlay, WANDB_MODE="offline")
    (run,) = home.path.rglob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    content = log.read_bytes()
    for word in (b"distillation_weight", b"rollout/reward", b"val/pass@1"):
        assert word in content, word


def test_a_log_without_a_terminal(home):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}  # fmt: skip
    files = ["--config", stories(home), "--config", "strategy/slurm"]
    done = home.hdpo("fit", *files, "--progress.every_n_steps=1", **slurm)
    log = done.stderr
    assert "\x1b" not in log + done.stdout
    assert "\r" not in log
    assert "Epoch" not in log
    lines = [line for line in log.splitlines() if re.match(r"(step \d|evaluation at step)", line)]
    assert [line.split(" |")[0] for line in lines] == [
        "evaluation at step 0", "step 1/2", "step 2/2", "evaluation at step 2"
    ]  # fmt: skip
    curves = home.curves()
    for step in (1, 2):
        line = lines[step]
        for shown, logged in (("reward", "rollout/reward"), ("cliffs", "cliff/fraction")):
            assert f"{shown} {curves[logged][step - 1]:.3f}" in line
        assert "per step" in line
    value = home.read("summary.json")["after"]["all"]["pass@1"]["value"]
    assert f"pass@1 {value:.3f}" in lines[-1]


def test_a_divergence_of_ones_own(home):
    module = readme("python", "class CrossEntropy").replace(
        "    def __call__",
        "    def __init__(self, factor: float = 1.0) -> None:\n        self.factor = factor\n\n    def __call__",
    )
    home.write("my_divergence.py", module.replace("return -(", "return -self.factor * ("))
    # Six steps do not fit into the student's 24 tokens: all are cliffs, and distillation alone has a gradient.
    home.write("cliffs.jsonl", story_rows(8, tiers=(6,)))
    overlay = yaml.safe_load(readme("yaml", "my_divergence.CrossEntropy"))
    assert overlay["model"].keys() == {"divergence"}
    mine = {**overlay["model"]["divergence"], "init_args": {"factor": 3.0}}
    loss, norm = {}, {}
    for name, choice in {"mine": mine, "shipped": {"class_path": "hdpo.losses.ForwardKL"}}.items():
        config = home.write(f"{name}.yaml", {"model": {"divergence": choice, "distillation_weight": 1.0}})
        home.hdpo(
            "fit", "--config", stories(home), "--config", config, "--data.source.path=cliffs.jsonl",
            "--distillation.max_new_tokens=72", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
            "--best_checkpoint.monitor=null", f"--trainer.logger.init_args.version={name}",
        )  # fmt: skip
        curves = home.curves(name)
        assert curves["cliff/fraction"][0] == 1
        loss[name], norm[name] = curves["loss/distillation"][0], curves["optim/grad_norm"][0]
    # Cross-entropy is KL and the teacher's entropy, which has no gradient.
    assert loss["mine"] > 3 * loss["shipped"] > 0
    assert norm["mine"] == pytest.approx(3 * norm["shipped"], rel=1e-3)
