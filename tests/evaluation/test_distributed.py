"""Two processes that hold different problems compute what one would. One pair of processes serves both metrics."""

import pytest
import torch

from hdpo.evaluation.metrics import GreedyAccuracy, PassAtK
from tests.evaluation.test_metrics import CORRECT, assert_same, verdicts
from tests.helpers.processes import run_on


def _pass_at_k(rank, correct, counts):
    metric = PassAtK(k=(1, 4, 8))
    # Three rounds a rank; the problems do not divide evenly, so the last round repeats some, masked out.
    start = sum(counts[:rank])
    mine = correct[start : start + counts[rank]]
    valid = torch.ones(len(mine), dtype=torch.bool)
    missing = max(counts) - len(mine)
    mine, valid = torch.cat([mine, correct[:missing]]), torch.cat([valid, torch.zeros(missing, dtype=torch.bool)])
    for part, mask in zip(mine.split(7), valid.split(7), strict=True):
        metric.update(part, mask)
    merged = {name: value.item() for name, value in metric.compute().items()}
    return merged, int(metric.num_problems)


def _greedy(rank):
    metric = GreedyAccuracy()
    mine = CORRECT[rank::2]
    valid = torch.ones(12, dtype=torch.bool)
    valid[len(mine) :] = False
    metric.update(torch.cat([mine, CORRECT[1 : 1 + 12 - len(mine)]]), valid)
    return metric.compute().item(), int(metric.num_problems)


def _on_rank(rank, correct, counts):
    return _pass_at_k(rank, correct, counts), _greedy(rank)


@pytest.mark.timeout(300)
def test_two_processes_merge_to_the_whole(tmp_path):
    correct = verdicts()
    passes, greedy = zip(*run_on(2, tmp_path, _on_rank, correct, (19, 18)), strict=True)
    whole = PassAtK(k=(1, 4, 8))
    whole.update(correct)
    for rank, (merged, own) in enumerate(passes):
        assert_same({name: torch.tensor(value) for name, value in merged.items()}, whole.compute())
        assert own == (19, 18)[rank]  # a rank's own states are restored after the merge
    for rank, (value, own) in enumerate(greedy):
        assert value == pytest.approx(15 / 23)
        assert own == (12, 11)[rank]
