"""Which rollouts are put through the policy."""

import pytest
import torch

from hdpo.experience import Experience, Prompts, Rollouts
from hdpo.losses import ClippedPolicyLoss
from hdpo.losses.selection import select_rollouts
from tests.helpers.tolerances import of_sum

# Two prompts with the same four completions: two equal ones, a shorter one, and one that ran into the limit.
IDS = [[7, 8, 1], [7, 8, 1], [9, 1, 0], [5, 5, 5]]
LENGTHS = [3, 3, 2, 3]


def experience(rewards, outcomes=None):
    num = len(rewards)
    outcomes = outcomes or [["correct" if reward else "wrong" for reward in group] for group in rewards]
    prompts = Prompts(
        index=torch.arange(num),
        row=torch.arange(num),
        problem=["same"] * num,
        reference=[""] * num,
        solution=[""] * num,
        source=[""] * num,
        prompt_ids=[[20 + i] for i in range(num)],
        privileged_ids=[[]] * num,
        valid=torch.ones(num, dtype=torch.bool),
    )
    ids = torch.tensor([IDS] * num)
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    truncated = torch.tensor([[False, False, False, True]] * num)
    logps = -torch.arange(num * 12.0).view(num, 4, 3)
    texts = [[""] * 4] * num
    rollouts = Rollouts(ids, mask.expand(num, 4, 3), logps, truncated, torch.tensor(rewards), outcomes, texts)
    return Experience(prompts, rollouts)


def select(batch, part=None, off_policy=None, **options):
    chosen = list(range(len(batch))) if part is None else part
    prompt_ids = [batch.prompts.prompt_ids[i] for i in chosen]
    return select_rollouts(batch.rollouts.select(chosen), prompt_ids, ClippedPolicyLoss(**options), off_policy)


def test_equal_rollouts_are_merged_within_a_prompt_only():
    batch = select(experience([[1.0, 1.0, 0.0, 0.0]] * 2))
    assert batch.sequences.prompt_ids == [[20]] * 3 + [[21]] * 3
    assert batch.sequences.completion_ids == [[7, 8, 1], [9, 1], [5, 5, 5]] * 2
    assert batch.counts.tolist() == [2, 1, 1] * 2
    assert [x.tolist() for x in batch.sampler_logps[:2]] == [[0.0, -1.0, -2.0], [-6.0, -7.0]]
    assert batch.denominator == 22
    total = (batch.advantages[:3] * batch.counts[:3]).sum().abs()
    assert total < of_sum(4, 4.0), "advantages of a group add up to nothing"


def test_equal_rollouts_that_were_graded_differently_stay_apart():
    batch = select(experience([[1.0, 0.0, 0.0, 0.0]]))
    assert batch.sequences.completion_ids == [[7, 8, 1], [7, 8, 1], [9, 1], [5, 5, 5]]
    assert batch.counts.tolist() == [1, 1, 1, 1]
    assert batch.advantages[0] > 0 > batch.advantages[1]


def test_what_is_left_out_and_what_counts():
    rewards = [[1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4]
    batch = experience(rewards)
    assert select(batch).counts.sum() == 4
    assert select(batch).denominator == 33
    assert select(batch, kl_coef=1.0).counts.sum() == 12
    assert select(batch, count_zero_variance=False).denominator == 11
    assert select(batch, mask_truncated=True).denominator == 24
    assert select(batch, mask_truncated=True).counts.sum() == 3
    assert select(batch, aggregation="sequence").denominator == 12
    assert select(batch, mask_truncated=True, count_zero_variance=False, kl_coef=1.0).counts.sum() == 3


def test_a_part_of_the_prompts():
    batch = experience([[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    part = select(batch, [1])
    assert part.sequences.prompt_ids == [[21]] * 4
    assert part.denominator == 11
    assert [x.tolist() for x in part.sampler_logps[:1]] == [[-12.0, -13.0, -14.0]]


def test_no_signal_at_all():
    batch = select(experience([[0.0] * 4]))
    assert batch.sequences.prompt_ids == []
    assert batch.denominator == 11


def test_rollouts_without_a_verdict_count_nowhere():
    outcomes = [["correct", "timeout", "wrong", "error"], ["correct", "error", "error", "error"]]
    batch = experience([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], outcomes)
    selected = select(batch)
    assert selected.sequences.completion_ids == [[7, 8, 1], [9, 1]], "one verdict makes no group"
    assert selected.denominator == 5
    assert selected.advantages.tolist() == pytest.approx([2**0.5, -(2**0.5)], rel=1e-6)
    assert select(batch, kl_coef=1.0).counts.sum() == 2
    assert select(batch, count_zero_variance=False, aggregation="sequence").denominator == 2
    equal = experience([[0.0, 1.0, 0.0, 0.0]], [["wrong", "error", "wrong", "no_answer"]])
    assert select(equal).sequences.prompt_ids == []
    assert select(equal, count_zero_variance=False).denominator == 0


def test_members_that_the_policy_did_not_write_join_their_groups():
    batch = experience([[0.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4])
    reference = Rollouts(
        completion_ids=torch.tensor([[[7, 8, 1, 2, 3]], [[0] * 5], [[0] * 5]]),
        completion_mask=torch.tensor([[[True] * 5], [[False] * 5], [[False] * 5]]),
        sampler_logps=torch.zeros(3, 1, 5),
        truncated=torch.zeros(3, 1, dtype=torch.bool),
        rewards=torch.tensor([[1.0], [0.0], [0.0]]),
        outcomes=[["correct"], ["none"], ["none"]],
        texts=[[""]] * 3,
    )
    selected = select(batch, off_policy=reference)
    assert selected.sequences.prompt_ids == [[20]] * 4 + [[21]] * 3
    assert selected.sequences.completion_ids[3] == [7, 8, 1, 2, 3]
    assert selected.off_policy.tolist() == [False, False, False, True] + [False] * 3
    assert selected.denominator == 11 + 5 + 11 + 11
    # One success among five: 0.8 above the mean of all, in standard deviations of the five rewards.
    assert selected.advantages[:4].tolist() == pytest.approx([-0.25 / 0.2**0.5] * 3 + [1 / 0.2**0.5], rel=1e-6)
    assert select(batch).off_policy is None
    without = select(batch).advantages
    assert torch.equal(selected.advantages[4:], without), "a group without such a member is as it was"


def test_a_rollout_that_equals_the_reference_solution_stays_apart_from_it():
    batch = experience([[1.0, 0.0, 0.0, 0.0]])
    reference = batch.rollouts.select([0])
    reference = Rollouts(
        *(getattr(reference, name)[:, :1] for name in ("completion_ids", "completion_mask", "sampler_logps")),
        *(getattr(reference, name)[:, :1] for name in ("truncated", "rewards")),
        [["correct"]],
        [[""]],
    )
    selected = select(batch, off_policy=reference)
    assert selected.sequences.completion_ids == [[7, 8, 1], [7, 8, 1], [9, 1], [5, 5, 5], [7, 8, 1]]
    assert selected.off_policy.tolist() == [False] * 4 + [True]
    assert selected.counts.tolist() == [1] * 5
    assert selected.advantages[0] == selected.advantages[4] > 0
