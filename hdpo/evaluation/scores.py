"""The metrics of one evaluation, overall and by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hdpo.evaluation.metrics import GreedyAccuracy, PassAtK

__all__ = ["Scores"]


class _Pair(nn.Module):
    """pass@k and greedy accuracy of the same problems."""

    def __init__(self, pass_k: Sequence[int]) -> None:
        super().__init__()
        self.pass_at_k, self.greedy_accuracy = PassAtK(k=pass_k), GreedyAccuracy()


class Scores(nn.Module):
    """pass@k, any@k and greedy accuracy, of all problems and of each source.

    Args:
        pass_k: the k of pass@k.
        sources: names of the sources, the same list on all ranks.
    """

    def __init__(self, pass_k: Sequence[int], sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = ["", *sources]
        # Not a ModuleDict: a source's name may hold a dot.
        self.pairs = nn.ModuleList(_Pair(pass_k) for _ in self.names)

    def update(self, correct: Tensor, greedy: Tensor, sources: Sequence[str], valid: Tensor) -> None:
        """Add problems.

        Args:
            correct: ``[B, n]`` bool, the verdict on n samples per problem.
            greedy: ``[B]`` bool, the verdict on the greedy completion.
            sources: B names.
            valid: ``[B]`` bool, False for a repetition that only evens out the ranks.
        """
        for name, pair in zip(self.names, self.pairs, strict=True):
            pair = cast(_Pair, pair)
            mine = valid & torch.tensor([name in ("", source) for source in sources], device=valid.device)
            pair.pass_at_k.update(correct, mine)
            pair.greedy_accuracy.update(greedy, mine)

    def compute_and_reset(self, stage: str) -> dict[str, Tensor]:
        """Return ``<stage>/<metric>`` and ``<stage>/<source>/<metric>``, merged over ranks, and start anew."""
        values: dict[str, Tensor] = {}
        for name, pair in zip(self.names, self.pairs, strict=True):
            pair = cast(_Pair, pair)
            found = {**pair.pass_at_k.compute(), "greedy_accuracy": pair.greedy_accuracy.compute()}
            values |= {"/".join(filter(None, (stage, name, metric))): value for metric, value in found.items()}
            pair.pass_at_k.reset()
            pair.greedy_accuracy.reset()
        return values
