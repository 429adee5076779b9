"""Sample, decode, grade: what training rollouts, privileged rollouts and evaluation have in common."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdpo.callbacks.station import StationModule
from hdpo.experience import Completions, Prompts, Rollouts
from hdpo.functional.random import Purpose, derive_seeds
from hdpo.generation.engine import SamplingConfig
from hdpo.measurements import Measurements, timed
from hdpo.policy import Policy


def sampling_config(module: StationModule, max_new_tokens: int, temperature: float) -> SamplingConfig:
    """Limits and temperature, with every token that ends a completion of this policy."""
    eos = {*module.student.eos_token_ids, module.tokenizer.eos_token_id}
    return SamplingConfig(max_new_tokens, temperature, tuple(sorted(eos)))


def sample_seeds(module: StationModule, purpose: Purpose, step: int, index: Tensor, num_samples: int) -> Tensor:
    """Return the seeds ``[N, num_samples]`` of the samples of prompts at the positions ``index`` ``[N]``."""
    return derive_seeds(module.seed, purpose, step, index[:, None], torch.arange(num_samples))


def sample(
    trainer: Any,
    module: StationModule,
    prompts: Sequence[Sequence[int]],
    seeds: Tensor,
    sampling: SamplingConfig,
    measured: Measurements,
    phase: str,
    drafts: Sequence[str] | None = None,
    policy: Policy | None = None,
) -> Completions:
    """Sample S completions for each of N prompts; they are on the CPU, where all is decided that follows from them.

    Args:
        trainer: whose precision the engine samples in (Lightning enters autocast only around its own steps).
        module: owner of engine and tokenizer.
        prompts: N prompts as token ids.
        seeds: ``[N, S]`` int64.
        sampling: limits and temperature.
        measured: where seconds are counted.
        phase: name of its time and speed, ``time/<phase>`` and ``speed/<phase>``.
        drafts: N texts that the completions may repeat; they only make the engine faster.
        policy: whose weights are sampled; default the module's.
    """
    with timed(measured, phase), trainer.precision_plugin.forward_context():
        guesses = [module.tokenizer.encode(text, add_special_tokens=False) for text in drafts] if drafts else None
        completions = module.engine.generate(policy or module.student, prompts, seeds, sampling, guesses).cpu()
    num_tokens = completions.mask.sum()
    measured.add("spent/completions", seeds.numel(), None)
    measured.add("spent/tokens", num_tokens, None)
    measured.add(f"speed/{phase}", num_tokens, 0.0)
    return completions


def solution_ids(module: StationModule, solution: str) -> list[int]:
    """Return a reference solution as a completion: its tokens and the end of the turn."""
    eos = module.tokenizer.eos_token_id
    assert isinstance(eos, int)
    return [*module.tokenizer.encode(solution, add_special_tokens=False), eos]


def graded(
    module: StationModule,
    completions: Completions,
    prompts: Prompts,
    measured: Measurements,
    positions: Sequence[int] | None = None,
) -> Rollouts:
    """Decode and grade completions.

    Args:
        module: owner of verifier and tokenizer.
        completions: ``[N, S]``.
        prompts: the batch that the N prompts are from.
        measured: where seconds and verifier outcomes are counted.
        positions: of the N prompts in the batch; default all.
    """
    num_prompts, num_samples = completions.truncated.shape
    which = [i for i in (range(num_prompts) if positions is None else positions) for _ in range(num_samples)]
    with timed(measured, "scoring"):
        ids = [ids for group in completions.token_lists() for ids in group]
        measured.add("speed/scoring", sum(map(len, ids)), 0.0)
        texts = module.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
        columns = {"prompts": prompts.problem, **prompts.columns}
        grades = module.verifier.grade(
            texts,
            [prompts.reference[i] for i in which],
            **{name: [values[i] for i in which] for name, values in columns.items()},
        )
    outcomes = [str(grade.outcome.value) for grade in grades]
    for outcome in outcomes:
        measured.add(f"verifier/{outcome}", 1.0, None)
    groups = range(0, len(texts), max(num_samples, 1))
    rollouts = Rollouts(
        completion_ids=completions.ids,
        completion_mask=completions.mask,
        sampler_logps=completions.logps,
        truncated=completions.truncated,
        rewards=torch.tensor([float(g.reward) for g in grades]).view(completions.truncated.shape),
        outcomes=[outcomes[i : i + num_samples] for i in groups],
        texts=[texts[i : i + num_samples] for i in groups],
        parts=[[grade.parts for grade in grades[i : i + num_samples]] for i in groups],
    )
    if grades and not rollouts.has_verdict.any():
        why = ": ".join(filter(None, (outcomes[0], grades[0].detail)))
        warnings.warn(
            f"none of {len(grades)} completions got a verdict (the first: {why}), so nothing is learned from them",
            stacklevel=2,
        )
    return rollouts
