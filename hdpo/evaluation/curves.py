"""Evaluations as curves at the step that the evaluated weights have seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast
from weakref import WeakSet

from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["log_evaluation"]

_HPARAMS = (
    *("method", "seed_everything", "model.distillation_weight", "model.teacher", "model.divergence"),
    "model.optimizer.lr",
)
"""What TensorBoard's HParams tab shows of the configuration: it has no room for all of it."""

_shown: WeakSet[Any] = WeakSet()
"""Loggers whose HParams tab is filled."""


def log_evaluation(loggers: Iterable[Any], metrics: Mapping[str, float], step: int) -> None:
    """Hand the metrics of an evaluation to the loggers.

    Straight to them: within ``fit``, ``self.log`` would put the evaluation after step n at step n - 1. TensorBoard's
    HParams tab needs the names of the metrics, which the first evaluation brings.

    Args:
        loggers: of the trainer.
        metrics: name -> value.
        step: optimizer steps that the evaluated weights have seen.
    """
    for logger in loggers:
        hparams = getattr(logger, "hparams", {}) if isinstance(logger, TensorBoardLogger) else {}
        shown = {name.rpartition(".")[2]: hparams[name] for name in _HPARAMS if name in hparams}
        if shown and logger not in _shown:
            cast(TensorBoardLogger, logger).log_hyperparams(shown, dict(metrics), step)  # which logs the metrics, too
            _shown.add(logger)
        else:
            logger.log_metrics(dict(metrics), step=step)
