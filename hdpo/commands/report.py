"""``python -m hdpo report``: what each setting reaches, what it costs, and whether it is more than noise.

Every number is computed again from the rows of the evaluations; nothing is read from logs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from hdpo.commands.suggestions import CommandParser
from hdpo.errors import ConfigError
from hdpo.evaluation.comparison import Question, build_report
from hdpo.evaluation.runs import Run, find_runs, write_compact
from hdpo.files import write_text

_MANY = 24
"""Runs above which they are not listed one by one."""


def _parser() -> CommandParser:
    parser = CommandParser(
        "report",
        description="Compare runs: tables with intervals over runs and tests, figures, and curves for TensorBoard.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that holds runs")
    add("--question", action=ActionConfigFile, metavar="FILE", help="YAML file with the options below")
    add("--baseline", metavar="SETTING", help="what the others are compared with; default: the setting with weight 0")
    add("--primary", nargs="+", default=[], metavar="ENDPOINT", help="what decides: METRIC, or METRIC:SOURCE+SOURCE")
    add("--family", nargs="+", default=[], metavar="SETTING", help="settings whose tests are corrected together (Holm)")
    add("--margin", type=float, metavar="X", help="non-inferiority margin: how much lower still counts as not lower")
    add("--last", type=int, default=5, help="a run's outcome is the mean of its last LAST evaluations")
    add("--split", metavar="NAME", help="validation or test; default: test where all runs have it")
    add("--ignore", nargs="+", default=[], metavar="KEY", help="keys in which runs of one setting may differ")
    add("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="only runs with these seeds; default: all")
    add("--out", metavar="DIR", help="folder to write; default: report in the first RUN")
    add("--compact", metavar="DIR", help="also write a file per run there: its verdicts without texts, a few KB")
    return parser


def _cell(estimate: dict[str, Any], sign: str = "") -> str:
    value = f"{estimate['value']:{sign}.3f}"
    if estimate.get("low") is None:
        return value
    return f"{value} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _outcomes(report: dict[str, Any], table: Any) -> list[Any]:
    metrics = [e for e in report["endpoints"] if ":" not in e or e in report["question"]["primary"]]
    number = report["question"]["last"]
    outcome = table(
        f"mean of the last {number} evaluations on the {report['split']} split (95 % intervals over runs)",
        ["setting", "runs", "steps", *metrics],
    )
    best = table("last evaluation; best over training, and how much choosing it flatters", ["setting", *metrics])
    for entry in report["settings"]:
        steps = f"{entry['steps'][0]}-{entry['steps'][-1]}"
        outcome.add_row(
            entry["label"], str(entry["num_runs"]), steps, *(_cell(entry["outcome"][metric]) for metric in metrics)
        )
        cells = []
        for metric in metrics:
            last, chosen = entry["last"][metric]["value"], entry["best"][metric]
            cells.append(f"{last:.3f}; {chosen['value']:.3f}, {chosen['selection_bias']:+.3f}")
        best.add_row(entry["label"], *cells)
    return [outcome, best]


def _runs(report: dict[str, Any], table: Any) -> list[Any]:
    if len(report["runs"]) > _MANY:
        return []
    metrics = [e for e in report["endpoints"] if ":" not in e]
    shown = table("last evaluation of each run (95 % intervals over problems)", ["setting", "seed", "step", *metrics])
    for run in report["runs"]:
        cells = [_cell(run["last"]["all"][m]) for m in metrics]
        shown.add_row(run["setting"], str(run["seed"]), str(run["step"]), *cells)
    return [shown]


def _comparisons(report: dict[str, Any], table: Any) -> list[Any]:
    tables = []
    adjusted = {(row["setting"], row["endpoint"]): row["p_value_holm"] for row in report["family"]}
    margin = report["question"]["margin"]
    for named in (True, False):
        rows = [r for r in report["comparisons"] if ((r["setting"], r["endpoint"]) in adjusted) == named]
        if not rows:
            continue
        title = "named beforehand" if named else "exploratory, p-values not adjusted"
        columns = ["setting", "endpoint", "runs", "means", "difference", "other problems too", "df", "p"]
        columns += ["p (Holm)"] if named else []
        columns += ["p (permutation)", *([f"p (lower by {margin:g})"] if margin is not None else []), "detectable"]
        shown = table(f"difference to {report['baseline']}, {title} (95 % intervals)", columns)
        for row in rows:
            wider = {"value": row["value"], "low": row["low_problems"], "high": row["high_problems"]}
            shown.add_row(
                row["setting"],
                row["endpoint"],
                "{} and {}".format(*row["num_runs"]),
                f"{row['baseline']:.3f}, {row['with']:.3f}",
                _cell(row, "+"),
                _cell(wider, "+").partition(" ")[2] or "-",
                "-" if row["df"] is None else f"{row['df']:.1f}",
                _p(row["p_value"]),
                *([_p(adjusted[row["setting"], row["endpoint"]])] if named else []),
                _p(row["p_permutation"]),
                *([_p(row["p_not_lower"])] if margin is not None else []),
                "-" if row["detectable"] is None else f"{row['detectable']:+.3f}",
            )
        tables.append(shown)
    return tables


def _by_source(report: dict[str, Any], table: Any) -> list[Any]:
    sources = list(report["settings"][0]["by_source"])
    if len(sources) < 2 or any(list(entry["by_source"]) != sources for entry in report["settings"]):
        return []
    whole = [endpoint for endpoint in report["endpoints"] if ":" not in endpoint]
    number = report["question"]["last"]
    shown = table(f"by source: before training, mean of the last {number} evaluations", ["setting", "metric", *sources])
    for entry in report["settings"]:
        for metric in (whole[0], whole[-1]):
            cells = []
            for source in sources:
                before, after = (entry[when].get(source, {}).get(metric) for when in ("before", "by_source"))
                cells.append((f"{before['value']:.3f} -> " if before else "") + f"{after['value']:.3f}")
            shown.add_row(entry["label"], metric, *cells)
    return [shown]


def _differences_by_source(report: dict[str, Any], table: Any) -> list[Any]:
    sources = sorted({row["source"] for row in report["by_source"]})
    if len(sources) < 2:
        return []
    shown = table(
        f"difference to {report['baseline']} by source (95 % intervals over runs)", ["setting", "metric", *sources]
    )
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in report["by_source"]:
        cells.setdefault((row["setting"], row["metric"]), {})[row["source"]] = _cell(row, "+")
    for key, values in cells.items():
        shown.add_row(*key, *(values.get(source, "-") for source in sources))
    return [shown]


def _policies(report: dict[str, Any], table: Any) -> list[Any]:
    if not report["policies"]:
        return []
    title = "these two policies on the same problems (95 % intervals over problems); nothing follows for their methods"
    shown = table(title, ["second policy", "first policy", "step", "endpoint", "difference"])
    for row in report["policies"]:
        cells = [Path(row["second"]).name, Path(row["first"]).name, str(row["step"]), row["endpoint"], _cell(row, "+")]
        shown.add_row(*cells)
    return [shown]


def print_report(report: dict[str, Any]) -> None:
    """Print the tables and the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 180)

    class Plain(Table):
        """Cells are text, not markup: labels and intervals hold brackets."""

        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(Text(str(cell)) for cell in cells), **options)

    def table(title: str, columns: Sequence[str]) -> Table:
        made = Plain(title=Text(title))
        for i, name in enumerate(columns):
            made.add_column(Text(name), justify="left" if i == 0 or name in ("endpoint", "metric") else "right")
        return made

    for part in (_outcomes, _by_source, _runs, _comparisons, _differences_by_source, _policies):
        for shown in part(report, table):
            console.print(shown)
    differ = sorted({key for entry in report["settings"] for key in entry["values"]})
    lines = [f"the settings differ in: {', '.join(differ)}"] if differ else []
    versions = {str(p.get("commit") or p.get("code"))[:12] for run in report["runs"] for p in run["processes"]}
    lines += [f"hdpo at {', '.join(sorted(versions))}"] if versions else []
    for line in [*lines, *(f"note: {note}" for note in report["notes"])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _write_compact(runs: Sequence[Run], folder: Path) -> None:
    names: dict[str, Path] = {}
    for run in runs:
        name = run.folder.name.removesuffix(".run.jsonl.gz")
        if name in names:
            raise ConfigError(f"--compact: {run.folder} and {names[name]} have one name; rename one of them")
        names[name] = run.folder
        write_compact(run, folder / name)


def main(args: Sequence[str]) -> int:
    """Run ``python -m hdpo report``; returns the exit status, 0.

    Raises:
        ConfigError: there is no run, a run's files are broken, or the question names what is not there.
    """
    options = _parser().options(args)
    names = Question.__dataclass_fields__
    question = Question(**{name: value for name, value in vars(options).items() if name in names})
    out = Path(options.out) if options.out else Path(options.runs[0]) / "report"
    for name, folder in (("out", out), ("compact", Path(options.compact or "."))):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--{name}: {folder} is a file; name a folder")
    runs = find_runs(options.runs)
    report = build_report(runs, question)
    write_text(out / "report.json", json.dumps(report, indent=1))
    print_report(report)
    if options.compact:
        _write_compact(runs, Path(options.compact))
    from hdpo.evaluation.figures import draw, write_tensorboard  # matplotlib takes a second to import

    drawn = draw(report, out)
    write_tensorboard(report, out / "tensorboard", drawn)
    print(f"written to {out}: report.json, {', '.join(path.name for path in drawn)} (and .svg), and tensorboard")
    return 0
