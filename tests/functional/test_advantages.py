import math

import pytest
import torch

from hdpo.functional import group_advantages, has_variance
from tests.helpers.tolerances import of_sum


def reference(rewards: list[float], scale: str) -> list[float]:
    """Written out with Python floats, one rollout at a time."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)

    def sample_std(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    advantages = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        divisor = 1.0
        if scale == "std":
            divisor = sample_std(rewards)
        elif scale == "leave_one_out_std" and len(set(others)) > 1:
            divisor = sample_std(others)
        advantages.append((reward - sum(others) / len(others)) / divisor)
    return advantages


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out_std"])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_against_reference(scale, size):
    generator = torch.Generator().manual_seed(size)
    binary = (torch.rand(40, size, generator=generator) < torch.rand(40, 1, generator=generator)).double()
    graded = torch.rand(20, size, generator=generator, dtype=torch.double)
    rewards = torch.cat([binary, graded])
    expected = torch.tensor([reference(row, scale) for row in rewards.tolist()], dtype=torch.double)
    torch.testing.assert_close(group_advantages(rewards, scale=scale), expected, rtol=1e-12, atol=1e-12)
    # A mean and a deviation of `size` numbers, divided by a deviation that may be small.
    smallest = min((torch.std(row) for row in rewards if torch.std(row) > 0), default=torch.tensor(1.0))
    atol = of_sum(4 * size, 1.0) / float(smallest) ** 2
    torch.testing.assert_close(group_advantages(rewards.float(), scale=scale).double(), expected, rtol=0, atol=atol)


def test_success_is_reinforced_and_failure_is_not():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    for scale in ("std", "none", "leave_one_out_std"):
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[rewards == 1] > 0).all()
        assert (advantages[rewards == 0] < 0).all()


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out_std"])
def test_no_variance_is_exactly_zero(scale):
    # Most of these values have no exact sum in binary: a computed mean or std of them is not exact either.
    values = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(200, generator=torch.Generator().manual_seed(0))])
    for size in (2, 7, 16):
        assert group_advantages(values[:, None].expand(-1, size), scale=scale).eq(0).all()


def test_known_defect_of_the_leave_one_out_std():
    rewards = torch.zeros(2, 16)
    rewards[0, 3] = 1
    rewards[1, [3, 4]] = 1
    advantages = group_advantages(rewards, scale="leave_one_out_std")
    assert advantages[0, 3].item() == pytest.approx(1.0)
    assert advantages[1, 3].item() == pytest.approx(3.61, abs=0.01)
    # The default orders the two as one would expect: the rarer success weighs more.
    advantages = group_advantages(rewards)
    assert advantages[0, 3] > advantages[1, 3] > 0


def test_groups_do_not_touch_and_order_does_not_matter():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    together = group_advantages(rewards)
    torch.testing.assert_close(together, torch.cat([group_advantages(row[None]) for row in rewards]))
    permutation = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(group_advantages(rewards[:, permutation]), together[:, permutation])


def test_std_scale_ignores_an_affine_change_of_the_rewards():
    rewards = torch.rand(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(3 * rewards + 2), group_advantages(rewards))
    torch.testing.assert_close(group_advantages(rewards).sum(-1), torch.zeros(4, dtype=torch.double))


def test_booleans_and_no_groups():
    rewards = torch.tensor([[True, False]])
    assert group_advantages(rewards, scale="none").tolist() == [[1.0, -1.0]]
    assert group_advantages(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("rewards", "scale", "message"),
    [
        (torch.zeros(3, 1), "std", "K >= 2"),
        (torch.zeros(3), "std", "K >= 2"),
        (torch.zeros(3, 2), "mad", "one of std, none, leave_one_out_std, got 'mad'"),
        (torch.tensor([[0.0, torch.nan]]), "std", "finite"),
    ],
)
def test_bad_input(rewards, scale, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, scale=scale)


def test_rewards_that_are_none_have_no_part():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(40, 6, generator=generator, dtype=torch.float64).round(decimals=1)
    valid = torch.rand(40, 6, generator=generator) < 0.5
    garbage = torch.where(valid, rewards, float("nan"))
    for scale in ("std", "none", "leave_one_out_std"):
        found = group_advantages(garbage, valid, scale=scale)
        for row, mask, mine in zip(rewards, valid, found, strict=True):
            expected = torch.zeros(6, dtype=torch.float64)
            if mask.sum() >= 2:
                expected[mask] = group_advantages(row[mask][None], scale=scale)[0]
            assert torch.equal(mine, expected)
    assert (valid.sum(-1) == 2).any()
    assert (valid.sum(-1) == 1).any()
    varied = has_variance(garbage, valid)
    assert varied.tolist() == [len(set(r[m].tolist())) > 1 for r, m in zip(rewards, valid, strict=True)]
