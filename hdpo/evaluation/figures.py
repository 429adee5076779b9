"""A report as figures (PNG and SVG) and in TensorBoard: curves over steps, and the figures as images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdpo.evaluation.runs import WEIGHT

_TRAINING = {"cliff/fraction": "cliffs among training prompts", "privileged/pass_rate": "privileged pass rate"}

_FAR = 0.3
"""How far below the best a setting must be for the others to be drawn once more without it."""


def _error(estimate: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above; nothing for one run."""
    if estimate["low"] is None:
        return 0.0, 0.0
    # Rounding may put an end a hair's breadth inside.
    return max(0.0, estimate["value"] - estimate["low"]), max(0.0, estimate["high"] - estimate["value"])


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['label']} ({entry['num_runs']} run{'s' if entry['num_runs'] > 1 else ''})"


def _curves(settings: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """All settings; those that differ in the weight alone are together, by weight."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in settings:
        rest = {key: value for key, value in entry["values"].items() if key != WEIGHT}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)
    return [sorted(group, key=lambda e: e["distillation_weight"]) for group in groups.values()]


def _lines(settings: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The curves with several weights, from weight 0 on where a run without distillation differs in nothing else."""
    lines = [curve for curve in _curves(settings) if len(curve) > 1]
    for line in lines:
        # What distillation alone brings is not among the values of a run without it.
        start = [
            entry
            for entry in settings
            if entry["distillation_weight"] == 0 < line[0]["distillation_weight"]
            and all(line[0]["values"].get(key) == value for key, value in entry["values"].items() if key != WEIGHT)
        ]
        line[:0] = start if len(start) == 1 else []
    return lines


def _styled(settings: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """All settings by curve, with a colour for each curve, and a marker and line style for the place on it."""
    return [
        (entry, {"color": f"C{i % 10}", "marker": "os^Dv<>P*X"[j % 10], "linestyle": ("-", "--", ":", "-.")[j % 4]})
        for i, curve in enumerate(_curves(settings))
        for j, entry in enumerate(curve)
    ]


def _plane(settings: Sequence[dict[str, Any]], shown: Sequence[str], top: str, axis: Any) -> None:
    """Greedy accuracy against the largest pass@k, and the weight at the points whose labels are ``shown``."""
    by_height = [e["label"] for e in sorted(settings, key=lambda e: e["outcome"][top]["value"]) if e["label"] in shown]
    for entry, style in _styled(settings):
        x, y = entry["outcome"]["greedy_accuracy"], entry["outcome"][top]
        errors = {"xerr": [[e] for e in _error(x)], "yerr": [[e] for e in _error(y)]}
        axis.errorbar(x["value"], y["value"], **errors, **style | {"linestyle": ""}, capsize=3, label=_name(entry))
        if entry["label"] in by_height:
            # Of two neighbours the lower one has its weight below, the upper one above.
            side = ((6, -13), (6, 6), (-6, -13), (-6, 6))[by_height.index(entry["label"]) % 4]
            axis.annotate(
                f"λ={entry['distillation_weight']:g}",
                (x["value"], y["value"]),
                textcoords="offset points",
                xytext=side,
                ha="left" if side[0] > 0 else "right",
                fontsize="small",
                color=style["color"],
                bbox={"pad": 0.5, "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            )
    colors = {entry["label"]: style["color"] for entry, style in _styled(settings)}
    for line in _lines(settings):
        points = [(e["outcome"]["greedy_accuracy"]["value"], e["outcome"][top]["value"]) for e in line]
        axis.plot(*zip(*points, strict=True), color=colors[line[-1]["label"]], linewidth=0.8, alpha=0.6, zorder=0)
    axis.margins(0.12)
    axis.set(xlabel="greedy accuracy (share of problems)", ylabel=f"{top} (share of problems)")


def _line_name(line: Sequence[dict[str, Any]]) -> str:
    """The labels of the settings that distil, without their weights."""
    names = dict.fromkeys(
        ", ".join(part for part in entry["label"].split(", ") if not part.startswith("weight "))
        for entry in line
        if entry["distillation_weight"] > 0
    )
    return " / ".join(filter(None, names))


def _over_weight(settings: Sequence[dict[str, Any]], top: str, axis: Any) -> None:
    """Greedy accuracy and the largest pass@k over the weight, for settings that differ in it alone."""
    lines = _lines(settings)
    colors = {entry["label"]: style["color"] for entry, style in _styled(settings)}
    weights = sorted({e["distillation_weight"] for line in lines for e in line})
    place = {weight: i for i, weight in enumerate(weights)}  # evenly spaced: a log axis has no place for 0
    for i, line in enumerate(lines):
        x = [place[e["distillation_weight"]] + 0.06 * (i - (len(lines) - 1) / 2) for e in line]  # bars side by side
        for metric, style in ((top, "-"), ("greedy_accuracy", "--")):
            found = [e["outcome"][metric] for e in line]
            both = list(zip(*map(_error, found), strict=True))
            label = (_line_name(line) or None) if metric == top else None
            marks = {"fmt": "o", "markersize": 4, "linestyle": style, "color": colors[line[-1]["label"]], "capsize": 3}
            axis.errorbar(x, [f["value"] for f in found], yerr=both, label=label, **marks)
    axis.set_xticks(list(place.values()), [f"{weight:g}" for weight in weights])
    axis.set(xlabel="distillation weight λ", ylabel="share of problems", ylim=(-0.02, 1.02))
    axis.set_title(f"over the weight: {top} solid, greedy accuracy dashed")
    if any(map(_line_name, lines)):
        axis.legend(fontsize="small")


def _tradeoff(report: dict[str, Any], plt: Any) -> Any:
    """Greedy accuracy against the largest pass@k, and both over the weight where settings differ in it alone."""
    settings, top = report["settings"], f"pass@{max(report['pass_k'])}"
    best = max(entry["outcome"][top]["value"] for entry in settings)
    near = [entry for entry in settings if entry["outcome"][top]["value"] > best - _FAR]
    zoom, lines = 1 < len(near) < len(settings), bool(_lines(settings))
    number = 1 + zoom + lines
    figure, axes = plt.subplots(1, number, figsize=(7.5 if number == 1 else 6.2 * number, 5), layout="constrained")
    axes = list(np.ravel(axes))
    _plane(settings, [e["label"] for e in settings if not zoom or e not in near], top, axes[0])
    axes[0].set_title(f"greedy accuracy against {top}")
    if zoom:
        _plane(near, [e["label"] for e in near], top, axes[1])
        axes[1].set_title(f"without those more than {_FAR:g} below the best")
    if lines:
        _over_weight(settings, top, axes[-1])
    return figure


def _sources(report: dict[str, Any], plt: Any) -> Any:
    """Greedy accuracy and the largest pass@k of each source."""
    settings = report["settings"]
    sources = list(settings[0]["by_source"])
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for axis, metric in zip(axes, ("greedy_accuracy", f"pass@{max(report['pass_k'])}"), strict=True):
        for i, (entry, style) in enumerate(_styled(settings)):
            found = [(j, entry["by_source"][s][metric]) for j, s in enumerate(sources) if s in entry["by_source"]]
            x = [j + 0.6 * ((i + 0.5) / len(settings) - 0.5) for j, _ in found]
            errors = list(zip(*(_error(f) for _, f in found), strict=True))
            marks = {**style, "linestyle": "", "markersize": 5, "capsize": 2, "label": _name(entry)}
            axis.errorbar(x, [f["value"] for _, f in found], yerr=errors, **marks)
        axis.set_xticks(range(len(sources)), sources)
        axis.set(title=f"{metric} by source", ylabel="share of problems", ylim=(-0.03, 1.03))
    return figure


def _steps(report: dict[str, Any], plt: Any) -> Any:
    """Evaluations (of the endpoint that decides, where one is named), cliffs, privileged pass rate, over steps."""
    primary = (name for name in report["question"]["primary"] if name.startswith("pass@"))
    top = next(primary, f"pass@{max(report['pass_k'])}")
    panels = [("curves", "greedy_accuracy"), ("curves", top), *(("training", name) for name in _TRAINING)]
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axis, (kind, name) in zip(axes.flat, panels, strict=True):
        for entry, style in _styled(report["settings"]):
            points = {int(step): value for step, value in entry[kind].get(name, {}).items()}
            if not points:
                continue
            x, y = list(points), [p["value"] for p in points.values()]
            axis.plot(x, y, **style, markersize=4, label=_name(entry))
            if entry["num_runs"] > 2:  # two runs tell so little that their band would hide the others
                low = [p["low"] if p["low"] is not None else p["value"] for p in points.values()]
                high = [p["high"] if p["high"] is not None else p["value"] for p in points.values()]
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
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
        figure.suptitle(f"{report['split']} split; 95 % intervals over runs", fontsize="medium")
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(3, len(labels))), fontsize="small")
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
    names: list[str] = []
    for number, entry in enumerate(report["settings"], 1):
        # File systems take 255 bytes, and settings that differ in everything have labels of thousands.
        name = re.sub(r"[^\w.,=+-]+", "_", entry["label"]).encode()[:200].decode(errors="ignore")
        names.append(f"{name} #{number}" if name in names else name)
        with SummaryWriter(str(folder / names[-1])) as writer:
            for kind in ("curves", "training"):
                for name, points in entry[kind].items():
                    for step, point in points.items():
                        writer.add_scalar(f"mean over runs/{name}", point["value"], int(step))
    if images:
        with SummaryWriter(str(folder / "figures")) as writer:
            for path in images:
                writer.add_image(f"report/{path.stem}", imread(path)[..., :3], dataformats="HWC")
