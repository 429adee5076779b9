"""Each benchmark's ``--help`` and a run of toy size, without TRL; what it writes is complete and plausible."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo.lab.problems import rows as problems

# Each starts processes that import everything anew.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
LAB = ROOT / "hdpo/lab/policy"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def rows(tmp_path, name, *arguments):
    target = tmp_path / "out" / "result.json"
    done = run(name, "--threads", 1, "--repeats", 1, "--json", target, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(target.read_text())
    environment = result["environment"]
    assert environment["command"].startswith(f"python benchmarks/{name}.py --threads 1")
    assert all(environment[key] for key in ("commit", "date", "hardware", "versions", "threads"))
    return result["rows"]


@pytest.mark.parametrize(
    "name",
    [
        "update",
        "memory",
        "preparation",
        "rollouts",
        "step",
        "gpu_step",
        "error_rates",
        "finite",
        "first_step",
        "kl",
        "soak",
        "verdicts",
    ],
)
def test_help_says_how_it_is_called(name):
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"benchmarks/{name}.py" in done.stdout
    assert "--json" in done.stdout


def test_a_senseless_number_ends_in_one_line():
    done = run("memory", "--tokens", 0)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("--tokens must be at least 1, got 0")


def test_update(tmp_path):
    options = ("--model", "toy", "--prompts", 4, "--completions", 4, "--tokens", 8, "--zero-variance", 0, 0.5)
    found = rows(tmp_path, "update", *options)
    assert [row["zero_variance"] for row in found] == [0.0, 0.5]
    assert all(row["hdpo_s"] > 0 and row["hdpo_peak_MiB"] >= 0 for row in found)


def test_all_methods_compute_the_same_loss_and_hdpo_needs_least(tmp_path):
    methods = ["hdpo-selected", "dense-selected", "hdpo-jsd", "dense-jsd"]
    found = rows(tmp_path, "memory", "--vocab", 40_000, "--tokens", 900, "--width", 32, "--methods", *methods)
    by_name = {row["method"]: row for row in found}
    for kind in ("selected", "jsd"):
        ours, dense = by_name[f"hdpo-{kind}"], by_name[f"dense-{kind}"]
        assert ours["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        # One chunk is 128 MiB here, the full logits 137 MiB, of which a dense loss keeps several copies.
        assert dense["peak_MiB"] > 1.2 * ours["peak_MiB"]


def test_rollouts(tmp_path):
    found = rows(tmp_path, "rollouts", "--model", "toy")
    assert [row["method"] for row in found] == ["hdpo", "generate-dynamic", "generate-static"]
    assert all(0 < row["tokens"] <= row["prompts"] * row["samples"] * row["new_tokens"] for row in found)


def test_step_sees_the_same_rollouts_with_and_without_distillation(tmp_path):
    sizes = ("--prompts", 4, "--completions", 2, "--new-tokens", 48, "--steps", 2)
    _, _, grpo, hdpo = rows(tmp_path, "step", "--cliffs", "none", "half", "--no-trl", *sizes)
    assert (grpo["method"], hdpo["method"]) == ("grpo", "hdpo")
    assert grpo["cliff/fraction"] == hdpo["cliff/fraction"] > 0
    assert grpo["privileged"] == 0 < hdpo["privileged"]
    assert hdpo["steps"] == 2


def test_gpu_step_goes_through_every_station_with_exactly_the_cliffs_asked_for(tmp_path):
    sizes = ("--prompts", 4, "--completions", 2, "--new-tokens", 24, "--mean-tokens", 16, "--prompt-tokens", 10)
    found = rows(tmp_path, "gpu_step", "--shape", "toy", *sizes, "--privileged-tokens", 30, "--cliffs", 0.5)
    stations = {row["station"]: row for row in found}
    assert list(stations) == ["rollouts", "scoring", "privileged", "teacher", "update", "step"]
    step, update = stations["step"], stations["update"]
    assert step["cliffs"] == [2]
    assert step["kept"] == [4], "every second of four privileged rollouts of two cliffs"
    assert 8 <= stations["rollouts"]["tokens"] <= 4 * 2 * 24
    assert 8 <= stations["privileged"]["tokens"] <= 2 * 4 * 24
    # Two mixed prompts with two rollouts each and four distilled ones; the teacher reads 30 tokens more of the latter.
    assert 8 * 11 <= update["tokens"] <= 8 * 34
    assert 4 * 41 <= stations["teacher"]["tokens"] <= 4 * 64
    completions = update["tokens"] - 8 * 10
    # Two layers of width 64: queries and output 64 x 64, keys and values 64 x 32, feed-forward 3 x 64 x 128, biases
    # of 64, 32 and 32, two norms; a norm at the end; and 512 tokens.
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 128 + 2 * 64) + 64
    flops = 6 * (layers * update["tokens"] + 512 * 64 * completions)
    assert update["TFLOP"] == pytest.approx(flops / 1e12)
    parts = sum(stations[name]["seconds"] for name in ("rollouts", "scoring", "privileged", "teacher", "update"))
    assert 0 < parts <= step["seconds"]
    assert all(stations[name]["peak_GiB"] > 0 < stations[name]["plan_GiB"] for name in ("rollouts", "update", "step"))


def test_gpu_step_measures_grpo_on_problems_without_cliffs(tmp_path):
    sizes = ("--prompts", 2, "--completions", 2, "--new-tokens", 8, "--mean-tokens", 8, "--prompt-tokens", 10)
    found = rows(tmp_path, "gpu_step", "--shape", "toy", *sizes, "--cliffs", 0, "--peak-tflops", 1)
    stations = {row["station"]: row for row in found}
    assert stations["step"]["cliffs"] == stations["step"]["kept"] == [0]
    assert stations["teacher"]["tokens"] == stations["teacher"]["seconds"] == 0
    assert stations["update"]["mfu"] == pytest.approx(stations["update"]["TFLOP"] / stations["update"]["seconds"])


def test_preparation(tmp_path):
    target = tmp_path / "result.json"
    done = run("preparation", "--rows", 1000, "--json", target)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(target.read_text())["rows"]
    assert [(row["data"], row["references_checked"]) for row in found] == [
        ("prepared", False), ("cached", False), ("prepared", True), ("cached", True)
    ]  # fmt: skip
    # A third of the rows are duplicates; every hundredth reference is unusable.
    assert found[0]["problems"] == found[1]["problems"] > found[2]["problems"] == found[3]["problems"] > 500
    assert found[0]["rows_per_s"] > found[2]["rows_per_s"] > 0
    assert all(row["peak_MiB"] >= row["unshared_MiB"] > 100 for row in found)


def test_finite(tmp_path):
    found = rows(tmp_path, "finite", "--model", "toy")
    assert [row["what"] for row in found] == ["saving", "step"]
    assert all(row["check_s"] > 0 and 0 < row["share"] < 1 for row in found)


def test_soak(tmp_path):
    target, figure = tmp_path / "result.json", tmp_path / "soak.png"
    done = run("soak", "--steps", 20, "--json", target, "--figure", figure)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["what"]: row for row in json.loads(target.read_text())["rows"]}
    assert len(found) == 5
    assert found["threads"]["largest"] >= found["threads"]["last"] >= 1
    assert 0 < found["unshared memory / MiB"]["last"] < found["resident memory / MiB"]["largest"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_first_step_on_a_file_is_taken_on_every_row_that_can_be_used(tmp_path):
    (row,) = rows(tmp_path, "first_step", "--rows", 1000)
    assert row["problems"] == 1000 - 10 - 1, "ten repeat another, one has no number"
    assert 0 < row["prepared_s"] < row["first_step_s"]
    assert row["cpu_s"] > 0


def test_kl_is_that_of_the_two_policies(tmp_path, monkeypatch):
    """A trained policy whose logits are the initial one's times 1.2, and one that was not trained at all."""
    command = [sys.executable, "-m", "hdpo", "fit", "--config", "lab", "--print_config"]
    config = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    initial = AutoModelForCausalLM.from_pretrained(LAB, dtype="float32")
    folders = {name: tmp_path / f"{name}-seed_0" for name in ("same", "sharper")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        trained = AutoModelForCausalLM.from_pretrained(LAB, dtype="float32")
        trained.lm_head.weight.data *= 1.0 if name == "same" else 1.2
        trained.save_pretrained(folder / "policy")
    same, sharper = rows(tmp_path, "kl", *folders.values(), "--problems", 12, "--samples", 1)
    assert same["kl all"] == same["kl tier6"] == 0

    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.import_module("kl").divergences(folders["sharper"], 12, 1)
    assert sharper["kl all"] == sharper["all"][0] == pytest.approx(sum(found["all"]) / len(found["all"]))
    # The first token of each completion, whose context is the prompt alone.
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    for row in itertools.islice(problems(split="validation", seed=1), 6):
        text = f"<|user|>{row['problem']}<|end|><|assistant|>"
        with torch.no_grad():
            logits = initial(**tokenizer(text, return_tensors="pt")).logits[0, -1].double()
        p, q = (1.2 * logits).softmax(-1), logits.softmax(-1)
        assert found[row["problem_source"]][0] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3, abs=1e-7)
