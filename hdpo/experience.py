"""What flows through one training step: a single container that each station completes and none rewrites.

``Experience`` is yielded by the data module with its prompts, then completed in place::

    OpenMathDataModule    yields  Experience(prompts)
      RolloutGeneration   adds    .rollouts       K completions a prompt, log-probs, rewards
      CliffDetection      adds    .is_cliff       which prompts have no success at all
      DistillationRefresh adds    .distillation   filtered privileged rollouts and the teacher's top-k
    HDPOModule.training_step reads them all

Groups are positions: everything that belongs to a prompt sits at its index in the batch, and nothing is ever looked up
by the prompt's text (two equal problems in a batch are two groups).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Completions",
    "DistillationBatch",
    "Experience",
    "Prompts",
    "Rollouts",
    "Sequences",
    "Statistics",
    "merge_equal",
]


class Statistics:
    """Weighted means in the making: name -> (sum, count), so that micro-batches and ranks merge exactly.

    A name that ends in ``_max`` is a maximum: the largest of its observations, on whatever rank.

    Example:
        >>> stats = Statistics()
        >>> stats.add("rollout/reward", 3.0, count=4)
        >>> stats.add("rollout/reward", 0.0, count=4)
        >>> stats.add("verifier/timeout", 2.0, count=None)  # a plain total
        >>> stats.add("sampler/logprob_gap_max", 0.25)
        >>> stats.merge([("rollout/reward", 1.0, 8.0), ("sampler/logprob_gap_max", 0.125, None)])
        >>> stats.means()
        {'rollout/reward': 0.25, 'verifier/timeout': 2.0, 'sampler/logprob_gap_max': 0.25}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float | None] = {}

    def add(self, name: str, total: float | Tensor, count: float | None = 1.0) -> None:
        """Add ``total``, the sum over ``count`` observations. ``count=None`` marks a total that is never divided."""
        if name.endswith("_max"):
            # Not the built-in order: a value that is not a number must not be lost.
            values = (float(total), self._sums.get(name, -math.inf))
            self._sums[name] = max(values, key=lambda value: (math.isnan(value), value))
            self._counts[name] = None
            return
        self._sums[name] += float(total)
        if count is None:
            self._counts[name] = None
        else:
            self._counts[name] = (self._counts.get(name) or 0.0) + float(count)

    def items(self) -> list[tuple[str, float, float | None]]:
        """Return ``(name, sum, count)`` in the order in which the names were first added."""
        return [(name, self._sums[name], count) for name, count in self._counts.items()]

    def merge(self, items: Sequence[tuple[str, float, float | None]]) -> None:
        """Add what another rank counted, as returned by its :meth:`items`."""
        for name, total, count in items:
            self.add(name, total, count)

    def means(self) -> dict[str, float]:
        """Return name -> sum / count; names with a count of zero are left out, totals and maxima are as they are."""
        return {
            name: total if count is None else total / count
            for name, total, count in self.items()
            if count is None or count
        }


@dataclass
class Prompts:
    """The B problems of one batch on this rank, in both of their contexts.

    Attributes:
        index: position of each prompt in the GLOBAL batch, ``[B]`` int64. Random seeds derive from it, which is why the
            rollouts of a problem do not depend on the number of ranks.
        row: row of each problem in the prepared data set, ``[B]`` int64. Validation seeds derive from it.
        problem: the problem texts.
        reference: the expected final answers, as they stand in the data.
        solution: the reference solutions (the ground truth that the privileged context may hold).
        source: where each problem comes from (``problem_source``).
        prompt_ids: token ids of the student's context: what the policy sees at test time.
        privileged_ids: token ids of the context that also holds the ground truth.
        valid: ``[B]`` bool, False for a repetition that only evens out the ranks in validation.
    """

    index: Tensor
    row: Tensor
    problem: list[str]
    reference: list[str]
    solution: list[str]
    source: list[str]
    prompt_ids: list[list[int]]
    privileged_ids: list[list[int]]
    valid: Tensor

    def __len__(self) -> int:
        return len(self.problem)


