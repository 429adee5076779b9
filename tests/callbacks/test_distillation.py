"""Which privileged rollouts are sampled, which are kept, and how long the buffer lives."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from hdpo.callbacks import CliffDetection, DistillationRefresh
from hdpo.experience import Completions
from hdpo.generation.engine import SamplingConfig
from hdpo.losses import JSD, ForwardKL, UpdateConfig
from hdpo.rewards import Grade, Outcome, Verifier


class StartsWith(str):
    """Equal to every text that begins with it."""

    def __eq__(self, other):
        return other.startswith(str(self))

    __hash__ = str.__hash__


ANY_NEAR_LN2 = StartsWith("the first distillation loss is 0.690 nats, near the divergence's maximum of 0.693")
REWARDS = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def detected(scored, module, trainer, rewards=REWARDS):
    batch = scored(rewards)
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    return batch


def test_only_correct_privileged_rollouts_of_cliffs_are_kept(scored, module, trainer, expected_seeds):
    batch = detected(scored, module, trainer)
    DistillationRefresh(num_privileged=4, topk=8).on_train_batch_start(trainer, module, batch, 0)
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
    means = batch.measurements.means()
    assert means["privileged/pass_rate"] == pytest.approx(right.float().mean().item())
    assert means["privileged/kept"] == means["privileged/tokens"] == sum(hits.values())
    assert means["privileged/copy_rate"] == 1.0
    assert batch.privileged.positions == [0, 1, 3]
    assert torch.equal(batch.privileged.rollouts.rewards, right.float())


class Partial(Verifier):
    """Rewards and outcomes by the seed-dependent text: each prompt gets all four kinds."""

    kinds = ((Outcome.CORRECT, 1.0), (Outcome.WRONG, 0.6), (Outcome.ERROR, 1.0), (Outcome.WRONG, 0.4))

    def __init__(self, kinds=kinds):
        self.kinds = kinds

    def grade(self, completions, references, **columns):
        return [Grade(*self.kinds[i % 4]) for i in range(len(completions))]

    def usable(self, references, **columns):
        return [True for _ in references]


@pytest.mark.parametrize(("success_reward", "kept"), [(1.0, [0]), (0.5, [0, 1]), (0.0, [0, 1, 3])])
def test_what_reaches_the_reward_is_kept_if_there_is_a_verdict(scored, module, trainer, success_reward, kept):
    batch = detected(scored, module, trainer)
    module.verifier = Partial()
    station = DistillationRefresh(num_privileged=4, success_reward=success_reward, topk=8)
    station.on_train_batch_start(trainer, module, batch, 0)
    ids = batch.privileged.rollouts.token_lists()
    expected = [(10 + p, ids[j][s]) for j, p in enumerate((0, 1, 3)) for s in kept]
    assert [(entry[0][0], entry[2]) for entry in station._buffer] == expected
    assert [entry[3] for entry in station._buffer] == [4 + p for p in (0, 1, 3) for _ in kept]
    means = batch.measurements.means()
    assert means["privileged/kept"] == 3 * len(kept)
    assert means["privileged/pass_rate"] == pytest.approx(len(kept) / 3), "of those with a verdict"
    assert means["privileged_by_source/pass_rate/easy"] == means["privileged/pass_rate"]
    assert means["privileged/length"] == 1
    assert means["privileged/truncated"] == 0


def test_what_is_correct_is_kept_whatever_its_reward(scored, module, trainer):
    batch = detected(scored, module, trainer)
    kinds = ((Outcome.CORRECT, 0.2), (Outcome.WRONG, 1.5), (Outcome.ERROR, 1.0), (Outcome.CORRECT, 2.0))
    module.verifier = Partial(kinds)
    DistillationRefresh(num_privileged=4, topk=8).on_train_batch_start(trainer, module, batch, 0)
    means = batch.measurements.means()
    assert means["privileged/kept"] == 3 * 2
    assert means["privileged/pass_rate"] == pytest.approx(2 / 3), "of those with a verdict"


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_rollouts_are_kept_unless_the_loss_masks_them(scored, module, trainer, masked):
    batch = detected(scored, module, trainer)
    module.policy_loss.mask_truncated = masked
    generate = module.engine.generate

    def cut(*arguments, **options):
        completions = generate(*arguments, **options)
        completions.truncated[:, 0] = True
        return completions

    module.engine.generate, module.verifier = cut, Partial()
    station = DistillationRefresh(num_privileged=4, success_reward=0.0, topk=8)
    station.on_train_batch_start(trainer, module, batch, 0)
    assert len(station._buffer) == 3 * (2 if masked else 3)
    assert batch.measurements.means()["privileged/truncated"] == 0.25


def test_how_privileged_rollouts_are_sampled(scored, module, trainer):
    batch, texts = detected(scored, module, trainer), []
    module.tokenizer.encode = lambda text, add_special_tokens: texts.append(text) or []
    DistillationRefresh(max_new_tokens=33, temperature=0.7).on_train_batch_start(trainer, module, batch, 0)
    assert module.engine.calls[0][2] == SamplingConfig(33, 0.7, (1, 3))
    assert texts == [batch.prompts.solution[i] for i in (0, 1, 3)], "the solutions are what they may repeat"
    assert batch.measurements.means()["spent/solutions"] == 3


@pytest.mark.parametrize("sampled_by", ["current", "initial", "ema"])
def test_who_samples(scored, module, trainer, sampled_by):
    batch, samplers, generate = detected(scored, module, trainer), [], module.engine.generate
    policies = {"current": module.student, "initial": object(), "ema": object()}
    module.initial = SimpleNamespace(policy=lambda student: policies["initial"])
    module.teacher.policy = lambda student: policies["ema"] if len(samplers) == 0 else student
    module.engine.generate = lambda policy, *rest: samplers.append(policy) or generate(policy, *rest)
    DistillationRefresh(topk=8, sampled_by=sampled_by).on_train_batch_start(trainer, module, batch, 0)
    assert samplers == [policies[sampled_by]]


def test_equal_completions_of_different_prompts_are_read_apart(scored, module, trainer):
    batch = detected(scored, module, trainer)
    module.verifier = Partial()
    # Two cliffs that are the same problem, and a third.
    for name in ("prompt_ids", "privileged_ids"):
        getattr(batch.prompts, name)[1] = list(getattr(batch.prompts, name)[0])
    module.engine.generate = lambda policy, prompts, seeds, *_: Completions(
        torch.full((*seeds.shape, 1), 5),
        torch.ones(*seeds.shape, 1).bool(),
        torch.zeros(*seeds.shape, 1),
        torch.zeros(seeds.shape).bool(),
    )
    station = DistillationRefresh(num_privileged=4, success_reward=0.5, topk=8)
    station.on_train_batch_start(trainer, module, batch, 0)
    assert batch.distillation.index == [4, 5, 7], "a minibatch holds a prompt's own"
    assert batch.distillation.counts == [2, 2, 2]
    assert batch.distillation.student.completion_ids == [[5]] * 3


def test_the_teacher_reads_the_privileged_contexts(scored, module, trainer):
    batch, read = detected(scored, module, trainer), []

    class Teacher(type(module.student)):
        def forward(self, tokens, *, topk):
            read.append((tokens.input_ids.tolist(), topk))
            return super().forward(tokens, topk=topk)

    teacher = Teacher()
    module.teacher.policy = lambda student: teacher
    module.update = UpdateConfig(micro_batch_tokens=10**6)
    station = DistillationRefresh(num_privileged=4, topk=8)
    station.on_train_batch_start(trainer, module, batch, 0)
    ((rows, k),) = read
    assert k == 8
    expected = zip(batch.distillation.privileged.prompt_ids, batch.distillation.privileged.completion_ids, strict=True)
    assert sorted(rows) == sorted(p + c for p, c in expected)
    assert all(9 in row for row in rows)


def test_a_refresh_replaces_the_buffer(scored, module, trainer):
    station = DistillationRefresh(num_privileged=4, topk=8)
    for step in (7, 8):
        trainer.global_step = step
        batch = detected(scored, module, trainer)
        station.on_train_batch_start(trainer, module, batch, 0)
        assert batch.distillation.num_tokens == batch.measurements.means()["privileged/kept"] == len(station._buffer)
        batch.measurements.__init__()


def test_weight_zero_does_nothing_but_free_the_engine(scored, module, trainer):
    module.distillation_weight = 0.0
    batch = detected(scored, module, trainer)
    DistillationRefresh().on_train_batch_start(trainer, module, batch, 0)
    assert module.engine.calls == ["released"]
    assert batch.distillation is None


def test_no_cliffs_at_all(scored, module, trainer):
    batch = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
    DistillationRefresh().on_train_batch_start(trainer, module, batch, 0)
    assert module.engine.calls == ["released"]
    assert batch.distillation is None
    assert batch.measurements.means()["privileged/kept"] == 0


def test_the_limit_takes_the_first_of_the_global_batch(scored, module, trainer):
    batch = detected(scored, module, trainer)
    batch.prompts.index = torch.tensor([7, 5, 6, 4])
    DistillationRefresh(max_cliffs_per_step=2).on_train_batch_start(trainer, module, batch, 0)
    assert module.engine.calls[0][0] == [[11, 9], [13, 9]]
    assert batch.measurements.means()["privileged/over_limit"] == 1


def test_prompts_that_are_too_long_are_skipped_and_counted(scored, module, trainer):
    batch = detected(scored, module, trainer)
    batch.prompts.privileged_ids[1] = []
    DistillationRefresh().on_train_batch_start(trainer, module, batch, 0)
    assert module.engine.calls[0][0] == [[10, 9], [13, 9]]
    assert batch.measurements.means()["privileged/too_long"] == 1


@pytest.mark.parametrize(("options", "trains_context", "reads"), [
    ({"completions": "reference", "target": "token"}, False, False),
    ({"completions": "failures", "target": "token"}, False, False),
    ({"completions": "reference"}, False, True),
    ({"completions": "reference", "target": "token"}, True, True),
    ({"target": "token"}, False, True),
])  # fmt: skip
def test_a_context_that_is_too_long_matters_where_somebody_reads_it(
    scored, module, trainer, options, trains_context, reads
):
    batch = detected(scored, module, trainer)
    batch.prompts.privileged_ids[1] = []
    module.privileged_policy_weight = float(trains_context)
    station = DistillationRefresh(topk=8, success_reward=0.0, **options)
    station.on_train_batch_start(trainer, module, batch, 0)
    assert {entry.position for entry in station._buffer} == ({4, 7} if reads else {4, 5, 7})
    assert batch.measurements.means()["privileged/too_long"] == float(reads)


def test_what_succeeded_is_no_failure(scored, module, trainer):
    """A threshold may make a cliff of a prompt that has a success."""
    batch = scored([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    batch.rollouts.completion_ids[:, 1] = 5
    CliffDetection(threshold=1.0).on_train_batch_start(trainer, module, batch, 0)
    station = DistillationRefresh(completions="failures", topk=8)
    station.on_train_batch_start(trainer, module, batch, 0)
    assert [(entry.position, entry.completion) for entry in station._buffer] == [(4, [0]), (6, [0]), (6, [5])]
    assert batch.measurements.means()["privileged/kept"] == 3


def test_a_buffer_that_lives_three_steps_and_is_restored(scored, module, trainer):
    station = DistillationRefresh(refresh_every=3, topk=8)
    trainer.global_step = 6
    first = detected(scored, module, trainer)
    station.on_train_batch_start(trainer, module, first, 0)
    kept = first.distillation.student
    module.engine.calls.clear()
    trainer.global_step = 7
    restored = DistillationRefresh(refresh_every=3, topk=8)
    restored.load_state_dict(station.state_dict())
    for callback in (station, restored):
        second = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
        callback.on_train_batch_start(trainer, module, second, 0)
        assert second.distillation.student == kept
    assert module.engine.calls == ["released", "released"], "nothing is sampled between refreshes"
    trainer.global_step = 9
    third = detected(scored, module, trainer, [[1.0, 1.0]] * 4)
    station.on_train_batch_start(trainer, module, third, 0)
    assert third.distillation is None
    trainer.global_step = 10
    station.on_train_batch_start(trainer, module, third, 0)
    assert third.distillation is None, "the buffer was refreshed with nothing"


def test_a_divergence_at_its_maximum_warns_once(scored, module, trainer):
    station = DistillationRefresh()
    batch = scored(REWARDS)
    batch.metrics["loss/distillation"] = 0.69
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            station.on_train_batch_end(trainer, module, None, batch, 0)
    assert [str(w.message) for w in caught] == [ANY_NEAR_LN2]


@pytest.mark.parametrize(("divergence", "value"), [(JSD(), 0.6), (ForwardKL(), 0.69)])
def test_other_divergences_and_values_do_not_warn(scored, module, trainer, recwarn, divergence, value):
    batch = scored(REWARDS)
    batch.metrics["loss/distillation"] = value
    module.divergence = divergence
    DistillationRefresh().on_train_batch_end(trainer, module, None, batch, 0)
    assert not len(recwarn)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_privileged", 0), ("topk", 0), ("refresh_every", 0), ("max_cliffs_per_step", -1), ("temperature", 0.0)],
)
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ValueError, match=f"distillation.{option}"):
        DistillationRefresh(**{option: value})


def test_only_a_solution_that_the_context_shows_is_a_draft(scored, module, trainer, monkeypatch):
    """Contexts `answer` and `hint` do not show it: a completion would not repeat it."""
    given = []
    monkeypatch.setattr(type(module.engine), "generate", _noting(type(module.engine).generate, given))
    texts = {10: "so:\n 1 + 1\n= 2 is it", 11: "the answer is 2", 13: "1 + 1"}
    monkeypatch.setattr(module.tokenizer, "batch_decode", lambda ids, **_: [texts.get(i[0], "") for i in ids], False)
    monkeypatch.setattr(module.tokenizer, "encode", lambda text, **_: [len(text)] if text else [], False)
    batch = detected(scored, module, trainer)
    batch.prompts.solution[:] = ["1 + 1 = 2"] * len(batch)
    DistillationRefresh(num_privileged=4, topk=8).on_train_batch_start(trainer, module, batch, 0)
    assert given == [[[9], [], []]]


def _noting(generate, given):
    def noted(self, policy, prompts, seeds, sampling, drafts=None):
        given.append(drafts)
        return generate(self, policy, prompts, seeds, sampling)

    return noted
