"""Means, totals and maxima, and the clock."""

import math
import time

import pytest
import torch

from hdpo.measurements import Measurements, timed


@pytest.mark.parametrize("parts", [[0.5, 2.0, -1.0], [-3.0, -2.0], [1.0, math.nan, 2.0]])
def test_a_maximum_does_not_depend_on_how_observations_are_split(parts):
    alone, merged = Measurements(), Measurements()
    for value in parts:
        alone.add("gap_max", value)
        rank = Measurements()
        rank.add("gap_max", value)
        merged.merge(rank.items())
    assert alone.means() == pytest.approx(merged.means(), nan_ok=True)
    expected = math.nan if any(map(math.isnan, parts)) else max(parts)
    assert merged.means()["gap_max"] == pytest.approx(expected, nan_ok=True)


def test_a_rank_without_observations_adds_nothing():
    stats = Measurements()
    stats.add("pass_rate", 1.0, 2)
    stats.merge([("pass_rate", 0.0, 0.0), ("gap_max", -1.0, None)])
    assert stats.means() == {"pass_rate": 0.5, "gap_max": -1.0}


def test_sums_and_counts_add_up_however_they_come():
    measured = Measurements()
    for total, count in ((1.0, 2), (torch.tensor(3.0), 2), (torch.tensor(5, dtype=torch.int64), 1)):
        measured.add("mean", total, count)
        measured.add("total", total, None)
        measured.add("read", total, torch.tensor(count))
    measured.add("numerator", 6.0, 0.0)
    measured.add("numerator", 0.0, 4)
    measured.add("nothing", 0.0, 0)
    expected = {"mean": 9 / 5, "total": 9.0, "read": 9 / 5, "numerator": 1.5}
    assert measured.means() == expected
    assert measured.means() == expected, "reading changes nothing"
    measured.add("mean", 1.0, 5)
    assert measured.means()["mean"] == 1.0
    assert [name for name, _, _ in measured.items()] == ["mean", "total", "read", "numerator", "nothing"]


def test_sums_are_collected_in_float64():
    measured = Measurements()
    for value in (2.0**53, 2.0, 2.0):
        measured.add("tokens", torch.tensor(value, dtype=torch.float64), None)
    measured.add("large", torch.tensor(2**40 + 1), None)
    assert measured.means() == {"tokens": 2.0**53 + 4, "large": 2.0**40 + 1}


def test_gradients_are_not_kept():
    measured, weight = Measurements(), torch.ones((), requires_grad=True)
    measured.add("loss", weight * 2)
    assert measured._unread[0][1].grad_fn is None


def test_seconds_are_counted_and_errors_pass(monkeypatch):
    clock = iter([10.0, 12.5, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    measured = Measurements()
    with timed(measured, "update"):
        pass
    measured.add("speed/update", 30, 0.0)
    assert measured.means() == {"time/update": 2.5, "speed/update": 12.0}
    with pytest.raises(KeyError), timed(measured, "update"):
        raise KeyError("ours")
    assert measured.means() == {"time/update": 2.5, "speed/update": 12.0}


@pytest.mark.parametrize(("phase", "key"), [
    ("rollouts", "max_sequences"), ("privileged", "distillation.num_privileged"), ("teacher", "distillation.topk"),
    ("update", "model.policy.gradient_checkpointing"), ("other", "the sizes"),
])  # fmt: skip
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried"),
])  # fmt: skip
def test_running_out_of_memory_names_the_phase_and_what_to_lower(phase, key, error):
    error = type(error)(*error.args)
    with pytest.raises(type(error)), timed(Measurements(), phase):
        raise error
    (note,) = error.__notes__
    assert f"in the phase {phase!r}; lower " in note
    assert key in note


def test_other_errors_get_no_note():
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError), timed(Measurements(), "update"):
        raise error
    assert not hasattr(error, "__notes__")
