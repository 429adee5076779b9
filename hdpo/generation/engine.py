"""The interface between the step and whatever samples: token ids in, token ids with log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hdpo.experience import Completions

if TYPE_CHECKING:
    from hdpo.policy import Policy


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    There is no top-p or top-k: the policy gradient and the sampler's log-probabilities are those of the full
    distribution, and truncated sampling would silently make the two disagree.

    Attributes:
        max_new_tokens: token limit of a completion.
        temperature: softmax temperature; 0 means greedy decoding (``logps`` are then those of temperature 1).
        eos_token_ids: a completion ends with the first of these, which is part of it.
    """

    max_new_tokens: int
    temperature: float
    eos_token_ids: tuple[int, ...]


class GenerationEngine(ABC):
    """Samples completions from a policy's current weights."""

    @abstractmethod
    def generate(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        seeds: Tensor,
        sampling: SamplingConfig,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Completions:
        """Sample S completions for each of N prompts.

        Args:
            policy: whose current weights are sampled; an engine with weights of its own synchronises them first.
            prompts: N prompts as token ids, N >= 0.
            seeds: ``[N, S]`` int64 on the CPU, one a sample. A sample depends on its own prompt, seed and the weights,
                never on what else is in the batch.
            sampling: limits and temperature.
            drafts: N texts that the completions may repeat, as token ids. An engine may use them to decode faster,
                or ignore them; the distribution of the completions is the same.

        Returns:
            ``[N, S, T]`` completions on any device, T being the longest sampled length (at least 1).
        """

    def sync_version(self) -> int:
        """Number of times the engine has taken over weights; it stays 0 where policy and engine share their weights."""
        return 0

    def held_weights(self) -> dict[str, Tensor]:
        """Show some of the weights that are sampled from, for a comparison with the policy's.

        Returns:
            The policy's name of a parameter -> its first rows (a vector's first elements) as the engine holds them, in
            its own dtype. Empty where policy and engine share their weights, or where there is nothing to show.
        """
        return {}

    def release_memory(self) -> None:  # noqa: B027 - optional
        """Called when the step has no more to sample: an engine may free memory for the update."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release everything. Called at the end of a run."""
