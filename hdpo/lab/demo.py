"""``make demo``: GRPO and HDPO from the same policy on the same prompts, side by side.

Both are ``python -m hdpo fit --config configs/lab.yaml``; the only difference is ``model.distillation_weight``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.cli import main as hdpo_main

__all__ = ["main"]

METHODS = {"grpo": 0.0, "hdpo": None}  # None: the configuration's own distillation weight
STATIONS = ("rollouts", "scoring", "privileged", "teacher", "update")


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run's TensorBoard event files: tag -> [(step, value), ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def summarise(run: Path, method: str, seed: int, seconds: float) -> dict[str, Any]:
    """One run's entry of ``summary.json``."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    curves = read_curves(run)
    cliffs = [value for _, value in curves["cliff/fraction"]]
    quarter = max(1, len(cliffs) // 4)
    values = {name: [v for _, v in points] for name, points in curves.items()}
    return {
        "method": method,
        "seed": seed,
        "run": str(run),
        "seconds": round(seconds, 1),
        "steps": summary["steps"],
        "before": summary["before"],
        "after": summary["after"],
        "seconds_per_step": {name: _mean(values.get(f"time/{name}", [])) for name in STATIONS},
        "cliff_fraction": {"first_quarter": _mean(cliffs[:quarter]), "last_quarter": _mean(cliffs[-quarter:])},
        "privileged": {
            name: _mean(values.get(f"privileged/{name}", [])) for name in ("pass_rate", "copy_rate", "student_mass")
        },
    }


def plot(runs: Sequence[dict[str, Any]], path: Path, k: int) -> None:
    """pass@k and the cliff fraction over steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = {"grpo": "tab:gray", "hdpo": "tab:red"}
    hardest = max(source for source in runs[0]["after"] if source != "all")
    for run in runs:
        curves = read_curves(Path(run["run"]))
        style = {"color": colors[run["method"]], "alpha": 0.9}
        label = run["method"].upper() if run["seed"] == runs[0]["seed"] else None
        left.plot(*zip(*curves[f"val/{hardest}/pass@{k}"], strict=True), marker="o", label=label, **style)
        left.plot(*zip(*curves[f"val/pass@{k}"], strict=True), linestyle=":", **style)
        steps, values = zip(*curves["cliff/fraction"], strict=True)
        window = 10
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        right.plot(steps, smooth, label=label, **style)
    left.set(title=f"held-out pass@{k}: {hardest} (solid), all (dotted)", xlabel="step", ylim=(0, 1.02))
    right.set(title="cliffs among training prompts (mean of 10 steps)", xlabel="step", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(runs: Sequence[dict[str, Any]], k: int) -> None:
    """The methods side by side, means over seeds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"held-out problems, before -> after (mean of {len({r['seed'] for r in runs})} seed(s))")
    table.add_column("")
    for method in METHODS:
        table.add_column(method.upper(), justify="right")

    def mean_of(method: str, *keys: str) -> float:
        values = []
        for run in runs:
            if run["method"] == method:
                value: Any = run
                for key in keys:
                    value = value[key]
                values.append(value)
        return sum(v or 0.0 for v in values) / len(values)

    for source in [s for s in runs[0]["after"] if s != "all"] + ["all"]:
        for name in (f"pass@{k}", "greedy_accuracy"):
            cells = [[mean_of(m, when, source, name, "value") for when in ("before", "after")] for m in METHODS]
            table.add_row(f"{source} {name}", *(f"{before:.3f} -> {after:.3f}" for before, after in cells))
    table.add_section()
    for label, key in (("cliffs, first quarter of steps", "first_quarter"), ("cliffs, last quarter", "last_quarter")):
        table.add_row(label, *(f"{mean_of(m, 'cliff_fraction', key):.3f}" for m in METHODS))
    for station in STATIONS:
        table.add_row(
            f"seconds per step: {station}", *(f"{mean_of(m, 'seconds_per_step', station):.3f}" for m in METHODS)
        )
    copied = mean_of("hdpo", "privileged", "copy_rate")
    table.add_row("kept privileged rollouts that copy the reference", "-", f"{copied:.0%}")
    Console(width=None if Console().is_terminal else 120).print(table)


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdpo.lab.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, 0, 1, ... (default 1)")
    parser.add_argument("--config", default="lab", help="configuration of both runs")
    parser.add_argument("--out", default="runs/demo", help="folder of the runs, summary.json and demo.png")
    parser.add_argument("overrides", nargs="*", help="more arguments for both runs, after --")
    options = parser.parse_args(args)
    out = Path(options.out)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for method, weight in METHODS.items():
            version = f"{method}-seed{seed}"
            print(f"== {version}", flush=True)
            arguments = ["fit", "--config", options.config, "--seed_everything", str(seed)]
            arguments += ["--trainer.logger.init_args.save_dir", str(out.parent)]
            arguments += ["--trainer.logger.init_args.name", out.name]
            arguments += ["--trainer.logger.init_args.version", version]
            if weight is not None:
                arguments += ["--model.distillation_weight", str(weight)]
            started = time.perf_counter()
            _clear(out / version)
            status = hdpo_main([*arguments, *options.overrides])
            if status:
                return status
            runs.append(summarise(out / version, method, seed, time.perf_counter() - started))
    (out / "summary.json").write_text(json.dumps(runs, indent=2), encoding="utf-8")
    k = max(int(name.removeprefix("pass@")) for name in runs[0]["after"]["all"] if name.startswith("pass@"))
    plot(runs, out / "demo.png", k)
    print_table(runs, k)
    print(
        f"""
written: {out / "summary.json"}, {out / "demo.png"} and a TensorBoard run for each line above

what to try next:
  .venv/bin/tensorboard --logdir {out}                     curves and sample texts
  make demo SEEDS=3                                        is it noise?
  .venv/bin/python -m hdpo report {out}                    intervals and tests over seeds
  .venv/bin/python -m hdpo fit --config configs/lab.yaml --model.distillation_weight 0.1
  .venv/bin/python -m hdpo fit --config configs/lab.yaml --config configs/teacher/frozen.yaml
  .venv/bin/python -m hdpo fit --config configs/hdpo.yaml  your policy and your data: see README.md"""
    )
    return 0


def _clear(run: Path) -> None:
    """Remove an earlier run of the demo, whose curves would mix with the new ones."""
    import shutil

    if (run / "config.yaml").exists():
        shutil.rmtree(run)


if __name__ == "__main__":
    raise SystemExit(main())
