"""The moments between the stations: what is there, that nobody rewrites it, and where the seconds go."""

from dataclasses import fields, is_dataclass, replace
from itertools import pairwise

import pytest
import torch

from hdpo.callbacks import RolloutGeneration, Station
from hdpo.errors import ConfigError
from hdpo.experience import Experience
from hdpo.measurements import Measurements
from tests.helpers import toy
from tests.helpers.reference import Options

ADDED = ("prompts", "rollouts", "is_cliff", "privileged", "distillation")


def frozen(value):
    """A copy that shares nothing with the original."""
    match value:
        case torch.Tensor():
            return value.clone()
        case list() | tuple():
            return [frozen(item) for item in value]
        case dict():
            return {key: frozen(item) for key, item in value.items()}
    if is_dataclass(value):
        return {field.name: frozen(getattr(value, field.name)) for field in fields(value)}
    assert value is None or isinstance(value, int | float | str), f"{type(value)} is no data"
    return value


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Watch(Station):
    """Keeps a copy of what is there at each moment."""

    def __init__(self):
        self.seen, self.metrics = [], []

    def note(self, batch):
        self.seen.append({name: frozen(getattr(batch, name)) for name in ADDED})

    def after_prompts(self, trainer, pl_module, batch):
        self.note(batch)

    def after_rollouts(self, trainer, pl_module, batch):
        self.note(batch)

    def after_cliffs(self, trainer, pl_module, batch):
        self.note(batch)

    def after_distillation(self, trainer, pl_module, batch):
        self.note(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(batch)
        self.metrics.append(dict(batch.metrics))


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    station = Watch()
    toy.fit(tmp_path_factory.mktemp("run"), Options(), station, steps=3, tiers=[1, 2, 3, 4, 6], dtype="float32")
    return station


def test_each_station_adds_and_none_rewrites(watch):
    assert len(watch.seen) == 3 * 5
    for start in range(0, len(watch.seen), 5):
        moments = watch.seen[start : start + 5]
        there = [[name for name in ADDED if moment[name] is not None] for moment in moments]
        assert there == [list(ADDED[:1]), list(ADDED[:2]), list(ADDED[:3]), list(ADDED), list(ADDED)]
        for before, after in pairwise(moments):
            for name in ADDED:
                assert before[name] is None or equal(before[name], after[name]), name


def test_an_experience_holds_data_only():
    for field in fields(Experience):
        assert "Callable" not in str(field.type)
    assert {f.name for f in fields(Experience)} - set(ADDED) == {
        "greedy",
        "off_policy",
        "started",
        "measurements",
        "metrics",
    }
    assert isinstance(Experience(None).measurements, Measurements)


def test_the_seconds_of_the_stations_add_up_to_the_step(watch):
    for metrics in watch.metrics[1:]:
        parts = {name: value for name, value in metrics.items() if name.startswith("time/") and name != "time/step"}
        assert set(parts) >= {"time/rollouts", "time/scoring", "time/privileged", "time/teacher", "time/update"}
        assert min(parts.values()) >= 0
        # `scoring` is a mean of two; its sum is missing once.
        total = sum(parts.values()) + parts["time/scoring"]
        assert 0.8 * metrics["time/step"] < total <= metrics["time/step"]


def test_several_stations_act_in_their_order(tmp_path):
    order = []

    class Named(Station):
        def __init__(self, name):
            self.name = name

        @property
        def state_key(self):
            return self.name

        def after_cliffs(self, trainer, pl_module, batch):
            order.append(self.name)

    toy.fit(tmp_path, Options(), Named("first"), Named("second"), steps=1)
    assert order == ["first", "second"]


def test_our_stations_belong_to_the_module(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.callbacks must not hold RolloutGeneration"):
        toy.fit(tmp_path, replace(Options()), RolloutGeneration())
