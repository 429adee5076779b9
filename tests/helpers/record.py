"""What happened in a run: every call of the engine, every step, and the module itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdpo.experience import Completions, Experience
from hdpo.generation import TransformersEngine
from tests.helpers.reference import Sampled, flat

__all__ = ["Captured", "Recorder", "Step", "StepTape", "StopAtStart"]


class Recorder(TransformersEngine):
    """Keeps what was sampled. ``bias`` shifts the log-probabilities that it reports, as other kernels would."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = bias
        self.calls: list[Sampled] = []
        self.seeds: list[Tensor] = []

    def generate(self, policy, prompts, seeds, sampling, drafts=None) -> Completions:
        out = super().generate(policy, prompts, seeds, sampling, drafts)
        if self.bias:
            out = replace(out, logps=out.logps - self.bias * (out.ids % 3 - 1) * out.mask)
        logps = [
            [row[mask].tolist() for row, mask in zip(*group, strict=True)]
            for group in zip(out.logps, out.mask, strict=True)
        ]
        call = Sampled(
            [list(p) for p in prompts], sampling.temperature, out.token_lists(), logps, out.truncated.tolist()
        )
        self.calls.append(call)
        self.seeds.append(seeds.clone())
        return out


@dataclass
class Step:
    """One step: what the stations made of it, what was logged, the weights after it, and the engine's calls in it."""

    batch: Experience
    logged: dict[str, float]
    weights: Tensor
    calls: list[Sampled]


class StepTape(Callback):
    """Keeps each step of a run whose engine is a :class:`Recorder`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        calls, pl_module.engine.calls = pl_module.engine.calls, []
        self.steps.append(Step(batch, dict(batch.metrics), flat(pl_module.student), calls))


class Captured(StepTape):
    """Named in YAML, it lets a test look at the module and the trainer that the command line built."""

    last: ClassVar[Captured]
    module: LightningModule
    trainer: Trainer

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        type(self).last = Captured.last = self
        self.module, self.trainer = pl_module, trainer

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if isinstance(pl_module.engine, Recorder):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class StopAtStart(Captured):
    """The same, for a test that wants to see no more than what was built."""

    class Stopped(Exception):
        """Nothing is trained."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise self.Stopped