@dataclass
class Completions:
    """What an engine returns for N prompts with S samples each.

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

    def token_lists(self) -> list[list[list[int]]]:
        """Return the sampled ids without padding, as nested lists ``[N][S][length]``."""
        lengths = self.mask.sum(-1).tolist()
        ids = self.ids.tolist()
        return [[row[:n] for row, n in zip(group, ns, strict=True)] for group, ns in zip(ids, lengths, strict=True)]


@dataclass
class Rollouts:
    """K scored completions for each of the B prompts.

    Attributes:
        completion_ids: ``[B, K, T]`` int64, padded on the right.
        completion_mask: ``[B, K, T]`` bool, True for a token that is trained.
        sampler_logps: ``[B, K, T]`` float32, log-probabilities (nats) reported by the sampler.
        truncated: ``[B, K]`` bool.
        rewards: ``[B, K]`` float32 in [0, 1].
        outcomes: ``[B][K]`` verifier outcomes (values of :class:`hdpo.rewards.Outcome`).
        texts: ``[B][K]`` decoded completions.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    sampler_logps: Tensor
    truncated: Tensor
    rewards: Tensor
    outcomes: list[list[str]]
    texts: list[list[str]]

    @property
    def num_generations(self) -> int:
        """K, the number of rollouts a prompt."""
        return self.rewards.shape[1]


class Sequences(NamedTuple):
    """Ragged contexts and completions, the form in which the policy and the teacher read text.

    Attributes:
        prompt_ids: N contexts.
        completion_ids: N completions; token t of completion i is scored given the context and the
            completion's tokens before t.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    def lengths(self) -> list[int]:
        """Number of tokens of each sequence, context and completion together."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: Sequence[int]) -> Sequences:
        """Return the sequences at ``indices``, in that order."""
        return Sequences([self.prompt_ids[i] for i in indices], [self.completion_ids[i] for i in indices])

    @property
    def num_completion_tokens(self) -> int:
        """Number of completion tokens over all sequences."""
        return sum(len(c) for c in self.completion_ids)


def merge_equal(items: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Where each different item stands first, and how many times it occurs.

    Example:
        >>> merge_equal(["a", "b", "a", "a"])
        ([0, 1], [3, 1])
    """
    counts: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        counts.setdefault(item, [i, 0])[1] += 1
    return [first for first, _ in counts.values()], [count for _, count in counts.values()]


@dataclass
class DistillationBatch:
    """The distillation set T of one step: correct privileged rollouts, and the teacher's distribution on them.

    Teacher and student read the same completion; only the context before it differs (Algorithm 1, line 16).

    Attributes:
        student: contexts WITHOUT ground truth, with the kept completions.
        privileged: contexts WITH ground truth, with the same completions.
        counts: how many times each was kept; equal rollouts are read once.
        index: position of each one's prompt in the GLOBAL batch that it was sampled for.
        topk_ids: per sequence, the teacher's k most likely tokens at each completion position, ``[length, k]`` int32.
        topk_logits: per sequence, their logits, ``[length, k]`` float32, on the same positions.
    """

    student: Sequences
    privileged: Sequences
    counts: list[int]
    index: list[int]
    topk_ids: list[Tensor] = field(default_factory=list)
    topk_logits: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.student.completion_ids)

    def select(self, indices: Sequence[int]) -> DistillationBatch:
        """Return the rollouts at ``indices``."""
        return DistillationBatch(
            self.student.select(indices),
            self.privileged.select(indices),
            [self.counts[i] for i in indices],
            [self.index[i] for i in indices],
            [self.topk_ids[i] for i in indices],
            [self.topk_logits[i] for i in indices],
        )

    @property
    def num_tokens(self) -> int:
        """Number of distilled completion tokens on this rank, those of equal rollouts counted each time."""
        return sum(n * len(c) for n, c in zip(self.counts, self.student.completion_ids, strict=True))


@dataclass
class Experience:
    """Everything that one step carries, from prompts to loss inputs. See the module's docstring for who adds what.

    Attributes:
        prompts: the batch as the data module yields it.
        rollouts: K completions a prompt, scored (training), or n samples (validation).
        greedy: one greedy completion a prompt, ``num_generations`` = 1 (validation only).
        is_cliff: ``[B]`` bool, True where every rollout of the prompt failed.
        distillation: what is distilled in this step, or None.
        finish_distillation: sets ``distillation`` once the privileged answers are graded; the module calls it when it
            has put the rollouts through the policy. None where no rank distils.
        privileged_texts: for the sample log: prompt position -> (completion, outcome) of its privileged rollouts.
        statistics: every station's measurements of this step.
        metrics: name -> value of the finished step, over all ranks: what is logged.
    """

    prompts: Prompts
    rollouts: Rollouts | None = None
    greedy: Rollouts | None = None
    is_cliff: Tensor | None = None
    distillation: DistillationBatch | None = None
    finish_distillation: Callable[[], None] | None = None
    privileged_texts: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, **_: object) -> Experience:
        """Return self: prompts are Python lists, and each station creates its tensors on the module's device."""
        return self
