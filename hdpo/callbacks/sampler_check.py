"""Does the engine sample from the policy's weights? Exactly where it shows them, and by log-probabilities elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from hdpo.callbacks.station import StationModule
from hdpo.errors import TrainingStopped
from hdpo.experience import Completions, Experience, Sequences
from hdpo.generation.weights import weight_rows
from hdpo.measurements import timed

#: A gap is judged by the smallest of the first ones: a gap of more than so many times that one is none of rounding.
_FACTOR, _NUM_FIRST = 10.0, 5
#: Below these mean gaps (nats per token) nothing is said: kernels that compute in another order differ by as much.
_NOISE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


class StaleSamplerError(TrainingStopped):
    """The engine does not sample from the policy's weights."""


class SamplerCheck:
    """Compares what an engine samples from with the policy.

    Where the engine shows some of its weights (:meth:`~hdpo.generation.GenerationEngine.held_weights`) they must equal
    the policy's, bit for bit after the cast, in every step. And after each synchronisation the log-probabilities that
    it reports must be as near to the policy's as they were when the run began.

    Args:
        num_sequences: completions whose log-probabilities are compared.
        max_gap: bound on the mean absolute difference (nats per token), whatever the first gaps were.
    """

    def __init__(self, num_sequences: int, max_gap: float) -> None:
        self.num_sequences, self.max_gap = num_sequences, max_gap
        #: What is rounding in this run; a checkpoint holds them, since an engine is often stale right after a resume.
        self.first_gaps: list[float] = []
        #: Synchronisations whose gap was measured: at all, and in a training step, which logs it.
        self._measured_version: int | None = None
        self._logged_version: int | None = None

    def __call__(
        self,
        trainer: Any,
        module: StationModule,
        batch: Experience,
        completions: Completions,
        temperature: float,
        *,
        in_step: bool,
    ) -> None:
        """Check the engine after it has sampled ``completions`` for a batch.

        Args:
            trainer: whose precision the policy computes in.
            module: owner of policy and engine.
            batch: whose plain prompts were sampled.
            completions: what the engine has returned.
            temperature: of the completions.
            in_step: whether this is a training step, which logs what is measured, or an evaluation.

        Raises:
            StaleSamplerError: it samples from other weights.
            TrainingStopped: the policy's own log-probabilities are not finite.
        """
        self._compare_weights(module, batch)
        version = module.engine.sync_version()
        if version == (self._logged_version if in_step else self._measured_version):
            return
        self._measure_gap(trainer, module, batch, completions, temperature)
        self._measured_version = version
        if in_step:
            self._logged_version = version

    def _compare_weights(self, module: StationModule, batch: Experience) -> None:
        held = module.engine.held_weights()
        for name, theirs in held.items():
            mine = weight_rows(module.student, name, len(theirs)).to(theirs)
            if not torch.equal(mine.view(torch.uint8), theirs.contiguous().view(torch.uint8)):
                raise StaleSamplerError(
                    f"the sampler's {name} is not the policy's: they differ by up to "
                    f"{(mine.double() - theirs.double()).abs().max():.3g}. The engine has not taken over the weights "
                    "of the last update"
                )
        if held:
            batch.measurements.add("sampler/tensors_compared", len(held))

    def _measure_gap(
        self, trainer: Any, module: StationModule, batch: Experience, completions: Completions, temperature: float
    ) -> None:
        num = min(self.num_sequences, len(batch))
        if num == 0:
            return
        ids = [group[0] for group in completions.token_lists()[:num]]
        batch.measurements.add("speed/sampler_check", sum(map(len, ids)), 0.0)
        with timed(batch.measurements, "sampler_check"), trainer.precision_plugin.forward_context():
            dtype = module.student.compute_dtype
            logps = module.student.completion_logps(
                Sequences(batch.prompts.prompt_ids[:num], ids),
                # One sequence per pass: all ranks then make the same number, which a sharded policy needs.
                token_budget=1,
                temperature=temperature,
            )
        logps = [p.cpu() for p in logps]
        if not all(bool(p.isfinite().all()) for p in logps):
            raise TrainingStopped(
                f"the policy's log-probabilities are not finite after step {trainer.global_step}: training has "
                "diverged; lower the learning rate, and start anew or from an earlier checkpoint"
            )
        gaps = torch.cat([(p.float() - completions.logps[i, 0, : len(p)]).abs() for i, p in enumerate(logps)])
        batch.measurements.add("sampler/logprob_gap_mean", gaps.sum(), len(gaps))
        batch.measurements.add("sampler/logprob_gap_max", gaps.max())
        gap = float(gaps.mean())
        limit = self.max_gap
        if self.first_gaps:
            limit = min(limit, max(_FACTOR * min(self.first_gaps), _NOISE[dtype]))
        if not gap <= limit:  # also when it is not a number
            raise StaleSamplerError(
                f"the sampler's log-probabilities differ from the policy's by {gap:.3g} nats per token on average; "
                f"{limit:.3g} would be rounding in this run (rollouts.max_logprob_gap is {self.max_gap}). Likely "
                "causes: the engine still holds old weights, packed a tied output layer once, or computes in another "
                "dtype or with another chat template"
            )
        if len(self.first_gaps) < _NUM_FIRST:
            self.first_gaps.append(gap)
