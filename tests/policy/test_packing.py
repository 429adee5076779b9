"""Layouts of micro-batches: each sequence once, within the budget, and pointing at the right hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpo.experience import Sequences, merge_equal
from hdpo.policy.packing import Packing, TokenBatch, pack

CPU = torch.device("cpu")


@pytest.fixture
def groups():
    """Eight rollouts of each of twelve prompts."""
    generator = torch.Generator().manual_seed(4)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    prompts = [draw(20, 60) for _ in range(12)]
    return Sequences([p for p in prompts for _ in range(8)], [draw(1, 50) for _ in range(96)])


def cost(sequences, group, layout):
    prompts, completions = sequences.select(group)
    match layout:
        case "padded":
            return len(group) * max(map(len, [p + c for p, c in zip(prompts, completions, strict=True)]))
        case "packed":
            return sum(map(len, prompts)) + sum(map(len, completions))
    unique = set(map(tuple, prompts))
    return len(unique) * max(map(len, unique)) + len(group) * (max(map(len, completions)) - 1)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [1, 100, 500, 2000, 10**6])
def test_each_sequence_once_within_the_budget_and_at_the_cost_that_is_said(groups, layout, budget):
    packing = pack(groups, budget, (layout,))
    assert packing.layout == layout
    assert sorted(i for g in packing.groups for i in g) == list(range(96))
    costs = [cost(groups, g, layout) for g in packing.groups]
    assert sum(costs) == packing.num_tokens
    assert all(c <= budget or len(g) == 1 for c, g in zip(costs, packing.groups, strict=True))
    for group in packing.groups:
        batch = TokenBatch.from_sequences(groups.select(group), CPU, layout)
        size = batch.input_ids.numel() + (batch.prefixes.ids.numel() if batch.prefixes else 0)
        assert size == cost(groups, group, layout)


def test_shared_prompts_are_chosen_where_they_save_tokens(groups):
    both = ("padded", "shared")
    shared = pack(groups, 4096, both)
    assert shared.layout == "shared"
    assert shared.num_tokens < 0.7 * pack(groups, 4096).num_tokens
    assert pack(groups.select(range(0, 96, 8)), 4096, both).layout == "padded", "one rollout per prompt"
    short = Sequences([[5]] * 96, groups.completion_ids)
    assert pack(short, 4096, both).layout == "padded", "nothing to save"
    assert pack(Sequences([], []), 4096, both) == Packing([], "padded", 0)


def test_a_small_budget_keeps_the_rollouts_of_a_prompt_together(groups):
    # Sorted by length alone, every micro-batch would read all the prompts anew.
    by_length = pack(Sequences([[]] * 96, [c[1:] for c in groups.completion_ids]), 400).groups
    alone = sum(cost(groups, g, "shared") for g in by_length)
    assert pack(groups, 400, ("shared",)).num_tokens < 0.9 * alone
    assert pack(groups, 1200, ("padded", "shared")) == pack(groups, 1200, ("shared",)), "in the cheaper of two orders"


def test_where_the_predicting_hidden_states_stand():
    sequences = Sequences([[7, 8], [9], [7, 8]], [[1, 2], [3], [4, 5, 6]])
    padded = TokenBatch.from_sequences(sequences, CPU)
    assert padded.input_ids.tolist() == [[7, 8, 1, 2, 0], [9, 3, 0, 0, 0], [7, 8, 4, 5, 6]]
    assert padded.positions.tolist() == [1, 2, 5, 11, 12, 13]
    packed = TokenBatch.from_sequences(sequences, CPU, "packed")
    assert packed.input_ids.tolist() == [[7, 8, 1, 2, 9, 3, 7, 8, 4, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]]
    assert packed.positions.tolist() == [1, 2, 4, 7, 8, 9]
    shared = TokenBatch.from_sequences(sequences, CPU, "shared")
    assert shared.prefixes.ids.tolist() == [[7, 8], [9, 0]]
    assert shared.prefixes.lengths.tolist() == [2, 1]
    assert shared.prefixes.rows.tolist() == [0, 1, 0]
    assert shared.input_ids.tolist() == [[1, 0], [0, 0], [4, 5]]
    assert shared.positions.tolist() == [1, 4, 2, 1, 8, 9]
    for batch in (padded, packed, shared):
        assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6]
        assert batch.lengths == [2, 1, 3]


def test_completions_of_one_token_need_no_second_pass():
    batch = TokenBatch.from_sequences(Sequences([[7, 8], [7, 8]], [[1], [2]]), CPU, "shared")
    assert batch.input_ids.shape == (2, 0)
    assert batch.positions.tolist() == [1, 1]


def test_equal_items_are_merged_in_order():
    assert merge_equal([3, 1, 3, 3, 2, 1]) == ([0, 1, 4], [3, 2, 1])
    assert merge_equal([]) == ([], [])


sequences = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sequences, st.sampled_from(["padded", "packed", "shared"]), st.integers(1, 60))
def test_any_sequences_are_each_predicted_once_from_the_token_before(drawn, layout, budget):
    """Four prompts that several sequences share; every token is another number, so that none can be taken for it."""
    numbers = iter(range(10_000))
    prompts = [[next(numbers) for _ in range(length)] for length in (1, 2, 5, 8)]
    whole = Sequences([prompts[which] for which, _ in drawn], [[next(numbers) for _ in range(n)] for _, n in drawn])
    packing = pack(whole, budget, (layout,))
    assert sorted(i for group in packing.groups for i in group) == list(range(len(drawn)))
    for group in packing.groups:
        chosen = whole.select(group)
        batch = TokenBatch.from_sequences(chosen, CPU, layout)
        read = [batch.prefixes.ids.flatten()] if batch.prefixes else []
        read = torch.cat([*read, batch.input_ids.flatten()])
        before = [(p + c)[len(p) - 1 : -1] for p, c in zip(*chosen, strict=True)]
        assert read[batch.positions].tolist() == [token for part in before for token in part]
        assert batch.targets.tolist() == [token for completion in chosen.completion_ids for token in completion]
        assert list(batch.lengths) == list(map(len, chosen.completion_ids))
