"""A report as figures (PNG and SVG) and in TensorBoard: curves over steps, and the figures as images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.evaluation.runs import WEIGHT

__all__ = ["draw", "write_tensorboard"]

_TRAINING = {"cliff/fraction": "cliffs among training prompts", "privileged/pass_rate": "privileged pass rate"}


def _error(estimate: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above; nothing for one run."""
    if estimate["low"] is None:
        return 0.0, 0.0
    # Rounding may put an end a hair's breadth inside.
    return max(0.0, estimate["value"] - estimate["low"]), max(0.0, estimate["high"] - estimate["value"])


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['label']} ({entry['num_runs']} run{'s' if entry['num_runs'] > 1 else ''})"


def _lines(settings: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Settings that differ in the weight alone, by weight; the one of weight 0 starts each of these curves."""
    groups: dict[str, list[dict[str, Any]]] = {}
    start = [entry for entry in settings if entry["distillation_weight"] == 0]
    for entry in settings:
        if entry["distillation_weight"] > 0:
            rest = {key: value for key, value in entry["values"].items() if key != WEIGHT}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)
    lines = [sorted(group, key=lambda e: e["distillation_weight"]) for group in groups.values()]
    return [(start if len(start) == 1 else []) + line for line in lines if len(line) > 1]


def _tradeoff(report: dict[str, Any], plt: Any) -> Any:
    """Greedy accuracy against the largest pass@k, and both over the weight where settings differ in it alone."""
    settings, top = report["settings"], f"pass@{max(report['pass_k'])}"
    lines = _lines(settings)
    figure, axes = plt.subplots(
        1, 2 if lines else 1, figsize=(13 if lines else 7.5, 5), layout="constrained", squeeze=False
    )
    plane = axes[0, 0]
    for i, entry in enumerate(settings):
        x, y = entry["outcome"]["greedy_accuracy"], entry["outcome"][top]
        errors = {"xerr": [[e] for e in _error(x)], "yerr": [[e] for e in _error(y)]}
        plane.errorbar(x["value"], y["value"], **errors, fmt="o", capsize=3, color=f"C{i}", label=_name(entry))
        note = f"λ={entry['distillation_weight']:g}"
        plane.annotate(note, (x["value"], y["value"]), textcoords="offset points", xytext=(6, 6), fontsize="small")
    for line in lines:
        points = [(e["outcome"]["greedy_accuracy"]["value"], e["outcome"][top]["value"]) for e in line]
        plane.plot(*zip(*points, strict=True), color="gray", linewidth=0.8, zorder=0)
    plane.set(xlabel="greedy accuracy (share of problems)", ylabel=f"{top} (share of problems)")
    plane.set_title(f"greedy accuracy against {top}")
    if lines:
        weights = sorted({e["distillation_weight"] for line in lines for e in line})
        place = {weight: i for i, weight in enumerate(weights)}  # evenly spaced: a log axis has no place for 0
        for line, style in zip(lines, ("-", "--", ":", "-.") * len(lines), strict=False):
            for i, metric in enumerate(("greedy_accuracy", top)):
                found = [e["outcome"][metric] for e in line]
                both = list(zip(*map(_error, found), strict=True))
                label = f"{metric}, {line[-1]['label']}" if len(lines) > 1 else metric
                x, y = [place[e["distillation_weight"]] for e in line], [f["value"] for f in found]
                axes[0, 1].errorbar(x, y, yerr=both, fmt="o", linestyle=style, color=f"C{i}", capsize=3, label=label)
        axes[0, 1].set_xticks(list(place.values()), [f"{weight:g}" for weight in weights])
        axes[0, 1].set(xlabel="distillation weight λ", ylabel="share of problems", title="over the weight")
    return figure


def _sources(report: dict[str, Any], plt: Any) -> Any:
    """Greedy accuracy and the largest pass@k of each source."""
    settings = report["settings"]
    sources = list(settings[0]["by_source"])
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for axis, metric in zip(axes, ("greedy_accuracy", f"pass@{max(report['pass_k'])}"), strict=True):
        for i, entry in enumerate(settings):
            found = [(j, entry["by_source"][s][metric]) for j, s in enumerate(sources) if s in entry["by_source"]]
            x = [j + 0.6 * ((i + 0.5) / len(settings) - 0.5) for j, _ in found]
            errors = list(zip(*(_error(f) for _, f in found), strict=True))
            axis.errorbar(
                x, [f["value"] for _, f in found], yerr=errors, fmt="o", capsize=2, color=f"C{i}", label=_name(entry)
            )
        axis.set_xticks(range(len(sources)), sources)
        axis.set(title=f"{metric} by source", ylabel="share of problems", ylim=(-0.03, 1.03))
    return figure


def _steps(report: dict[str, Any], plt: Any) -> Any:
    """Evaluations, cliffs and the privileged pass rate over steps."""
    top = f"pass@{max(report['pass_k'])}"
    panels = [("curves", "greedy_accuracy"), ("curves", top), *(("training", name) for name in _TRAINING)]
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axis, (kind, name) in zip(axes.flat, panels, strict=True):
        for i, entry in enumerate(report["settings"]):
            points = {int(step): value for step, value in entry[kind].get(name, {}).items()}
            if not points:
                continue
            x, y = list(points), [p["value"] for p in points.values()]
            axis.plot(x, y, marker="o", markersize=3, color=f"C{i}", label=_name(entry))
            if entry["num_runs"] > 1:
                low = [p["low"] if p["low"] is not None else p["value"] for p in points.values()]
                high = [p["high"] if p["high"] is not None else p["value"] for p in points.values()]
                axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        title = name if kind == "curves" else f"{_TRAINING[name]} (means of up to 20 steps)"
        share = "share of problems" if kind == "curves" else "share"
        axis.set(title=title, xlabel="step", ylabel=share, ylim=(0, 1.03 if kind == "curves" else None))
    return figure


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw ``tradeoff``, ``sources`` and ``steps``, each as PNG and SVG.

    Args:
        report: what :func:`hdpo.evaluation.comparison.build_report` returns.
        folder: where the files go.

    Returns:
        The PNG files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # The same report gives the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "hdpo"
    paths = []
    parts = {"tradeoff": _tradeoff, "sources": _sources, "steps": _steps}
    for name, part in parts.items():
        figure = part(report, plt)
        figure.suptitle(f"{report['split']} split; intervals: 95 % over runs", fontsize="medium")
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(3, len(labels))), fontsize="small")
        if name == "tradeoff" and len(figure.axes) > 1:
            figure.axes[1].legend(fontsize="small")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
    return paths


def write_tensorboard(report: dict[str, Any], folder: Path, images: Sequence[Path]) -> None:
    """Write the report for TensorBoard, in place of an older one.

    Scalars: means over the runs of each setting at the steps of their evaluations. Images: the figures. (HParams, of
    each run, come with the runs' own event files.)

    Args:
        report: what :func:`hdpo.evaluation.comparison.build_report` returns.
        folder: the log directory.
        images: PNG files.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.rglob("events.out.tfevents.*"):
        old.unlink()
    names = {e["label"]: re.sub(r"[^\w.,=+-]+", "_", e["label"]) for e in report["settings"]}
    for entry in report["settings"]:
        with SummaryWriter(str(folder / names[entry["label"]])) as writer:
            for kind in ("curves", "training"):
                for name, points in entry[kind].items():
                    for step, point in points.items():
                        writer.add_scalar(f"mean over runs/{name}", point["value"], int(step))
    if images:
        with SummaryWriter(str(folder / "figures")) as writer:
            for path in images:
                writer.add_image(f"report/{path.stem}", imread(path)[..., :3], dataformats="HWC")
