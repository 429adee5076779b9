"""``gpu_check.py`` at toy size on a CPU, where nothing but torch, transformers and lightning can be imported."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks/gpu_check.py")
BARE = "-m tests.helpers.bare"


def run(*arguments):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HDPO_PYTHON": BARE,
    }  # fmt: skip
    command = [sys.executable, *BARE.split(), SCRIPT, "--size", "toy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    return done, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_check")


def test_what_is_hidden_cannot_be_imported():
    code = "from tests.helpers.bare import forget_all_but; forget_all_but(); import torch, transformers, lightning\n"
    for name in ("scipy", "datasets", "jsonargparse", "math_verify", "pyarrow"):
        code += f"try: import {name}\nexcept ModuleNotFoundError: print('{name}')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["scipy", "datasets", "jsonargparse", "math_verify", "pyarrow"]


GROUPS = [
    ("A", "losses engine shadow layouts"),
    ("A", "strategies not_finite autocast_cache synchronisations"),
    ("B", "decoding update optimizer"),
    ("B", "weights compiled"),
    ("C", "step kernels"),
    ("C", "step_again validation"),
]


@pytest.mark.parametrize(("part", "names"), GROUPS)
def test_every_check_at_toy_size(part, names):
    done, (first, *lines) = run("--part", part, "--only", *names.split())
    assert first["environment"]["gpu"] is None
    assert [line["check"] for line in lines] == names.split(), "in the order of their value"
    assert {line["part"] for line in lines} == {part}
    assert not [line for line in lines if line["ok"] is False]
    assert done.returncode == 0
    for found in lines:
        match found["check"]:
            case "losses":
                assert found["float32"]["weight"] < 1e-4 < found["bfloat16"]["logps_mean"]
            case "shadow":
                assert found["ok"] is True
            case "strategies":
                assert [found[name]["resumed"] for name in ("single", "ddp", "fsdp2")] == [0, 0, 0]
            case "decoding":
                assert found["ms_per_token"]["4x20"] > 0
            case "validation":
                assert 0 < found["evaluation_s"] < found["seconds"]
            case "step" | "step_again":
                assert found["update"]["tokens"] > 0


def test_no_check_is_left_out(gpu_check):
    seen = {(part, name) for part, names in GROUPS for name in names.split()}
    assert seen == {(part, name) for part, checks in gpu_check.PARTS.items() for name in checks}


def test_a_check_that_fails_or_hangs_is_a_line_and_the_next_begins(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", {"A": {"none": 30, "losses": 0.5}})
    unknown, slow = gpu_check.part("A", "toy", None)
    assert unknown["ok"] is slow["ok"] is False
    assert "KeyError: 'none'" in unknown["error"]
    assert slow["error"].startswith("no end within 0")
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    assert [line["skipped"] for line in gpu_check.part("A", "toy", ["losses"])] == ["no time left"]
