"""pass@k and greedy accuracy over a validation set, as torchmetrics whose states are sums.

The result therefore depends neither on batches nor on ranks. Problems that only repeat others to even out the ranks are
left out through ``valid``. Intervals are computed from the records (:mod:`hdpo.evaluation.records`), not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hdpo.errors import ConfigError
from hdpo.functional import any_of_k, pass_at_k

__all__ = ["GreedyAccuracy", "PassAtK"]


def _counted(correct: Tensor, valid: Tensor | None) -> Tensor:
    """The rows of ``correct`` that count, as bool."""
    if valid is None:
        return correct.bool()
    if valid.shape != correct.shape[:1]:
        raise ValueError(f"valid must be [B] = [{len(correct)}], got {list(valid.shape)}")
    return correct[valid.bool()].bool()


class PassAtK(Metric):
    """Mean over problems of the unbiased pass@k, and of any-of-k as the paper reports it (section 4).

    ``pass@k`` uses all n samples of a problem (:func:`hdpo.functional.pass_at_k`). ``any@k`` asks whether one of the
    FIRST k samples is correct (:func:`hdpo.functional.any_of_k`): the paper's number, with more variance.

    Args:
        k: one k or several, each at least 1.
        kwargs: passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: there is no k, or one is below 1 or repeated.

    Example:
        >>> metric = PassAtK(k=(1, 2))
        >>> metric.update(torch.tensor([[True, False, False, False], [False, False, False, False]]))
        >>> metric.update(torch.tensor([[False, True, True, True]]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'pass@1': 0.3333, 'pass@2': 0.5, 'any@1': 0.3333, 'any@2': 0.6667}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    num_problems: Tensor
    pass_sum: Tensor
    any_sum: Tensor

    def __init__(self, k: int | Sequence[int] = (1, 4, 8), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise ConfigError(f"model.pass_k needs distinct k >= 1, got {list(self.k)}")
        self.add_state("num_problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pass_sum", torch.zeros(len(self.k)), dist_reduce_fx="sum")
        self.add_state("any_sum", torch.zeros(len(self.k), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, valid: Tensor | None = None) -> None:
        """Add problems.

        Args:
            correct: ``[B, n]`` bool, the verdict on n samples per problem, in the order in which they were drawn.
            valid: ``[B]`` bool, False for a problem that does not count; None if all do.

        Raises:
            ConfigError: a k is larger than n.
            ValueError: the shapes do not fit.
        """
        if correct.dim() != 2:
            raise ValueError(f"correct must be [B, n], got {list(correct.shape)}")
        num_samples = correct.shape[1]
        if max(self.k) > num_samples:
            raise ConfigError(
                f"model.pass_k: pass@{max(self.k)} needs at least {max(self.k)} samples per problem, got "
                f"{num_samples}: raise rollouts.num_val_samples, or leave that k out"
            )
        correct = _counted(correct, valid)
        num_correct = correct.sum(-1)
        values = torch.stack([pass_at_k(num_samples, num_correct, k) for k in self.k], dim=-1)
        self.num_problems += len(correct)
        self.pass_sum += values.sum(0).to(self.pass_sum.dtype)
        self.any_sum += torch.stack([any_of_k(correct, k).sum() for k in self.k])

    def compute(self) -> dict[str, Tensor]:
        """Return ``pass@k`` and ``any@k`` for each k, scalars in [0, 1]; NaN without problems."""
        passes, anys = self.pass_sum / self.num_problems, self.any_sum / self.num_problems
        result = {f"pass@{k}": value for k, value in zip(self.k, passes, strict=True)}
        return result | {f"any@{k}": value for k, value in zip(self.k, anys, strict=True)}


class GreedyAccuracy(Metric):
    """Share of problems whose greedy completion (temperature 0) is correct.

    Args:
        kwargs: passed to :class:`torchmetrics.Metric`.

    Example:
        >>> metric = GreedyAccuracy()
        >>> metric.update(torch.tensor([True, True, False, True]), valid=torch.tensor([True, True, True, False]))
        >>> metric.compute()
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    num_problems: Tensor
    num_correct: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("num_problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("num_correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, valid: Tensor | None = None) -> None:
        """Add problems.

        Args:
            correct: ``[B]`` bool.
            valid: ``[B]`` bool, False for a problem that does not count; None if all do.

        Raises:
            ValueError: the shapes do not fit.
        """
        if correct.dim() != 1:
            raise ValueError(f"correct must be [B], got {list(correct.shape)}")
        correct = _counted(correct, valid)
        self.num_problems += len(correct)
        self.num_correct += correct.sum()

    def compute(self) -> Tensor:
        """Return the accuracy, a scalar in [0, 1]; NaN without problems."""
        return self.num_correct / self.num_problems
