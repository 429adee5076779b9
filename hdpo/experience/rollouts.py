"""Completions, with verdicts and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

VERDICTS = ("correct", "wrong", "no_answer")
"""Outcomes that say something about a completion; the others say something about the verifier."""


@dataclass
class Completions:
    """S completions for each of N prompts, as an engine returns them.

    Attributes:
        ids: sampled token ids, ``[N, S, T]`` int64, padded on the right; the end-of-sequence token is included.
        mask: ``[N, S, T]`` bool, True where a token was sampled.
        logps: log-probability (nats) of each sampled token under the distribution that it was sampled from,
            ``[N, S, T]`` float32, 0 outside the mask.
        truncated: ``[N, S]`` bool, True where the token limit ended the completion, not an end-of-sequence token.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    truncated: Tensor

    def cpu(self) -> Completions:
        """Return these completions on the CPU."""
        return Completions(self.ids.cpu(), self.mask.cpu(), self.logps.cpu(), self.truncated.cpu())

    def token_lists(self) -> list[list[list[int]]]:
        """Return the sampled ids without padding, as nested lists ``[N][S][length]``."""
        return _token_lists(self.ids, self.mask)


def _token_lists(ids: Tensor, mask: Tensor) -> list[list[list[int]]]:
    lengths = mask.sum(-1).tolist()
    return [
        [row[:n] for row, n in zip(group, ns, strict=True)] for group, ns in zip(ids.tolist(), lengths, strict=True)
    ]


@dataclass
class Rollouts:
    """K scored completions per prompt, on the CPU: what is trained on them is decided without waiting for a GPU.

    Attributes:
        completion_ids: ``[B, K, T]`` int64, padded on the right.
        completion_mask: ``[B, K, T]`` bool, True for a token that is trained.
        sampler_logps: ``[B, K, T]`` float32, log-probabilities (nats) reported by the sampler.
        truncated: ``[B, K]`` bool.
        rewards: ``[B, K]`` float32, what is trained on; without a meaning where there is no verdict.
        outcomes: ``[B][K]`` verifier outcomes (values of :class:`hdpo.rewards.Outcome`).
        texts: ``[B][K]`` decoded completions.
        seeds: ``[B, K]`` int64, what each was drawn with (evaluation only).
        temperature: that each was drawn at (evaluation only).
        parts: ``[B][K]`` named rewards, which ``rewards`` are weighted sums of (training only; may be empty).
    """

    completion_ids: Tensor
    completion_mask: Tensor
    sampler_logps: Tensor
    truncated: Tensor
    rewards: Tensor
    outcomes: list[list[str]]
    texts: list[list[str]]
    seeds: Tensor | None = None
    temperature: float | None = None
    parts: list[list[Mapping[str, float]]] = field(default_factory=list)

    @property
    def num_generations(self) -> int:
        """K, the number of rollouts per prompt."""
        return self.rewards.shape[1]

    @property
    def success(self) -> Tensor:
        """``[B, K]`` bool, True where the verifier judged the completion correct."""
        verdicts = [[outcome == "correct" for outcome in group] for group in self.outcomes]
        return torch.tensor(verdicts, dtype=torch.bool, device=self.rewards.device).view(self.rewards.shape)

    @property
    def has_verdict(self) -> Tensor:
        """``[B, K]`` bool, True where the verifier came to a verdict; the others have no reward, whatever it says."""
        verdicts = [[outcome in VERDICTS for outcome in group] for group in self.outcomes]
        return torch.tensor(verdicts, dtype=torch.bool, device=self.rewards.device).view(self.rewards.shape)

    def token_lists(self) -> list[list[list[int]]]:
        """Return the completions' ids without padding, as nested lists ``[B][K][length]``."""
        return _token_lists(self.completion_ids, self.completion_mask)

    def select(self, positions: Sequence[int]) -> Rollouts:
        """Return the groups of the prompts at ``positions``, in that order."""
        which = list(positions)
        return Rollouts(
            self.completion_ids[which],
            self.completion_mask[which],
            self.sampler_logps[which],
            self.truncated[which],
            self.rewards[which],
            [self.outcomes[i] for i in which],
            [self.texts[i] for i in which],
            parts=[self.parts[i] for i in which] if self.parts else [],
        )


def join_rollouts(one: Rollouts, two: Rollouts, *, members: bool = False) -> Rollouts:
    """The groups of ``one``, then those of ``two``; with ``members`` the same groups with the members of both."""
    width = max(one.completion_ids.shape[-1], two.completion_ids.shape[-1])
    axis = 1 if members else 0

    def joined(name: str) -> Tensor:
        parts = [getattr(part, name) for part in (one, two)]
        if parts[0].dim() == 3:
            parts = [pad(part, (0, width - part.shape[-1])) for part in parts]
        return torch.cat([parts[0], parts[1].to(parts[0])], axis)

    def lists(name: str) -> list[list[str]]:
        first, second = getattr(one, name), getattr(two, name)
        return [a + b for a, b in zip(first, second, strict=True)] if members else first + second

    return Rollouts(
        completion_ids=joined("completion_ids"),
        completion_mask=joined("completion_mask"),
        sampler_logps=joined("sampler_logps"),
        truncated=joined("truncated"),
        rewards=joined("rewards"),
        outcomes=lists("outcomes"),
        texts=lists("texts"),
        parts=[] if members else one.parts + two.parts,
    )


@dataclass
class PrivilegedRollouts:
    """J scored completions for each of C cliffs, sampled with the ground truth in the prompt.

    Attributes:
        positions: of the C cliffs' prompts in this rank's batch.
        rollouts: ``[C, J]``.
    """

    positions: list[int]
    rollouts: Rollouts
