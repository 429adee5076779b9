from itertools import combinations
from math import comb

import pytest
import torch

from hdpo.functional import any_of_k, pass_at_k


def brute_force(correct: list[bool], k: int) -> float:
    """The share of all k-subsets that hold a correct sample."""
    subsets = list(combinations(correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def test_against_all_subsets():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                expected = brute_force([True] * c + [False] * (n - c), k)
                assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
                tensor = pass_at_k(torch.tensor([n]), torch.tensor([c]), k)
                assert tensor.item() == pytest.approx(expected, abs=1e-12)


def test_large_numbers_against_exact_integers():
    for n, c, k in [(2048, 3, 512), (1000, 1, 1000), (1000, 500, 8), (5000, 2, 2500)]:
        assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), rel=1e-12)


def test_shapes_and_limits():
    correct = torch.tensor([[0, 1], [2, 4]])
    value = pass_at_k(4, correct, 2)
    assert value.shape == (2, 2)
    assert value.dtype == torch.float64
    torch.testing.assert_close(pass_at_k(4, correct, 1), correct.double() / 4)
    assert pass_at_k(4, correct, 4).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert pass_at_k(torch.tensor([2, 4]), 1, 2).tolist() == [1.0, 0.5]
    assert pass_at_k(4, torch.zeros(0, dtype=torch.long), 2).shape == (0,)
    assert isinstance(pass_at_k(4, 2, 1), float)


def test_it_is_unbiased():
    """Its expectation over n draws with success probability p is 1 - (1 - p)^k, summed exactly over the binomial."""
    n, p = 10, 0.23
    for k in (1, 3, 10):
        expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert expected == pytest.approx(1 - (1 - p) ** k)


def test_any_of_k_looks_at_the_first_k_only():
    correct = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert any_of_k(correct, 1).tolist() == [False, True, False]
    assert any_of_k(correct, 2).tolist() == [False, True, False]
    assert any_of_k(correct, 3).tolist() == [True, True, False]
    assert any_of_k(correct, 4).tolist() == pass_at_k(4, correct.sum(-1), 4).bool().tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, 1, 5), "pass@5 needs at least 5 samples per problem, got 4"),
        (lambda: pass_at_k(torch.tensor([8, 4]), torch.tensor([1, 1]), 5), "got 4"),
        (lambda: pass_at_k(4, 1, 0), "k >= 1"),
        (lambda: pass_at_k(4, 5, 1), "between 0 and num_samples"),
        (lambda: pass_at_k(4, torch.tensor([-1]), 1), "between 0 and num_samples"),
        (lambda: any_of_k(torch.zeros(3, 4), 5), "1 <= k <= 4 samples, got k = 5"),
        (lambda: any_of_k(torch.zeros(3), 1), r"\[B, n\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
