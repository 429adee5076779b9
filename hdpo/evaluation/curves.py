"""Evaluations as curves at the step that the evaluated weights have seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast
from weakref import WeakSet

from lightning.pytorch.loggers import TensorBoardLogger

from hdpo.evaluation.runs import class_name

_HPARAMS = (
    *("method", "seed_everything", "model.distillation_weight", "model.teacher", "model.divergence"),
    "model.optimizer.lr",
)
"""What TensorBoard's HParams tab shows of the configuration: it has no room for all of it."""

_shown: WeakSet[Any] = WeakSet()
"""Loggers whose HParams tab is filled."""


def log_configuration(loggers: Iterable[Any], config: Mapping[str, Any]) -> None:
    """Hand the flat configuration of a run (:func:`hdpo.evaluation.runs.flat_config`) to the loggers."""
    for logger in loggers:
        # TensorBoard's HParams need the names of metrics as well, which the first evaluation brings.
        no_metrics: tuple[Any, ...] = ({},) if isinstance(logger, TensorBoardLogger) else ()
        logger.log_hyperparams(dict(config), *no_metrics)


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
        # A class has several paths, such as hdpo.JSD and hdpo.losses.JSD, so goes by its name.
        shown = {n.rpartition(".")[2]: class_name(hparams[n]) or hparams[n] for n in _HPARAMS if n in hparams}
        if shown and logger not in _shown:
            cast(TensorBoardLogger, logger).log_hyperparams(shown, dict(metrics), step)  # which logs the metrics, too
            _shown.add(logger)
        else:
            logger.log_metrics(dict(metrics), step=step)
