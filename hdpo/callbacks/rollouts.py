"""First station: K completions a prompt, scored (paper, Algorithm 1, lines 2-3)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from hdpo.callbacks.stations import Purpose, StationModule, sample
from hdpo.experience import Completions, Experience, Rollouts, Sequences
from hdpo.functional.random import derive_seeds
from hdpo.generation.engine import SamplingConfig

__all__ = ["RolloutGeneration"]


class RolloutGeneration(Callback):
    """Samples and scores the completions of training, validation and prediction batches.

    Args:
        num_generations: K, completions a prompt in training; at least 2.
        max_new_tokens: token limit of a completion.
        temperature: of the training rollouts; > 0. There is no top-p or top-k: the loss needs the log-probabilities
            of the distribution that was sampled.
        num_val_samples: n, sampled completions a problem in validation; one greedy completion is added.
        val_temperature: of the sampled validation completions.
        val_max_new_tokens: token limit in validation; null for ``max_new_tokens``.
        num_checked_sequences: completions whose log-probabilities are compared with the policy's after each weight
            synchronisation of the engine.
        max_logprob_gap: the run stops when the mean absolute difference (nats a token) exceeds this.
        seed: run seed; set by ``seed_everything``.

    Raises:
        ValueError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        num_generations: int = 16,
        max_new_tokens: int = 3072,
        temperature: float = 1.0,
        num_val_samples: int = 8,
        val_temperature: float = 1.0,
        val_max_new_tokens: int | None = None,
        num_checked_sequences: int = 4,
        max_logprob_gap: float = 0.2,
        seed: int = 42,
    ) -> None:
        if num_generations < 2:
            raise ValueError(
                f"rollouts.num_generations must be at least 2, got {num_generations}: a group's baseline is the mean "
                "of the OTHER rollouts"
            )
        for key, value in (("max_new_tokens", max_new_tokens), ("num_val_samples", num_val_samples)):
            if value < 1:
                raise ValueError(f"rollouts.{key} must be at least 1, got {value}")
        for key, number in (("temperature", temperature), ("val_temperature", val_temperature)):
            if number <= 0:
                raise ValueError(f"rollouts.{key} must be positive, got {number}; greedy accuracy is measured anyway")
        self.num_generations = num_generations
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.num_val_samples = num_val_samples
        self.val_temperature = val_temperature
        self.val_max_new_tokens = val_max_new_tokens or max_new_tokens
        self.num_checked_sequences = num_checked_sequences
        self.max_logprob_gap = max_logprob_gap
        self.seed = seed
        #: Synchronisations of the engine that were checked, and that were checked in a training step, which logs them.
        self._checked_version: int | None = None
        self._logged_version: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a k that the validation samples cannot estimate."""
        largest = max(pl_module.pass_k)
        if largest > self.num_val_samples:
            raise ValueError(
                f"model.pass_k asks for pass@{largest}, but rollouts.num_val_samples is {self.num_val_samples}: "
                f"sample at least {largest} completions a problem, or drop that k"
            )

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int) -> None:
        """Add ``batch.rollouts``."""
        prompts = batch.prompts
        seeds = self._seeds(Purpose.ROLLOUT, trainer.global_step, prompts.index, self.num_generations)
        sampling = self._sampling(pl_module, self.max_new_tokens, self.temperature)
        samples = sample(
            trainer, pl_module, prompts.prompt_ids, prompts.reference, seeds, sampling, batch.statistics, "rollouts"
        )
        version = pl_module.engine.sync_version()
        if version != self._logged_version:
            self._check_sampler(trainer, pl_module, batch, samples.completions, self.temperature)
            self._logged_version = self._checked_version = version
        batch.rollouts = samples.rollouts()
        self._measure(batch, batch.rollouts)

    def _seeds(self, purpose: Purpose, step: int, index: Tensor, num_samples: int) -> Tensor:
        return derive_seeds(self.seed, int(purpose), step, index[:, None], torch.arange(num_samples))

    def _sampling(self, module: StationModule, max_new_tokens: int, temperature: float) -> SamplingConfig:
        eos = {*module.student.eos_token_ids, module.tokenizer.eos_token_id}
        return SamplingConfig(max_new_tokens, temperature, tuple(sorted(eos)))

    def _check_sampler(
        self, trainer: Any, module: StationModule, batch: Experience, completions: Completions, temperature: float
    ) -> None:
        """Compare the engine's log-probabilities with the policy's; stale weights are silent otherwise."""
        num = min(self.num_checked_sequences, len(batch))
        if num == 0:
            return
        ids = [group[0] for group in completions.token_lists()[:num]]
        with trainer.precision_plugin.forward_context():
            logps = module.student.completion_logps(
                Sequences(batch.prompts.prompt_ids[:num], ids),
                # One sequence a pass: all ranks then make the same number, which a sharded policy needs.
                token_budget=1,
                temperature=temperature,
            )
        gaps = torch.cat([(p.float() - completions.logps[i, 0, : len(p)]).abs() for i, p in enumerate(logps)])
        batch.statistics.add("sampler/logprob_gap_mean", gaps.sum(), len(gaps))
        batch.statistics.add("sampler/logprob_gap_max", gaps.max())
        if not gaps.mean() <= self.max_logprob_gap:  # also when it is not a number
            raise RuntimeError(
                f"the sampler's log-probabilities differ from the policy's by {gaps.mean():.3g} nats a token on "
                f"average (rollouts.max_logprob_gap is {self.max_logprob_gap}). Likely causes: the engine still holds "
                "old weights, packed a tied output layer once, or computes in another dtype or with another chat "
                "template"
            )

    def _measure(self, batch: Experience, rollouts: Rollouts) -> None:
        stats, num = batch.statistics, rollouts.rewards.numel()
        stats.add("rollout/reward", rollouts.rewards.sum(), num)
        stats.add("rollout/length", rollouts.completion_mask.sum(), num)
        stats.add("rollout/truncated", rollouts.truncated.sum(), num)
        # E[-log p] of what was sampled is an unbiased estimate of the entropy a token, and needs no forward pass.
        stats.add("rollout/entropy", -rollouts.sampler_logps.sum(), float(rollouts.completion_mask.sum()))
        for source, rewards in zip(batch.prompts.source, rollouts.rewards.tolist(), strict=True):
            stats.add(f"rollout/reward/{source}", sum(rewards), len(rewards))

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, trainer: Any, module: StationModule, batch: Experience) -> None:
        """Add n sampled completions and a greedy one; the seeds are the same at every evaluation.

        Common random numbers make two evaluations of the same problems comparable problem by problem.
        """
        prompts = batch.prompts
        limit = self.val_max_new_tokens
        seeds = self._seeds(Purpose.EVALUATION, 0, prompts.row, self.num_val_samples)
        arguments = (trainer, module, prompts.prompt_ids, prompts.reference)
        sampled = sample(
            *arguments, seeds, self._sampling(module, limit, self.val_temperature), batch.statistics, "rollouts"
        )
        version = module.engine.sync_version()
        if version != self._checked_version:
            self._check_sampler(trainer, module, batch, sampled.completions, self.val_temperature)
            self._checked_version = version
        greedy = sample(*arguments, seeds[:, :1], self._sampling(module, limit, 0.0), batch.statistics, "rollouts")
        batch.rollouts, batch.greedy = sampled.rollouts(), greedy.rollouts()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add ``batch.rollouts`` and ``batch.greedy``."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add ``batch.rollouts`` and ``batch.greedy``."""
        self._evaluate(trainer, pl_module, batch)

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add ``batch.rollouts`` and ``batch.greedy``."""
        self._evaluate(trainer, pl_module, batch)
