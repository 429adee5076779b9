"""The metrics of one evaluation, overall, by set and by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from hdpo.errors import ConfigError
from hdpo.evaluation.metrics import GreedyAccuracy, PassAtK
from hdpo.evaluation.records import problem_groups


def group_ks(pass_k: Sequence[int], num_samples: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The k of pass@k that can be estimated in each group of problems, and in all of them together.

    Args:
        pass_k: the k that are wanted.
        num_samples: group -> samples per problem.

    Returns:
        Group -> its k; ``""`` stands for all problems.

    Raises:
        ConfigError: a group has too few samples for any k.

    Example:
        >>> group_ks((1, 8, 32), {"math500": 8, "aime24": 32})
        {'': (1, 8), 'math500': (1, 8), 'aime24': (1, 8, 32)}
    """
    for name, number in num_samples.items():
        if number < min(pass_k):
            raise ConfigError(
                f"data: the evaluation set {name!r} has num_samples {number}, but the smallest k of model.pass_k is "
                f"{min(pass_k)}: sample more completions, or add a smaller k"
            )
    numbers = {"": min(num_samples.values(), default=max(pass_k)), **num_samples}
    return {name: tuple(k for k in pass_k if k <= number) for name, number in numbers.items()}


class _Pair(nn.Module):
    """pass@k and greedy accuracy of the same problems."""

    def __init__(self, pass_k: Sequence[int]) -> None:
        super().__init__()
        self.pass_at_k, self.greedy_accuracy = PassAtK(k=pass_k), GreedyAccuracy()


class Scores(nn.Module):
    """pass@k, any@k and greedy accuracy, of all problems and of each group (set or source).

    Args:
        ks: group -> the k of pass@k, with ``""`` for all problems; the same on all ranks.
    """

    def __init__(self, ks: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.ks = {name: tuple(k) for name, k in ks.items()}
        # Not a ModuleDict: a source's name may hold a dot.
        self.pairs = nn.ModuleList(map(_Pair, self.ks.values()))

    def update(self, correct: Tensor, greedy: Tensor, sources: Sequence[str], valid: Tensor, dataset: str = "") -> None:
        """Add problems.

        Args:
            correct: ``[B, n]`` bool, the verdict on n samples per problem.
            greedy: ``[B]`` bool, the verdict on the greedy completion.
            sources: B names.
            valid: ``[B]`` bool, False for a repetition that only evens out the ranks.
            dataset: name of the evaluation set.
        """
        groups = [("", *problem_groups(dataset, source)) for source in sources]
        for (name, ks), pair in zip(self.ks.items(), self.pairs, strict=True):
            pair = cast(_Pair, pair)
            mine = [i for i, names in enumerate(groups) if name in names]
            # Another set may have fewer samples than this one's k.
            pair.pass_at_k.update(correct[mine] if mine else correct.new_zeros(0, max(ks)), valid[mine])
            pair.greedy_accuracy.update(greedy[mine], valid[mine])

    def compute_and_reset(self, stage: str) -> dict[str, Tensor]:
        """Return ``<stage>/<metric>`` and ``<stage>/<group>/<metric>``, merged over ranks, and start anew."""
        values: dict[str, Tensor] = {}
        for name, pair in zip(self.ks, self.pairs, strict=True):
            pair = cast(_Pair, pair)
            found = {**pair.pass_at_k.compute(), "greedy_accuracy": pair.greedy_accuracy.compute()}
            values |= {"/".join(filter(None, (stage, name, metric))): value for metric, value in found.items()}
            pair.pass_at_k.reset()
            pair.greedy_accuracy.reset()
        return values
