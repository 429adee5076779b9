"""Dynamic sampling: groups without variance are exchanged for others that have some, within a budget."""

from dataclasses import replace

import pytest

from hdpo.callbacks import Station
from hdpo.callbacks.sampling import sample
from hdpo.data import ColumnMapping
from hdpo.errors import ConfigError
from hdpo.functional.random import Purpose, derive_seeds
from tests.helpers import toy


class Seen(Station):
    def __init__(self):
        self.batches = []

    def after_rollouts(self, trainer, pl_module, batch):
        self.batches.append(batch)


def fit(folder, num, steps=2, data=None, **options):
    seen = Seen()
    module = toy.module(distillation_weight=0.0, rollouts={"max_resamples": num}, **options)
    problems = {"source": toy.source("train", [1, 3, 4, 6]), "num_train_problems": 60} | (data or {})
    data = toy.datamodule(folder, **problems)
    toy.trainer(folder, seen, max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
    return seen.batches, data.dataset("train")


def varied(batch):
    return [len(set(group)) > 1 for group in batch.rollouts.rewards.tolist()]


def test_prompts_without_variance_are_exchanged_for_those_that_seeds_draw(tmp_path):
    (without, *_), data = fit(tmp_path / "a", 0, steps=1)
    (once, *_), _ = fit(tmp_path / "b", 1, steps=1)
    before, after = varied(without), varied(once)
    assert not all(before)
    rows = [int(derive_seeds(0, Purpose.RESAMPLING, 0, 1, i)) % len(data) for i in range(6)]
    exchanged = [i for i in range(6) if int(once.prompts.row[i]) != int(without.prompts.row[i])]
    assert exchanged, "some other group has variance"
    for i in range(6):
        if i in exchanged:
            assert not before[i], "only groups without variance are exchanged"
            assert after[i], "and only for groups with some"
            assert int(once.prompts.row[i]) == rows[i]
        else:
            assert once.rollouts.token_lists()[i] == without.rollouts.token_lists()[i]
    assert once.measurements.means()["rollout/exchanged"] == len(exchanged)
    assert once.prompts.index.tolist() == list(range(6))
    expected = data.prompts(once.prompts.row.tolist())
    for name in ("problem", "reference", "solution", "source", "prompt_ids", "privileged_ids"):
        assert getattr(once.prompts, name) == getattr(expected, name)
    num_sampled = 6 * 4 + 4 * before.count(False)
    assert once.measurements.means()["spent/completions"] == num_sampled


def test_where_nothing_better_is_drawn_columns_of_the_users_own_do_no_harm(tmp_path):
    source = replace(toy.source("train", [6]), columns=ColumnMapping(extra=["problem_source"]))
    hard = {"source": source, "num_train_problems": 12, "prompts_per_step": 2}
    batches, data = fit(tmp_path, 2, steps=2, data=hard)
    assert not any(varied(batch)[i] for batch in batches for i in range(2)), "all are cliffs"
    assert all(batch.prompts.columns == {"problem_source": ["tier6"] * 2} for batch in batches)
    assert data.prompts([]).columns == {"problem_source": []}


def test_another_draw_has_seeds_of_its_own(tmp_path, monkeypatch):
    """Else a prompt that is drawn again would be given the rollouts that it has had."""
    asked = []

    def noted(trainer, module, prompt_ids, seeds, *rest, **options):
        asked.append(seeds)
        return sample(trainer, module, prompt_ids, seeds, *rest, **options)

    monkeypatch.setattr("hdpo.callbacks.rollouts.sample", noted)
    fit(tmp_path, 2, steps=1)
    first, *more = asked
    assert len(more) == 2
    assert len({seed for seeds in asked for seed in seeds.flatten().tolist()}) == sum(seeds.numel() for seeds in asked)
    assert first.shape == (6, 4)


def test_more_budget_leaves_fewer_groups_without_variance(tmp_path):
    counts = [sum(sum(varied(b)) for b in fit(tmp_path / str(num), num)[0]) for num in (0, 1, 4)]
    assert counts[0] < counts[1] < counts[2]


def test_what_is_distilled_must_not_be_exchanged(tmp_path):
    module = toy.module(rollouts={"max_resamples": 2})
    with pytest.raises(ConfigError, match=r"rollouts.max_resamples exchanges the cliffs .* set it to 0"):
        toy.trainer(tmp_path).fit(module, datamodule=toy.datamodule(tmp_path))
