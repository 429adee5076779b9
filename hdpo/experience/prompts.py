"""The problems of a batch, in both of their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hdpo.errors import check_at_least, check_positive


@dataclass  # not frozen: Lightning refuses batches that hold a frozen one
class EvaluationSampling:
    """How the completions of one evaluation set are sampled; null stands for what ``rollouts`` says.

    Attributes:
        num_samples: n, sampled completions per problem; null for ``rollouts.num_val_samples``.
        temperature: of the sampled completions; null for ``rollouts.val_temperature``.
        max_new_tokens: token limit of a completion; null for ``rollouts.val_max_new_tokens``.

    Raises:
        ConfigError: a value outside its range.
    """

    num_samples: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, num_samples=self.num_samples, max_new_tokens=self.max_new_tokens)
        check_positive(temperature=self.temperature)


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
        columns: the extra columns of the data (``columns.extra``) by name, one value per prompt each.
        dataset: name of the evaluation set; empty in training and for a set without a name.
        sampling: how the completions of an evaluation set are sampled.
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
    columns: dict[str, list[Any]] = field(default_factory=dict)
    dataset: str = ""
    sampling: EvaluationSampling = field(default_factory=EvaluationSampling)

    def __len__(self) -> int:
        return len(self.problem)

    def with_others(self, positions: Sequence[int], others: Prompts) -> Prompts:
        """Return these prompts with ``others`` at ``positions``, which keep their ``index``."""
        places = {position: len(self) + i for i, position in enumerate(positions)}
        order = [places.get(i, i) for i in range(len(self))]

        def chosen(one: Any, two: Any) -> Any:
            if isinstance(one, Tensor):
                return torch.cat([one, two])[order]
            return [(one + two)[i] for i in order]

        names = ("row", "problem", "reference", "solution", "source", "prompt_ids", "privileged_ids", "valid")
        values = {name: chosen(getattr(self, name), getattr(others, name)) for name in names}
        columns = {name: chosen(column, others.columns[name]) for name, column in self.columns.items()}
        return replace(self, **values, columns=columns)
