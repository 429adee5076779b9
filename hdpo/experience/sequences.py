"""Ragged contexts and completions, as the policy and the teacher read them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


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


def merge_equal(items: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Indices of the first occurrence of each distinct item, and how often each occurs.

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

    @classmethod
    def empty(cls) -> DistillationBatch:
        """Nothing to distil on this rank."""
        return cls(Sequences([], []), Sequences([], []), [], [])

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
