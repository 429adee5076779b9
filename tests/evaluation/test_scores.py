"""The metrics of one evaluation, overall and by source, against plain counting."""

import pytest
import torch

from hdpo.evaluation.scores import Scores
from tests.helpers.tolerances import of_sum

CORRECT = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
GREEDY = torch.tensor([0, 1, 0, 1, 1]).bool()
SOURCES = ["math", "gsm8k", "math", "a.b", "gsm8k"]
VALID = torch.tensor([1, 1, 1, 1, 0]).bool()


def counted(rows):
    """pass@2 of three samples: 1 - (pairs without a correct one) / 3."""
    wrong = [int((~CORRECT[i]).sum()) for i in rows]
    return {
        "pass@1": sum(CORRECT[i].double().mean().item() for i in rows) / len(rows),
        "pass@2": sum(1 - w * (w - 1) / 2 / 3 for w in wrong) / len(rows),
        "any@1": sum(bool(CORRECT[i, 0]) for i in rows) / len(rows),
        "any@2": sum(bool(CORRECT[i, :2].any()) for i in rows) / len(rows),
        "greedy_accuracy": sum(bool(GREEDY[i]) for i in rows) / len(rows),
    }


def expected(stage):
    result = {f"{stage}/{name}": value for name, value in counted([0, 1, 2, 3]).items()}
    for source, rows in (("math", [0, 2]), ("gsm8k", [1]), ("a.b", [3])):
        result |= {f"{stage}/{source}/{name}": value for name, value in counted(rows).items()}
    return result


@pytest.mark.parametrize("batches", [[slice(0, 5)], [slice(0, 2), slice(2, 5)]], ids=["whole", "parts"])
def test_all_problems_and_those_of_each_source(batches):
    scores = Scores(dict.fromkeys(["", "a.b", "gsm8k", "math"], (1, 2)))
    for stage in ("val", "test"):  # the second evaluation starts anew
        for part in batches:
            scores.update(CORRECT[part], GREEDY[part], SOURCES[part], VALID[part])
        found = {name: value.item() for name, value in scores.compute_and_reset(stage).items()}
        assert found == pytest.approx(expected(stage), abs=of_sum(len(SOURCES), 1.0))


def test_without_sources_there_is_one_row():
    scores = Scores({"": (1,)})
    scores.update(CORRECT, GREEDY, SOURCES, VALID)
    assert list(scores.compute_and_reset("val")) == ["val/pass@1", "val/any@1", "val/greedy_accuracy"]
