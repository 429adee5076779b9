"""Evaluations and runs of policies whose true success rates are known."""

import json

import numpy as np
import yaml

from hdpo.evaluation.records import record_path, write_gzip


def rows(rates, num_samples=8, *, rng, step=100, split="validation", sources=("gsm8k", "math"), dataset=""):
    """Rows of one evaluation; samples and the greedy completion succeed with probability ``rates[row]``."""
    made = []
    for row, rate in enumerate(rates):
        for i in range(num_samples + 1):
            greedy, correct = i == num_samples, bool(rng.random() < rate)
            made.append(
                {
                    "split": split,
                    "step": step,
                    "dataset": dataset,
                    "row": row,
                    "problem_hash": f"{row:016x}",
                    "source": sources[row % len(sources)],
                    "reference": str(row),
                    "greedy": greedy,
                    "sample": 0 if greedy else i,
                    "seed": 1000 * row + i,
                    "temperature": 0.0 if greedy else 1.0,
                    "outcome": "correct" if correct else "wrong",
                    "tokens": 5,
                    "truncated": False,
                    "answer": str(row) if correct else None,
                    "completion": f"so it is {row}" if correct else "",
                }
            )
    return made


def rates(num_problems=60, seed=0):
    return np.random.default_rng(seed).uniform(size=num_problems)


def write_run(folder, *, evaluations, weight=0.0, seed=0, arm=None, pass_k=(1, 4, 8), recent=None, **changes):
    """A run's folder as ``fit`` leaves it; ``changes`` are dotted keys with ``__`` for a dot."""
    resolved = {
        "seed_everything": seed,
        "model": {
            "distillation_weight": weight,
            "pass_k": list(pass_k),
            "seed": seed,
            "divergence": {"class_path": "hdpo.losses.JSD", "init_args": {"tail": "exact"}},
            "teacher": {"class_path": "hdpo.teacher.DriftingTeacher"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "betas": [0.9, 0.99]}},
        },
        "data": {"prompts_per_step": 16, "cache_dir": f"{folder}/cache", "source": {"kwargs": {"seed": 0}}},
        "distillation": {"topk": 64},
        "samples": {"every_n_steps": seed},
        "trainer": {"max_steps": 100, "logger": {"init_args": {"version": folder.name}}},
    }
    for key, value in changes.items():
        *path, name = key.split("__")
        section = resolved
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    if arm is not None:
        (folder / "sweep.json").write_text(json.dumps({"arm": arm}))
    spent = {}
    for step, made in evaluations.items():
        made = [{**row, "step": step} for row in made]
        write_gzip(record_path(folder / "evaluations", step), made)
        spent[f"{made[0]['split']}/{step}"] = {
            "train_seconds": 1.5 * step,
            "tokens": 10 * step,
            "recent": recent or {},
        }
    process = {"hdpo": "0.1.0", "code": "c0de", "commit": "abcdef0123456789", "changed": False}
    (folder / "provenance.json").write_text(json.dumps({"processes": [process], "evaluations": spent}))
    return folder
