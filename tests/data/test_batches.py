from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpo.data.batches import EvaluationSampler, TrainSampler, check_batch
from hdpo.errors import ConfigError


def batches(count, num_rows=50, size=12, seed=0, consumed=0):
    return [batch.rows for batch in islice(TrainSampler(num_rows, size, seed, consumed=consumed), count)]


@pytest.mark.parametrize(("num_rows", "size"), [(48, 12), (50, 12), (13, 12), (12, 12), (25, 24), (1, 1)])
def test_each_pass_holds_every_problem_once(num_rows, size):
    rows = [row for batch in batches(60, num_rows, size) for row in batch]
    for start in range(0, len(rows) - num_rows + 1, num_rows):
        assert sorted(rows[start : start + num_rows]) == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "size"), [(48, 12), (50, 12), (13, 12), (12, 12), (23, 12), (25, 24)])
def test_no_problem_repeats_within_a_batch(num_rows, size):
    for batch in batches(100, num_rows, size):
        assert len(set(batch)) == size


def test_passes_and_seeds_differ():
    first = [row for batch in batches(8, 48, 12) for row in batch]
    assert first[:48] != first[48:]
    assert first[:48] != list(range(48))
    assert batches(4, seed=0) != batches(4, seed=1)


@pytest.mark.parametrize(("num_rows", "size"), [(48, 12), (50, 12), (13, 12), (5, 2)])
@pytest.mark.parametrize("done", [1, 4, 5, 17, 40])
def test_resumes_exactly(num_rows, size, done):
    whole = batches(60, num_rows, size, seed=3)
    assert batches(60 - done, num_rows, size, seed=3, consumed=done * size) == whole[done:]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_share_the_same_global_batches(num_ranks):
    whole = batches(10)
    samplers = [TrainSampler(50, 12, 0, rank, num_ranks) for rank in range(num_ranks)]
    for expected, parts in zip(whole, zip(*samplers, strict=False), strict=False):
        assert [row for part in parts for row in part.rows] == expected
        assert [position for part in parts for position in part.index] == list(range(12))
        assert all(part.valid == [True] * (12 // num_ranks) for part in parts)


def test_resuming_on_another_number_of_ranks_continues_the_same_stream():
    whole = batches(10)
    second = [next(iter(TrainSampler(50, 12, 0, rank, 3, consumed=4 * 12))) for rank in range(3)]
    assert [row for part in second for row in part.rows] == whole[4]


def test_order_is_fixed_for_good():
    # A change of this list changes the data order of every run that is resumed with a newer version.
    assert batches(1, num_rows=10, size=10, seed=42) == [FROZEN_ORDER]


FROZEN_ORDER = [7, 9, 1, 5, 8, 3, 0, 6, 2, 4]


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ConfigError, match=r"data.prompts_per_step=10 cannot be split evenly over 4 ranks: choose a"):
        TrainSampler(50, 10, 0, rank=0, num_ranks=4)


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_fewer_problems_than_a_batch_holds_are_refused(num_rows):
    with pytest.raises(ConfigError, match=f"data.prompts_per_step=10 is more than the {num_rows} training problems"):
        TrainSampler(num_rows, 10, 0)


def test_batches_that_minibatches_or_ranks_do_not_divide_are_refused():
    check_batch(12, num_ranks=3, num_minibatches=4)
    for arguments, message in (
        ((0,), "data.prompts_per_step must be a number of at least 1, got 0"),
        ((12, 5), "data.prompts_per_step=12 cannot be split evenly over 5 ranks: choose a positive multiple of 5"),
        (
            (12, 1, 8),
            r"=12 cannot be split evenly over 8 minibatches \(model.update.num_minibatches\): .* multiple of 8",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_batch(*arguments)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_run_sees_every_problem_equally_often_and_none_twice_in_a_step(data):
    num_ranks = data.draw(st.integers(1, 4), "ranks")
    size = num_ranks * data.draw(st.integers(1, 8), "per rank")
    num_rows = data.draw(st.integers(size, 6 * size), "rows")
    seed, done = data.draw(st.integers(0, 2**31), "seed"), data.draw(st.integers(0, 30), "steps done")
    whole = batches(done + 20, num_rows, size, seed)
    assert all(len(set(batch)) == size for batch in whole)
    counts = Counter(row for batch in whole for row in batch)
    assert max(counts.values()) - min(counts[row] for row in range(num_rows)) <= 1
    ranks = [TrainSampler(num_rows, size, seed, rank, num_ranks, consumed=done * size) for rank in range(num_ranks)]
    resumed = [[row for part in parts for row in part.rows] for parts in islice(zip(*ranks, strict=True), 20)]
    assert resumed == whole[done:]


@pytest.mark.parametrize("num_rows", [1, 2, 5, 24, 25, 31, 48])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_validation_sees_every_problem_once_in_equal_batches(num_rows, num_ranks, size):
    ranks = [list(EvaluationSampler(num_rows, size, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(EvaluationSampler(num_rows, size, 0, num_ranks))
    for parts in zip(*ranks, strict=True):
        assert len({len(part.rows) for part in parts}) == 1
        assert 1 <= len(parts[0].rows) <= size
        assert [p for part in parts for p in part.index] == list(range(num_ranks * len(parts[0].rows)))
    seen = [
        (row, valid) for batches in ranks for part in batches for row, valid in zip(part.rows, part.valid, strict=True)
    ]
    assert sorted(row for row, valid in seen if valid) == list(range(num_rows))
    assert sum(not valid for _, valid in seen) < num_ranks
    assert all(0 <= row < num_rows for row, _ in seen)
