"""The containers that flow through a step."""

import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.experience import (
    Completions,
    DistillationBatch,
    EvaluationSampling,
    Experience,
    Rollouts,
    Sequences,
    join_rollouts,
)

IDS = torch.tensor([[[5, 6, 7], [8, 0, 0]], [[9, 9, 0], [1, 2, 3]]])
MASK = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]]).bool()
LISTS = [[[5, 6, 7], [8]], [[9, 9], [1, 2, 3]]]


def rollouts(outcomes, rewards):
    rewards = torch.tensor(rewards)
    return Rollouts(IDS, MASK, MASK.float(), MASK[..., 0], rewards, outcomes, [[""] * 2] * 2)


def test_token_lists_hold_what_was_sampled():
    assert Completions(IDS, MASK, MASK.float(), MASK[..., 0]).token_lists() == LISTS
    assert rollouts([["wrong"] * 2] * 2, [[0.0] * 2] * 2).token_lists() == LISTS


def test_success_is_the_verifiers_word_and_not_the_reward():
    verdicts = [["correct", "wrong"], ["no_answer", "timeout"]]
    found = rollouts(verdicts, [[0.1, 0.9], [0.5, 1.0]])
    assert found.success.tolist() == [[True, False], [False, False]]
    assert found.num_generations == 2
    others = rollouts([["error", "invalid_reference", "correct"]], [[0.0] * 3])
    assert others.success.tolist() == [[False, False, True]]
    assert others.num_generations == 3


def test_named_rewards_follow_their_completions():
    one, two = (rollouts([["wrong"] * 2] * 2, [[0.0] * 2] * 2) for _ in range(2))
    one.parts = [[{"a": 1}, {"a": 2}], [{"a": 3}, {}]]
    two.parts = [[{"b": 1}, {}], [{"b": 3}, {"b": 4}]]
    assert join_rollouts(one, two).select([3, 0]).parts == [two.parts[1], one.parts[0]]
    assert rollouts([["wrong"] * 2] * 2, [[0.0] * 2] * 2).select([1]).parts == [], "where a verifier has none"


def test_sequences_are_selected_in_the_order_asked_for():
    sequences = Sequences([[1], [2, 2], [3, 3, 3]], [[4, 4], [5], [6, 6, 6, 6]])
    assert sequences.lengths() == [3, 3, 7]
    assert sequences.select([2, 0]) == Sequences([[3, 3, 3], [1]], [[6, 6, 6, 6], [4, 4]])


def test_what_is_distilled_is_selected_and_counted():
    student, privileged = (Sequences([[n], [n + 1], [n + 2]], [[4, 4], [5], [6, 6, 6]]) for n in (10, 20))
    tensors = [torch.full((2, 3), float(i)) for i in range(6)]
    items = DistillationBatch(student, privileged, [2, 1, 3], [7, 8, 9], tensors[:3], tensors[3:])
    assert (len(items), items.num_tokens) == (3, 2 * 2 + 1 + 3 * 3)
    part = items.select([2, 0])
    assert part.student == Sequences([[12], [10]], [[6, 6, 6], [4, 4]])
    assert part.privileged == Sequences([[22], [20]], [[6, 6, 6], [4, 4]])
    assert (part.counts, part.index, part.num_tokens) == ([3, 2], [9, 7], 13)
    assert part.topk_ids == [tensors[2], tensors[0]]
    assert part.topk_logits == [tensors[5], tensors[3]]
    empty = DistillationBatch.empty()
    assert (len(empty), empty.num_tokens, len(empty.select([]))) == (0, 0, 0)


@pytest.mark.parametrize(("option", "value"), [("num_samples", 0), ("max_new_tokens", 0), ("temperature", 0.0)])
def test_sampling_that_cannot_be_is_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be"):
        EvaluationSampling(**{option: value})


def test_a_batch_stays_where_it_is():
    batch = Experience(None)
    assert batch.to("cpu") is batch
