"""Runs on disk: what was trained with which configuration and seed, and every evaluation of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hdpo.errors import ConfigError
from hdpo.evaluation.provenance import read_provenance
from hdpo.evaluation.records import Evaluation, evaluation_files, read_gzip, read_records, write_gzip

__all__ = [
    "ARM_FILE",
    "WEIGHT",
    "Run",
    "class_name",
    "find_runs",
    "flat_config",
    "is_within",
    "name_settings",
    "write_compact",
]

WEIGHT = "model.distillation_weight"
"""The key of lambda, by which runs are sorted; 0 is GRPO."""

ARM_FILE = "sweep.json"
"""Written by ``sweep`` into a run's folder; its ``arm`` names the overlay that the run is of."""

_COMPACT = ".run.jsonl.gz"

_CLASS = re.compile(r"(?:\w+\.)+([A-Z]\w*)")

# Seeds, paths of what is written, and what is only shown: runs that differ in these alone are repetitions.
_ASIDE = (
    *("seed_everything", "model.seed", "data.seed", "ckpt_path", "resume", "data.cache_dir"),
    *("trainer.logger", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.log_every_n_steps", "trainer.enable_checkpointing"),
    "trainer.max_epochs",  # how far a run went is seen from its evaluations
    "verbose",  # of validate and test alone
    *("samples", "progress", "checkpoint", "best_checkpoint", "export", "predictions", "evaluation"),
)
_WITHOUT_DISTILLATION = ("distillation", "model.teacher", "model.divergence")
"""Sections without influence where nothing is distilled."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of ``fit`` (or ``validate``, ``test``).

    Attributes:
        folder: where ``config.yaml`` and ``evaluations`` are, or the compact file.
        config: the resolved configuration, flat: dotted key -> value; a class stands at its own key.
        arm: the overlay's name, where ``sweep --arms`` made the run.
        evaluations: ``(split, step)`` -> what was found.
        provenance: what ``provenance.json`` holds.
    """

    folder: Path
    config: dict[str, Any]
    arm: str | None
    evaluations: dict[tuple[str, int], Evaluation]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """``seed_everything``."""
        return int(self.config["seed_everything"])

    @property
    def weight(self) -> float:
        """``model.distillation_weight``; 0 is without distillation."""
        return float(self.config[WEIGHT])

    @property
    def pass_k(self) -> tuple[int, ...]:
        """The k of pass@k that the run was configured with."""
        return tuple(self.config.get("model.pass_k", (1, 4, 8)))

    def of_split(self, split: str) -> dict[int, Evaluation]:
        """The evaluations on a split, by step."""
        return {step: found for (name, step), found in sorted(self.evaluations.items()) if name == split}

    def spent(self, split: str, step: int) -> dict[str, Any]:
        """What had been spent at an evaluation, and means over the steps before it; empty where it is not known."""
        return dict(self.provenance.get("evaluations", {}).get(f"{split}/{step}", {}))

    def influences(self) -> dict[str, Any]:
        """The configuration without what cannot change the result; a class has several paths, so goes by its name."""
        aside: tuple[str, ...] = _ASIDE
        privileged = [v for key, v in self.config.items() if "privileged" in key and key.endswith("_weight")]
        if self.weight == 0 and not any(privileged):
            aside += _WITHOUT_DISTILLATION
        found = {key: value for key, value in self.config.items() if not is_within(key, aside)}
        return {key: class_name(value) or value for key, value in found.items()}


class _ClassName(str):
    """The name of a class, told from other texts by its type."""


def class_name(value: Any) -> _ClassName | None:
    """The name of the class that a value of the configuration names by its path; None for any other value."""
    found = _CLASS.fullmatch(value) if isinstance(value, str) else None
    return _ClassName(found[1]) if found else None


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``sections``, or in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flat_config(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys; ``{class_path, init_args}`` as the class, with its arguments below it.

    Example:
        >>> flat_config({"model": {"loss": {"class_path": "my.Loss", "init_args": {"scale": 2}}}})
        {'model.loss': 'my.Loss', 'model.loss.scale': 2}
    """
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    if "class_path" in value:
        found[prefix] = value["class_path"]
        value = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    for key, inner in value.items():
        found |= flat_config(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _checked(path: Path, config: Any) -> dict[str, Any]:
    """The flat configuration, if it is one of an hdpo run."""
    flat = flat_config(config)
    for key, kind in ((WEIGHT, float), ("seed_everything", int)):
        if key not in flat:
            raise ConfigError(f"{path}: has no key {key!r}, so it is not the configuration of an hdpo run")
        try:
            kind(flat[key])
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: {key} is not a number, but {flat[key]!r}") from None
    return flat


def _load(folder: Path, files: Sequence[Path]) -> Run:
    path = folder / "config.yaml"
    try:
        config = _checked(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path}: is not YAML; restore it, or leave the run {folder} out") from None
    found = [read_records(file) for file in files]
    return Run(folder, config, _arm(folder), {(e.split, e.step): e for e in found}, read_provenance(folder))


def _arm(folder: Path) -> str | None:
    path = folder / ARM_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("arm")
    except (ValueError, AttributeError):
        raise ConfigError(f"{path}: is not what sweep writes; restore it, or remove the run") from None


# ---------------------------------------------------------------------- compact files: verdicts without texts

_KEPT = ("cliff/fraction", "privileged/pass_rate", "privileged/kept", "privileged/copy_rate", "rollout/reward")


def write_compact(run: Run, path: Path) -> None:
    """Write a run's verdicts, configuration and provenance as one file of a few KB, which :func:`find_runs` reads.

    Of folders that something was written to the name is kept alone: where they lie is one machine's business.

    Args:
        run: the run.
        path: the file, without its ending ``.run.jsonl.gz``.
    """
    spent = run.provenance.get("evaluations", {})
    recent = {k: {n: v for n, v in e.get("recent", {}).items() if n in _KEPT} for k, e in spent.items()}
    provenance = run.provenance | {"evaluations": {k: e | {"recent": recent[k]} for k, e in spent.items()}}
    config = {
        key: Path(value).name
        if isinstance(value, str) and Path(value).is_absolute() and is_within(key, _ASIDE)
        else value
        for key, value in run.config.items()
    }
    rows: list[dict[str, Any]] = [{"config": config, "arm": run.arm, "provenance": provenance}]
    known: set[str] = set()
    for evaluation in run.evaluations.values():
        row: dict[str, Any] = dict(vars(evaluation))
        if evaluation.problems in known:
            del row["rows"], row["sources"]
        known.add(evaluation.problems)
        rows.append(row)
    write_gzip(path.with_name(path.name + _COMPACT), rows)


def _load_compact(path: Path) -> Run:
    (_, head), *rows = read_gzip(path)
    evaluations: dict[tuple[str, int], Evaluation] = {}
    problems: dict[str, dict[str, Any]] = {}
    try:
        number = 1
        config, arm, provenance = head["config"], head["arm"], head["provenance"]
        for number, row in rows:  # noqa: B007 - the message names it
            shared = problems.setdefault(
                row["problems"], {name: row[name] for name in ("rows", "sources") if name in row}
            )
            whole = row | shared
            whole["rows"] = tuple((str(name), int(row)) for name, row in whole["rows"])
            whole |= {name: tuple(map(str, whole[name])) for name in ("sources", "samples")}
            found = Evaluation(**{name: whole[name] for name in Evaluation.__dataclass_fields__})
            if len({len(found.rows), len(found.sources), len(found.samples), len(found.greedy)}) != 1:
                raise ValueError
            if set("".join(found.samples) + found.greedy) - set("01?"):
                raise ValueError
            evaluations[found.split, found.step] = found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path}, line {number}: is not what `report --compact` writes; write it again") from None
    return Run(path, _checked(path, config), arm, evaluations, provenance)


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Find and read all runs in the folders, at any depth.

    Args:
        paths: folders of runs or of compact files, or of folders of these.

    Returns:
        The runs, by weight, arm, seed and folder.

    Raises:
        ConfigError: a folder does not exist, none holds a run, or a run's files are broken.
    """
    folders: dict[Path, list[Path]] = {}
    compact: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConfigError(f"{path}: there is no such folder")
        for config in sorted(path.rglob("config.yaml")):
            files = [f for part in ("evaluations", "tests") for f in evaluation_files(config.parent / part).values()]
            if files:
                folders.setdefault(config.parent.resolve(), [config.parent, *files])
        compact |= {file.resolve(): file for file in sorted(path.rglob(f"*{_COMPACT}"))}
    if not folders and not compact:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: there is no run here (a folder with config.yaml and "
            f"evaluations/step_*.jsonl.gz, or a file *{_COMPACT}); name a folder that `python -m hdpo fit` wrote"
        )
    runs = [_load(folder, files) for folder, *files in folders.values()] + [_load_compact(f) for f in compact.values()]
    return sorted(runs, key=lambda r: (r.weight, r.arm or "", r.seed, str(r.folder)))


# ---------------------------------------------------------------------- settings


def _varied(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys in which some configurations differ, or that some lack (other than for distilling nothing)."""
    names = dict.fromkeys(name for config in configs for name in config)
    found = []
    for name in names:
        asked = [c for c in configs if name in c or c.get(WEIGHT) or not is_within(name, _WITHOUT_DISTILLATION)]
        if any(c.get(name, ...) != asked[0].get(name, ...) for c in asked):
            found.append(name)
    return found


def _parts(config: dict[str, Any], keys: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    """How a label says what a configuration has at some keys."""
    parts: list[str] = []
    for key in sorted(keys, key=lambda k: (k != WEIGHT, k)):
        owner = max((k for k in keys if key.startswith(f"{k}.")), key=len, default=None)
        if owner is not None:  # an argument of a class that also differs: said where it is not the class's only value
            same = [c for c in configs if c.get(owner) == config.get(owner)]
            if not _varied([{key: c.get(key)} for c in same]):
                continue
        if key in config:
            value = config[key]
            if isinstance(value, _ClassName):
                parts.append(value)
            else:
                parts.append(f"{_short(key, keys)} {_text(value)}")
    return parts


def _short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key shares."""
    if key == WEIGHT:
        return "weight"
    names = key.split(".")
    for i in range(len(names) - 1, 0, -1):
        end = ".".join(names[i:])
        if not any(other != key and other.endswith(f".{end}") for other in keys):
            return end
    return key


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).rstrip("/").rpartition("/")[2] if isinstance(value, str) else json.dumps(value)


def name_settings(runs: Sequence[Run], aside: Sequence[str] = ()) -> tuple[list[str], list[dict[str, Any]]]:
    """What each run is a repetition of: every key in which the runs differ, seeds and output aside.

    Args:
        runs: what is compared.
        aside: more keys (or sections) in which runs of one setting may differ, as in their seed.

    Returns:
        For each run the label of its setting, and its values of the keys that differ. The label is the arm's name
        where that says it all.
    """
    configs = [{k: v for k, v in run.influences().items() if not is_within(k, aside)} for run in runs]
    # An option that is off (0 too) in some runs and missing in others came with a later version, and is off in all of
    # them. Not so an argument of a user's own function, whose default is not known.
    kept = set.intersection(*map(set, configs)) if configs else set()
    kept |= {key for config in configs for key in config if "kwargs" in key.split(".")}
    configs = [{k: v for k, v in c.items() if k in kept or v not in (None, False)} for c in configs]
    keys = _varied(configs)
    identities = [json.dumps({k: c[k] for k in keys if k in c}, sort_keys=True) for c in configs]
    labels: dict[str, str] = {}
    for run, config, identity in zip(runs, configs, identities, strict=True):
        arms = {r.arm for r, other in zip(runs, identities, strict=True) if other == identity}
        if identity in labels:
            continue
        if len(arms) == 1 and run.arm is not None:
            own = [c for r, c in zip(runs, configs, strict=True) if r.arm == run.arm]
            label = ", ".join([run.arm, *_parts(config, _varied(own), own)])
        else:
            label = ", ".join(_parts(config, keys, configs) or _parts(config, [WEIGHT], configs))
        same = sum(label == other.partition(" #")[0] for other in labels.values())
        labels[identity] = f"{label} #{same + 1}" if same else label
    return [labels[i] for i in identities], [{k: c[k] for k in keys if k in c} for c in configs]
