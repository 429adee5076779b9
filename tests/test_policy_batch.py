"""Which rollouts are put through the policy."""

import torch

from hdpo.experience import Experience, Prompts, Rollouts
from hdpo.policy_batch import Selection

# Two prompts with the same four completions: two equal ones, a shorter one, and one that ran into the limit.
IDS = [[7, 8, 1], [7, 8, 1], [9, 1, 0], [5, 5, 5]]
LENGTHS = [3, 3, 2, 3]


def experience(rewards):
    num = len(rewards)
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
    return Experience(prompts, Rollouts(ids, mask.expand(num, 4, 3), logps, truncated, torch.tensor(rewards), [], []))


def test_equal_rollouts_are_merged_within_a_prompt_only():
    batch = Selection()(experience([[1.0, 1.0, 0.0, 0.0]] * 2))
    assert batch.sequences.prompt_ids == [[20]] * 3 + [[21]] * 3
    assert batch.sequences.completion_ids == [[7, 8, 1], [9, 1], [5, 5, 5]] * 2
    assert batch.counts.tolist() == [2, 1, 1] * 2
    assert [x.tolist() for x in batch.sampler_logps[:2]] == [[0.0, -1.0, -2.0], [-6.0, -7.0]]
    assert batch.denominator == 22
    assert (batch.advantages[:3] * batch.counts[:3]).sum().abs() < 1e-6, "advantages of a group add up to nothing"


def test_equal_rollouts_that_were_graded_differently_stay_apart():
    batch = Selection()(experience([[1.0, 0.0, 0.0, 0.0]]))
    assert batch.sequences.completion_ids == [[7, 8, 1], [7, 8, 1], [9, 1], [5, 5, 5]]
    assert batch.counts.tolist() == [1, 1, 1, 1]
    assert batch.advantages[0] > 0 > batch.advantages[1]


def test_what_is_left_out_and_what_counts():
    rewards = [[1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4]
    batch = experience(rewards)
    assert Selection()(batch).counts.sum() == 4
    assert Selection()(batch).denominator == 33
    assert Selection(needs_all=True)(batch).counts.sum() == 12
    assert Selection(count_zero_variance=False)(batch).denominator == 11
    assert Selection(mask_truncated=True)(batch).denominator == 24
    assert Selection(mask_truncated=True)(batch).counts.sum() == 3
    assert Selection(aggregation="sequence")(batch).denominator == 12
    assert Selection(mask_truncated=True, count_zero_variance=False, needs_all=True)(batch).counts.sum() == 3


def test_a_part_of_the_prompts():
    batch = experience([[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    part = Selection()(batch, [1])
    assert part.sequences.prompt_ids == [[21]] * 4
    assert part.denominator == 11
    assert [x.tolist() for x in part.sampler_logps[:1]] == [[-12.0, -13.0, -14.0]]


def test_no_signal_at_all():
    batch = Selection()(experience([[0.0] * 4]))
    assert batch.sequences.prompt_ids == []
    assert batch.denominator == 11
