import pickle
from itertools import combinations

import pytest
import torch

from hdpo.evaluation.metrics import GreedyAccuracy, PassAtK
from tests.helpers.tolerances import of_sum


def verdicts(num_problems=37, num_samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(num_problems, 1, generator=generator)
    return torch.rand(num_problems, num_samples, generator=generator) < rates


def reference(correct: torch.Tensor, ks: tuple[int, ...]) -> dict[str, list[float]]:
    """Per-problem values by brute force over all subsets."""
    values: dict[str, list[float]] = {}
    for k in ks:
        subsets = list(combinations(range(correct.shape[1]), k))
        values[f"pass@{k}"] = [sum(any(row[i] for i in s) for s in subsets) / len(subsets) for row in correct.tolist()]
        values[f"any@{k}"] = [float(any(row[:k])) for row in correct.tolist()]
    return values


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=of_sum(37, 1.0), rtol=0)


def test_against_brute_force():
    correct = verdicts()
    metric = PassAtK(k=(1, 3, 8))
    metric.update(correct)
    result = metric.compute()
    expected = reference(correct, (1, 3, 8))
    assert set(result) == set(expected)
    for name, values in expected.items():
        assert result[name].item() == pytest.approx(sum(values) / len(values), abs=of_sum(37, 1.0))
    # Any-of-n and the unbiased pass@n are the same thing; for k < n they are not.
    assert result["any@8"] == result["pass@8"]
    assert result["any@3"] != result["pass@3"]


def test_batches_merge_to_the_whole():
    correct = verdicts()
    whole = PassAtK()
    whole.update(correct)
    parts = PassAtK()
    for part in correct.split([5, 1, 0, 20, 11]):
        parts.update(part)
    assert_same(parts.compute(), whole.compute())


def test_masked_repeats_do_not_count():
    correct = verdicts()
    whole = PassAtK()
    whole.update(correct)
    padded = PassAtK()
    padded.update(torch.cat([correct, ~correct[:3]]), torch.arange(40) < 37)
    padded.update(~correct[:4], torch.zeros(4, dtype=torch.bool))
    assert_same(padded.compute(), whole.compute())
    assert padded.num_problems == 37


def test_the_number_of_samples_may_vary():
    metric = PassAtK(k=2)
    metric.update(torch.tensor([[True, False]]))
    metric.update(torch.tensor([[True, False, False, False]]))
    assert metric.compute()["pass@2"].item() == pytest.approx((1 + 0.5) / 2)


def test_reset_and_pickle():
    metric = PassAtK(k=(1, 4))
    metric.update(verdicts())
    copy = pickle.loads(pickle.dumps(metric))
    assert_same(copy.compute(), metric.compute())
    metric.reset()
    assert metric.num_problems == 0
    metric.update(verdicts(seed=1))
    fresh = PassAtK(k=(1, 4))
    fresh.update(verdicts(seed=1))
    assert_same(metric.compute(), fresh.compute())


def test_no_problems_give_nan_and_not_zero():
    metric = PassAtK(k=1)
    metric.update(torch.zeros(0, 4, dtype=torch.bool))
    assert metric.compute()["pass@1"].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PassAtK(k=()), "distinct k >= 1, got \\[\\]"),
        (lambda: PassAtK(k=(0, 1)), "distinct k >= 1"),
        (lambda: PassAtK(k=(1, 1)), "distinct k >= 1"),
        (
            lambda: PassAtK(k=(1, 8)).update(verdicts(num_samples=4)),
            "pass@8 needs at least 8 samples",
        ),
        (lambda: PassAtK(k=1).update(torch.zeros(4)), r"\[B, n\]"),
        (lambda: PassAtK(k=1).update(torch.zeros(4, 2), torch.ones(3)), r"valid must be \[B\] = \[4\], got \[3\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- greedy accuracy

CORRECT = torch.arange(23) % 3 != 0  # 15 of 23


def test_greedy_accuracy_of_batches_with_masked_repeats():
    metric = GreedyAccuracy()
    for part in CORRECT.split([10, 0, 13]):
        metric.update(part)
    metric.update(torch.cat([CORRECT[:2], ~CORRECT[:2]]), torch.zeros(4, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(15 / 23)
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    metric.reset()
    metric.update(CORRECT[:0])
    assert metric.compute().isnan()


def test_greedy_accuracy_of_wrong_shapes():
    with pytest.raises(ValueError, match=r"correct must be \[B\]"):
        GreedyAccuracy().update(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"valid must be \[B\] = \[3\], got \[4\]"):
        GreedyAccuracy().update(torch.zeros(3), torch.ones(4))
