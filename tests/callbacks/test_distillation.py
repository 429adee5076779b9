"""Which privileged rollouts are sampled, which are kept, and how long the buffer lives."""

import pytest
import torch

from hdpo.callbacks import CliffDetection, DistillationRefresh

REWARDS = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def detected(scored, module, trainer, rewards=REWARDS):
    batch = scored(rewards)
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    return batch


def refresh(station, trainer, module, batch):
    """What a training step does with the station."""
    batch.distillation = None
    station.on_train_batch_start(trainer, module, batch, 0)
    assert batch.distillation is None, "answers may still be graded"
    if batch.finish_distillation is not None:
        batch.finish_distillation()


def test_only_correct_privileged_rollouts_of_cliffs_are_kept(scored, module, trainer, expected_seeds):
    batch = detected(scored, module, trainer)
    refresh(DistillationRefresh(num_privileged=4, topk=8, seed=5), trainer, module, batch)
    prompts, seeds, _ = module.engine.calls[0]
    assert prompts == [[10, 9], [11, 9], [13, 9]]
    assert torch.equal(seeds, expected_seeds(5, 2, 7, [4, 5, 7], 4))
    right = (seeds & 1).bool()
    hits = {answer: int(row.sum()) for answer, row in zip((10, 11, 13), right, strict=True) if row.any()}
    assert max(hits.values()) > 1
    expected = [[answer] for answer in hits]
    distillation = batch.distillation
    assert distillation.counts == list(hits.values()), "equal rollouts are read once and counted"
    assert distillation.num_tokens == sum(hits.values())
    assert distillation.student.completion_ids == expected
    assert distillation.student.prompt_ids == expected  # the student's context is the bare answer here
    assert distillation.privileged.prompt_ids == [[a, 9] for (a,) in expected]
    assert [t.shape for t in distillation.topk_ids] == [(1, 8)] * len(expected)
    means = batch.statistics.means()
    assert means["privileged/pass_rate"] == pytest.approx(right.float().mean().item())
    assert means["privileged/kept"] == means["privileged/tokens"] == sum(hits.values())
    assert means["privileged/copy_rate"] == 1.0
    assert set(batch.privileged_texts) == {0, 1, 3}


def test_weight_zero_does_nothing_but_free_the_engine(scored, module, trainer):
    module.distillation_weight = 0.0
    batch = detected(scored, module, trainer)
    refresh(DistillationRefresh(), trainer, module, batch)
    assert module.engine.calls == ["after"]
    assert batch.distillation is None


def test_no_cliffs_at_all(scored, module, trainer):
    batch = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
    refresh(DistillationRefresh(), trainer, module, batch)
    assert module.engine.calls == ["after"]
    assert batch.distillation is None
    assert batch.statistics.means()["privileged/kept"] == 0


def test_the_limit_takes_the_first_of_the_global_batch(scored, module, trainer):
    batch = detected(scored, module, trainer)
    batch.prompts.index = torch.tensor([7, 5, 6, 4])
    refresh(DistillationRefresh(max_cliffs_per_step=2), trainer, module, batch)
    assert module.engine.calls[0][0] == [[11, 9], [13, 9]]
    assert batch.statistics.means()["privileged/over_limit"] == 1


def test_prompts_that_are_too_long_are_skipped_and_counted(scored, module, trainer):
    batch = detected(scored, module, trainer)
    batch.prompts.privileged_ids[1] = []
    refresh(DistillationRefresh(), trainer, module, batch)
    assert module.engine.calls[0][0] == [[10, 9], [13, 9]]
    assert batch.statistics.means()["privileged/too_long"] == 1


def test_a_buffer_that_lives_three_steps_and_is_restored(scored, module, trainer):
    station = DistillationRefresh(refresh_every=3, topk=8)
    trainer.global_step = 6
    first = detected(scored, module, trainer)
    refresh(station, trainer, module, first)
    kept = first.distillation.student
    module.engine.calls.clear()
    trainer.global_step = 7
    restored = DistillationRefresh(refresh_every=3, topk=8)
    restored.load_state_dict(station.state_dict())
    for callback in (station, restored):
        second = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
        refresh(callback, trainer, module, second)
        assert second.distillation.student == kept
    assert module.engine.calls == ["after", "after"], "nothing is sampled between refreshes"
    trainer.global_step = 9
    third = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
    third.finish_distillation = None
    refresh(station, trainer, module, third)
    assert third.distillation is None
    trainer.global_step = 10
    third.finish_distillation = None
    refresh(station, trainer, module, third)
    assert third.distillation is None, "the buffer was refreshed with nothing"


def test_a_divergence_at_its_maximum_warns_once(scored, module, trainer):
    station = DistillationRefresh()
    batch = scored(REWARDS)
    batch.metrics["loss/distillation"] = 0.69
    with pytest.warns(UserWarning, match="near the JSD's maximum"):
        station.on_train_batch_end(trainer, module, None, batch, 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_privileged", 0), ("topk", 0), ("refresh_every", 0), ("max_cliffs_per_step", -1), ("temperature", 0.0)],
)
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ValueError, match=f"distillation.{option}"):
        DistillationRefresh(**{option: value})
