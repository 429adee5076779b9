"""What the stations share: the module they work for, purposes of random seeds, and sample-decode-grade."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hdpo.experience import Completions, Rollouts, Statistics
from hdpo.generation.engine import GenerationEngine, SamplingConfig
from hdpo.policy import Policy
from hdpo.rewards import PendingGrades, Verifier
from hdpo.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

__all__ = ["GradingSamples", "Purpose", "StationModule", "num_copies", "sample", "timed"]


class Purpose(IntEnum):
    """What random numbers are for; part of every derived seed, so that no two purposes share a stream."""

    ROLLOUT = 1
    PRIVILEGED = 2
    EVALUATION = 3


class StationModule(Protocol):
    """What the stations need of the LightningModule; they do not import it."""

    engine: GenerationEngine
    verifier: Verifier
    teacher: Teacher
    distillation_weight: float
    micro_batch_tokens: int
    device: torch.device

    @property
    def student(self) -> Policy:
        """The policy that is trained."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""


@contextmanager
def timed(statistics: Statistics, name: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to ``time/<name>``."""
    started = time.perf_counter()
    yield
    statistics.add(f"time/{name}", time.perf_counter() - started)


@dataclass
class GradingSamples:
    """Completions whose answers are on their way through the verifier.

    Attributes:
        completions: ``[N, S]``, as the engine returned them.
        texts: the N * S decoded completions.
        pending: their grades.
        statistics: where waiting seconds and verifier outcomes are counted.
    """

    completions: Completions
    texts: list[str]
    pending: PendingGrades
    statistics: Statistics

    def rollouts(self) -> Rollouts:
        """Wait for the grades, and return the scored rollouts ``[N, S]``."""
        with timed(self.statistics, "scoring"):
            grades = self.pending.result()
        outcomes = [str(grade.outcome.value) for grade in grades]
        for outcome in outcomes:
            self.statistics.add(f"verifier/{outcome}", 1.0, None)
        completions = self.completions
        shape = completions.truncated.shape
        groups = range(0, len(self.texts), max(shape[1], 1))
        return Rollouts(
            completion_ids=completions.ids,
            completion_mask=completions.mask,
            sampler_logps=completions.logps,
            truncated=completions.truncated,
            rewards=torch.tensor([g.reward for g in grades], device=completions.ids.device).view(shape),
            outcomes=[outcomes[i : i + shape[1]] for i in groups],
            texts=[self.texts[i : i + shape[1]] for i in groups],
        )


def sample(
    trainer: Any,
    module: StationModule,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    seeds: Tensor,
    sampling: SamplingConfig,
    statistics: Statistics,
    station: str,
    drafts: Sequence[str] | None = None,
) -> GradingSamples:
    """Sample S completions for each of N prompts, decode them and begin to grade them.

    Args:
        trainer: whose precision the engine samples in (Lightning enters autocast only around its own steps).
        module: owner of engine, verifier and tokenizer.
        prompts: N prompts as token ids.
        references: N expected answers.
        seeds: ``[N, S]`` int64.
        sampling: limits and temperature.
        statistics: where seconds and verifier outcomes are counted.
        station: name of the sampling time, ``time/<station>``.
        drafts: N texts that the completions may repeat; they only make the engine faster.

    Returns:
        The completions; their :meth:`GradingSamples.rollouts` waits for the grades.
    """
    with timed(statistics, station), trainer.precision_plugin.forward_context():
        guesses = [module.tokenizer.encode(text, add_special_tokens=False) for text in drafts] if drafts else None
        completions = module.engine.generate(module.student, prompts, seeds, sampling, guesses)
    with timed(statistics, "scoring"):
        num_samples = seeds.shape[1]
        ids = [sample for group in completions.token_lists() for sample in group]
        texts = module.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
        pending = module.verifier.submit(texts, [r for r in references for _ in range(num_samples)])
    return GradingSamples(completions, texts, pending, statistics)


def num_copies(texts: Sequence[str], solutions: Sequence[str]) -> int:
    r"""Number of texts that equal their reference solution up to white space.

    Example:
        >>> num_copies(["1+1=2.\nSo 2", "2"], ["1+1=2. So 2", "So 2"])
        1
    """
    return sum(" ".join(t.split()) == " ".join(s.split()) for t, s in zip(texts, solutions, strict=True))
