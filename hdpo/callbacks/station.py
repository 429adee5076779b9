"""The door for what a user does within a step: callbacks that act between our three stations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from lightning.pytorch import Callback

from hdpo.experience import Experience
from hdpo.generation.engine import GenerationEngine
from hdpo.policy import Policy
from hdpo.rewards import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Moment = Literal["after_prompts", "after_rollouts", "after_cliffs", "after_distillation"]


class Station(Callback):
    """A callback of your own that acts within a training step, after one of ours.

    Override any of the four methods, and name the class in ``trainer.callbacks`` (YAML) or pass it to the Trainer
    (Python). Several act in the order of that list. The experience may be changed in place.

    Example:
        A length penalty. It comes after cliff detection, so that it decides about no cliff::

            class LengthPenalty(Station):
                def __init__(self, per_token: float = 0.001) -> None:
                    self.per_token = per_token

                def after_cliffs(self, trainer, pl_module, batch):
                    lengths = batch.rollouts.completion_mask.sum(-1)
                    batch.rollouts.rewards = batch.rollouts.rewards - self.per_token * lengths
    """

    def after_prompts(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Act before anything is sampled; ``batch.prompts`` is there."""

    def after_rollouts(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Act on scored rollouts; ``batch.rollouts`` has been added."""

    def after_cliffs(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Act when the cliffs are known; ``batch.is_cliff`` has been added."""

    def after_distillation(self, trainer: Any, pl_module: Any, batch: Experience) -> None:
        """Act right before the update; ``batch.privileged`` and ``batch.distillation`` have been added."""


def run_stations(moment: Moment, trainer: Any, module: Any, batch: Experience) -> None:
    """Let the user's stations act."""
    for callback in trainer.callbacks:
        if isinstance(callback, Station):
            getattr(callback, moment)(trainer, module, batch)


class StationModule(Protocol):
    """What our stations need of the LightningModule; they do not import it."""

    engine: GenerationEngine
    verifier: Verifier
    device: torch.device
    seed: int

    @property
    def student(self) -> Policy:
        """The policy that is trained."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
