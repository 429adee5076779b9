"""What flows through one training step: a single container that each station completes and none rewrites.

``Experience`` is yielded by the data module with its prompts, then completed in place::

    OpenMathDataModule    yields  Experience(prompts)
      RolloutGeneration   adds    .rollouts       K scored completions per prompt
      CliffDetection      adds    .is_cliff       which prompts have no success at all
      DistillationRefresh adds    .privileged     scored privileged rollouts of the cliffs
                                  .distillation   the correct ones, with the teacher's top-k
    HDPOModule.training_step reads them all, and adds .metrics

It holds data and nothing else. Groups are positions: everything that belongs to a prompt sits at its index in the
batch, and nothing is ever looked up by the prompt's text (two equal problems in a batch are two groups).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hdpo.experience.prompts import EvaluationSampling, Prompts
from hdpo.experience.rollouts import Completions, PrivilegedRollouts, Rollouts, join_rollouts
from hdpo.experience.sequences import DistillationBatch, Sequences, merge_equal
from hdpo.measurements import Measurements

__all__ = [
    "Completions",
    "DistillationBatch",
    "EvaluationSampling",
    "Experience",
    "PrivilegedRollouts",
    "Prompts",
    "Rollouts",
    "Sequences",
    "join_rollouts",
    "merge_equal",
]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Sequences):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass
class Experience:
    """Everything that one step carries, from prompts to loss inputs. See the module's docstring for who adds what.

    Attributes:
        prompts: the batch as the data module yields it.
        rollouts: K completions per prompt, scored (training), or n samples (validation).
        greedy: one greedy completion per prompt, ``num_generations`` = 1 (validation only).
        is_cliff: ``[B]`` bool, True where every rollout of the prompt failed.
        off_policy: one more member for the groups of cliffs, which the policy did not write: ``num_generations`` = 1,
            the reference solution; a group without one has no verdict on it. None where there are no such members.
        privileged: privileged rollouts of this step's cliffs; None where none were sampled.
        distillation: what is distilled in this step; None where there is nothing on any rank.
        started: ``time.perf_counter()`` when the first station began; None before.
        measurements: what every station measured in this step.
        metrics: name -> value of the finished step, over all ranks: what is logged.
    """

    prompts: Prompts
    rollouts: Rollouts | None = None
    greedy: Rollouts | None = None
    is_cliff: Tensor | None = None
    off_policy: Rollouts | None = None
    privileged: PrivilegedRollouts | None = None
    distillation: DistillationBatch | None = None
    started: float | None = None
    measurements: Measurements = field(default_factory=Measurements)
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def as_plain_data(self) -> dict[str, Any]:
        """Return everything but the measurements as dictionaries, lists, tensors and plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "measurements"}

    def to(self, device: torch.device | str, **_: object) -> Experience:
        """Return self: prompts and rollouts stay on the CPU; micro-batches go to the policy's device."""
        return self
