"""Twenty steps of GRPO and of HDPO in configs/lab.yaml give the numbers that they have always given.

In float64, so that another CPU's rounding draws the same tokens. What is float32 all the same (advantages, the
sampler's log-probabilities) sets the tolerance.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hdpo.cli import main
from hdpo.files import resolve_path
from tests.helpers.curves import read_curves

LAB = Path(__file__).parent.parent / "configs" / "lab.yaml"
STEPS = (0, 4, 9, 14, 19)
TOLERANCE = 1e-4  # 20 steps, each of which passes the rounding of those before on and adds its own

GOLDEN = {
    "grpo": {
        "rollout/reward": [0.9375, 0.9140625, 0.8046875, 0.75, 0.75],
        "cliff/fraction": [0.0625, 0.0625, 0.1875, 0.25, 0.25],
        "loss/policy": [0.0, 0.0, 0.0, 0.0, 0.0],
        "optim/grad_norm": [0.0, 0.3718208372592926, 0.18038909137248993, 0.0, 0.0],
        "rollout/entropy": [0.00100846833, 0.00468102000, 0.00788767636, 0.00682197465, 0.01094508730],
        "way": 0.1867216648566853,
    },
    "hdpo": {
        "rollout/reward": [0.9375, 0.9140625, 0.8046875, 0.7421875, 0.7578125],
        "cliff/fraction": [0.0625, 0.0625, 0.1875, 0.1875, 0.1875],
        "loss/policy": [0.0, 0.0, 0.0, -0.0005733598954975605, 0.0047045378014445305],
        "loss/distillation": [
            0.08276776224374771,
            math.nan,
            0.01585870049893856,
            0.013662370853126,
            0.0154354441910982,
        ],
        "optim/grad_norm": [9.06441593170166, 0.3734871745109558, 0.2979390025138, 1.684020757675171, 2.90557265281677],
        "privileged/pass_rate": [1.0, 0.0, 0.8333333134651184, 0.3333333432674408, 0.75],
        "rollout/entropy": [0.00100846833, 0.00504153688, 0.00472903205, 0.0135500412, 0.0149217686],
        "way": 0.2030605573121239,
    },
}


@pytest.mark.parametrize("method", [pytest.param("grpo", marks=pytest.mark.slow), "hdpo"])
def test_the_laboratorys_numbers(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(LAB), "--trainer.max_steps=20", "--model.policy.dtype=float64"]
    arguments += ["--trainer.precision=64-true", "--evaluation.before_fit=false", "--evaluation.after_fit=false"]
    arguments += [
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--best_checkpoint.monitor=null",
    ]
    assert main([*arguments, "--model.distillation_weight", {"grpo": "0", "hdpo": "1"}[method]]) == 0
    curves = {name: dict(points) for name, points in read_curves(Path("runs/lab/version_0")).items()}
    state = torch.load("runs/lab/version_0/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    initial = load_file(resolve_path("pkg://hdpo.lab/policy") + "/model.safetensors")
    moved = (
        torch.cat([(state[f"policy.model.{name}"] - value).flatten() for name, value in initial.items()]).norm().item()
    )
    for name, expected in GOLDEN[method].items():
        found = moved if name == "way" else [curves[name].get(step, math.nan) for step in STEPS]
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), name
