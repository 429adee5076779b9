"""The laboratory through the command line, made small and changed by a YAML file as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hdpo.cli import main
from tests.helpers.curves import read_curves

__all__ = ["fit"]


def fit(overlay: dict[str, Any], *arguments: str, steps: int = 2, name: str = "run") -> dict[str, dict[int, float]]:
    """Run ``fit`` in the working folder with an overlay; returns the curves, name -> step -> value."""
    small = {
        "model": {"pass_k": [1]},
        "data": {"prompts_per_step": 6, "selection": {"num_train_problems": 30, "num_val_problems": 6}},
        "rollouts": {"num_generations": 4, "num_val_samples": 1, "temperature": 2.0},
        "trainer": {
            "max_steps": steps, "limit_val_batches": 0, "enable_progress_bar": False,
            "logger": {"init_args": {"version": name}},
        },
        "evaluation": {"before_fit": False, "after_fit": False, "summary": False},
        "best_checkpoint": {"monitor": None},
    }  # fmt: skip
    Path("small.yaml").write_text(yaml.safe_dump(small))
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = ["--config", "lab", "--config", "small.yaml", "--config", "overlay.yaml"]
    assert main(["fit", *files, *arguments]) == 0
    return {tag: dict(points) for tag, points in read_curves(Path("runs/lab") / name).items()}
