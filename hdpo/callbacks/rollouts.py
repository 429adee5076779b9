"""First station: K completions per prompt, scored (paper, Algorithm 1, lines 2-3)."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback

from hdpo.callbacks.sampler_check import SamplerCheck
from hdpo.callbacks.sampling import graded, sample, sample_seeds, sampling_config
from hdpo.callbacks.station import StationModule, run_stations
from hdpo.distributed import all_max
from hdpo.errors import ConfigError, check_at_least, check_positive
from hdpo.experience import Experience, Rollouts, join_rollouts
from hdpo.functional import has_variance
from hdpo.functional.random import Purpose, derive_seeds
from hdpo.rewards import Outcome


class RolloutGeneration(Callback):
    """Samples and scores the completions of training, validation and prediction batches.

    Args:
        num_generations: K, completions per prompt in training; at least 2.
        max_new_tokens: token limit of a completion.
        temperature: of the training rollouts; > 0. The policy loss uses the same, since its log-probabilities must be
            those of the distribution that was sampled; for the same reason there is no top-p or top-k.
        num_val_samples: n, sampled completions per problem in validation; one greedy completion is added.
        val_temperature: of the sampled validation completions.
        val_max_new_tokens: token limit in validation; null for ``max_new_tokens``.
        max_resamples: how many times a step may exchange the prompts whose groups have no variance for others, drawn at
            random from the training problems, and sample again (dynamic sampling: DAPO, arXiv 2503.14476, section
            3.2, within a budget). Where the budget is used up, groups without variance stay.
        num_checked_sequences: completions whose log-probabilities are compared with the policy's after each weight
            synchronisation of the engine.
        max_logprob_gap: the run stops when the mean absolute difference (nats per token) exceeds this, or ten times
            the smallest of its first five.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        num_generations: int = 16,
        max_new_tokens: int = 3072,
        temperature: float = 1.0,
        num_val_samples: int = 8,
        val_temperature: float = 1.0,
        val_max_new_tokens: int | None = None,
        max_resamples: int = 0,
        num_checked_sequences: int = 4,
        max_logprob_gap: float = 0.2,
    ) -> None:
        if num_generations < 2:
            raise ConfigError(
                f"rollouts.num_generations must be at least 2, got {num_generations}: a group's baseline is the mean "
                "of the OTHER rollouts"
            )
        check_at_least(
            1,
            rollouts__max_new_tokens=max_new_tokens,
            rollouts__num_val_samples=num_val_samples,
            rollouts__val_max_new_tokens=val_max_new_tokens,
        )
        check_at_least(0, rollouts__num_checked_sequences=num_checked_sequences, rollouts__max_resamples=max_resamples)
        check_positive(
            rollouts__temperature=temperature,
            rollouts__val_temperature=val_temperature,
            rollouts__max_logprob_gap=max_logprob_gap,
        )
        self.num_generations = num_generations
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.num_val_samples = num_val_samples
        self.val_temperature = val_temperature
        self.val_max_new_tokens = val_max_new_tokens or max_new_tokens
        self.max_resamples = max_resamples
        self.check_sampler = SamplerCheck(num_checked_sequences, max_logprob_gap)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a k that the validation samples cannot estimate, and to exchange cliffs that are to be distilled."""
        if self.max_resamples and (pl_module.distillation_weight > 0 or pl_module.privileged_policy_weight > 0):
            raise ConfigError(
                "rollouts.max_resamples exchanges the cliffs for other prompts, so that nothing is left to distil: set "
                "it to 0, or model.distillation_weight and model.privileged_policy_weight to 0"
            )
        largest = max(pl_module.pass_k)
        groups = getattr(getattr(trainer, "datamodule", None), "evaluation_groups", {})
        own = [number for number in groups.values() if number]
        if stage != "predict" and largest > max([self.num_val_samples, *own]):
            raise ConfigError(
                f"model.pass_k asks for pass@{largest}, but rollouts.num_val_samples is {self.num_val_samples}: "
                f"sample at least {largest} completions per problem, or drop that k"
            )

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int) -> None:
        """Add ``batch.rollouts``."""
        batch.started = time.perf_counter()
        run_stations("after_prompts", trainer, pl_module, batch)
        prompts = batch.prompts
        seeds = sample_seeds(pl_module, Purpose.ROLLOUT, trainer.global_step, prompts.index, self.num_generations)
        sampling = sampling_config(pl_module, self.max_new_tokens, self.temperature)
        completions = sample(trainer, pl_module, prompts.prompt_ids, seeds, sampling, batch.measurements, "rollouts")
        self.check_sampler(trainer, pl_module, batch, completions, self.temperature, in_step=True)
        batch.rollouts = graded(pl_module, completions, prompts, batch.measurements)
        for number in range(1, self.max_resamples + 1):
            self._resample(trainer, pl_module, batch, number)
        self._measure(batch, batch.rollouts)
        run_stations("after_rollouts", trainer, pl_module, batch)

    def _resample(self, trainer: Any, module: StationModule, batch: Experience, number: int) -> None:
        """Exchange prompts whose groups have no variance for others that have, where the other ones do."""
        rollouts = batch.rollouts
        assert rollouts is not None
        positions = (~has_variance(rollouts.rewards, rollouts.has_verdict)).nonzero()[:, 0].tolist()
        if not all_max([len(positions)], module.device)[0]:
            return
        index = batch.prompts.index[positions]
        dataset = trainer.datamodule.dataset("train")
        draws = derive_seeds(module.seed, Purpose.RESAMPLING, trainer.global_step, number, index)
        others = dataset.prompts((draws % len(dataset)).tolist(), index.tolist())
        seeds = derive_seeds(
            module.seed,
            Purpose.ROLLOUT,
            trainer.global_step,
            index[:, None],
            torch.arange(self.num_generations) + number * self.num_generations,
        )
        sampling = sampling_config(module, self.max_new_tokens, self.temperature)
        completions = sample(trainer, module, others.prompt_ids, seeds, sampling, batch.measurements, "rollouts")
        new = graded(module, completions, others, batch.measurements)
        better = has_variance(new.rewards, new.has_verdict).nonzero()[:, 0].tolist()
        batch.measurements.add("rollout/exchanged", len(better), None)
        places = {positions[i]: len(batch) + i for i in better}
        batch.rollouts = join_rollouts(rollouts, new).select([places.get(i, i) for i in range(len(batch))])
        chosen = dataset.prompts([int(others.row[i]) for i in better], [int(index[i]) for i in better])
        batch.prompts = batch.prompts.with_others([positions[i] for i in better], chosen)

    def _measure(self, batch: Experience, rollouts: Rollouts) -> None:
        measured, num = batch.measurements, rollouts.rewards.numel()
        valid = rollouts.has_verdict
        rewards = rollouts.rewards.masked_fill(~valid, 0.0)
        measured.add("rollout/reward", rewards.sum(), float(valid.sum()))
        # Of each group, as a sample: the scale of its advantages.
        graded, lengths = valid.sum(-1), rollouts.completion_mask.sum(-1)
        deviations = (rewards - rewards.sum(-1, keepdim=True) / graded[:, None].clamp(min=1)) * valid
        deviation = (deviations.square().sum(-1) / (graded - 1).clamp(min=1)).sqrt()
        measured.add("rollout/reward_std", deviation.sum(), (graded > 1).sum())
        measured.add("rollout/length", lengths.sum(), num)
        measured.add("rollout/terminated_length", lengths[~rollouts.truncated].sum(), (~rollouts.truncated).sum())
        measured.add("rollout/truncated", rollouts.truncated.sum(), num)
        outcomes = [outcome for group in rollouts.outcomes for outcome in group]
        for outcome in Outcome:
            measured.add(f"rollout/{outcome}", outcomes.count(outcome), num)
        # E[-log p] of what was sampled is an unbiased estimate of the entropy per token, and needs no forward pass.
        measured.add("rollout/entropy", -rollouts.sampler_logps.sum(), float(rollouts.completion_mask.sum()))
        for source, total, count in zip(
            batch.prompts.source, rewards.sum(-1).tolist(), valid.sum(-1).tolist(), strict=True
        ):
            measured.add(f"rollout_by_source/reward/{source}", total, count)
        for judged, parts in zip(valid.flatten().tolist(), chain.from_iterable(rollouts.parts), strict=False):
            for name, value in parts.items() if judged else ():
                measured.add(f"reward/{name}", value)

    # ------------------------------------------------------------------ evaluation

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add ``batch.rollouts``, n sampled completions, and ``batch.greedy``; the seeds are those of every evaluation.

        Common random numbers make two evaluations of the same problems comparable problem by problem.
        """
        prompts, measured = batch.prompts, batch.measurements
        own = prompts.sampling  # of a named evaluation source
        num_samples, temperature = own.num_samples or self.num_val_samples, own.temperature or self.val_temperature
        max_new_tokens = own.max_new_tokens or self.val_max_new_tokens
        seeds = sample_seeds(pl_module, Purpose.EVALUATION, 0, prompts.row, num_samples)
        sampling = sampling_config(pl_module, max_new_tokens, temperature)
        sampled = sample(trainer, pl_module, prompts.prompt_ids, seeds, sampling, measured, "rollouts")
        self.check_sampler(trainer, pl_module, batch, sampled, temperature, in_step=False)
        sampling = sampling_config(pl_module, max_new_tokens, 0.0)
        greedy = sample(trainer, pl_module, prompts.prompt_ids, seeds[:, :1], sampling, measured, "rollouts")
        batch.rollouts, batch.greedy = (graded(pl_module, c, prompts, measured) for c in (sampled, greedy))
        batch.rollouts.seeds, batch.rollouts.temperature = seeds, temperature
        batch.greedy.seeds, batch.greedy.temperature = seeds[:, :1], 0.0

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """The first gaps between engine and policy, by which later ones are judged; those of rank 0 do for all."""
        return {"first_gaps": self.check_sampler.first_gaps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Judge by them."""
        self.check_sampler.first_gaps = list(state_dict["first_gaps"])
