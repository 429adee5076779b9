"""What a run of a Python program was configured with, in the form of the command line's ``config.yaml``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hdpo.evaluation.curves import log_configuration
from hdpo.evaluation.runs import flat_config
from hdpo.files import write_text

_HEADER = (
    "# Of a Python program: what its objects were given, as far as they keep it. For `report`, not for --config.\n"
)
_TRAINER = ("max_steps", "val_check_interval", "precision", "num_devices", "num_nodes")


def described(value: Any) -> Any:
    """Return a value as plain YAML: an object by its class and the arguments that it keeps under their names.

    Example:
        >>> from hdpo.losses import ForwardKL, GeneralizedJSD
        >>> described({"ks": (1, 4), "kl": ForwardKL(), "f": len})
        {'ks': [1, 4], 'kl': {'class_path': 'hdpo.losses.divergence.ForwardKL', 'init_args': {}}, 'f': 'builtins.len'}
        >>> described(GeneralizedJSD(0.25))["init_args"]
        {'teacher_weight': 0.25}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner) for inner in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return {"class_path": described(type(value)), "init_args": arguments(value)}
    except ValueError:  # a type without a signature, such as a number of numpy's
        return str(value)


def arguments(value: Any) -> dict[str, Any]:
    """Return the arguments of an object's constructor that it keeps under their names, as plain YAML."""
    kept = vars(value) if hasattr(value, "__dict__") else {}
    return {name: described(kept[name]) for name in _parameters(type(value)) if name in kept}


def _parameters(kind: type) -> list[str]:
    """Names of the constructor's parameters, with those of the base class that it hands ``**options`` on to."""
    names = dict(inspect.signature(kind).parameters)
    for base in kind.__mro__:
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
            break
        if "__init__" in vars(base):
            names = {n: p for n, p in names.items() if p.kind is not p.VAR_KEYWORD}
            names |= inspect.signature(vars(base)["__init__"]).parameters
    return list(names)


def write_config(folder: Path, trainer: Any, module: Any, stations: Sequence[Any] = ()) -> None:
    """Write ``config.yaml`` into the run's folder, unless there is one, as the command line's; tell the loggers, too.

    Args:
        folder: the run's.
        trainer: with the data module and, in ``fit``, the optimizer.
        module: the LightningModule.
        stations: the user's own, which may change what is trained on.
    """
    path = folder / "config.yaml"
    if path.exists():
        return
    # Both of these are modules, which torch does not keep beside a module's other attributes.
    model = arguments(module) | {"policy": arguments(module.policy_config), "teacher": described(module.teacher)}
    if trainer.optimizers:
        (optimizer, *_) = trainer.optimizers
        model["optimizer"] = {"class_path": described(type(optimizer)), "init_args": described(optimizer.defaults)}
    for wanted in trainer.lr_scheduler_configs[:1]:
        state = wanted.scheduler.state_dict().items()
        kept = {name: value for name, value in state if name not in ("last_epoch", "base_lrs") and name[0] != "_"}
        model["lr_scheduler"] = {"class_path": described(type(wanted.scheduler)), "init_args": described(kept)}
    sections = {name: model.pop(name)["init_args"] for name in ("rollouts", "cliffs", "distillation")}
    data = trainer.datamodule
    sources = {} if data is None else {wanted.name: arguments(wanted.source) for wanted in data.sets}
    config = {
        "seed_everything": model.pop("seed"),
        "model": model,
        **sections,
        "data": ({} if data is None else arguments(data)) | {"sources": sources},
        "trainer": {name: described(getattr(trainer, name)) for name in _TRAINER}
        | ({"callbacks": [described(station) for station in stations]} if stations else {}),
    }
    plain = json.loads(json.dumps(config))  # a number of numpy's is a float, but none to YAML
    write_text(path, _HEADER + yaml.safe_dump(plain, sort_keys=False))
    log_configuration(trainer.loggers, flat_config(plain))
