"""Seeds, rewards and measurements of the first station."""

from types import SimpleNamespace

import pytest
import torch

from hdpo.callbacks import RolloutGeneration
from hdpo.callbacks.sampler_check import StaleSamplerError
from hdpo.errors import TrainingStopped
from hdpo.experience import Rollouts
from tests.helpers.tolerances import F32


def test_seeds_derive_from_run_step_and_global_position(module, trainer, experience, expected_seeds):
    station = RolloutGeneration(num_generations=6, max_new_tokens=5)
    station.on_train_batch_start(trainer, module, experience, 0)
    prompts, seeds, sampling = module.engine.calls[0]
    assert torch.equal(seeds, expected_seeds(5, 1, 7, [4, 5, 6, 7], 6))
    assert prompts == [[10], [11], [12], [13]]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.eos_token_ids) == (5, 1.0, (1, 3))
    assert torch.equal(experience.rollouts.rewards, (seeds & 1).float())


def test_measurements(module, trainer, experience):
    RolloutGeneration(num_generations=6, max_new_tokens=5).on_train_batch_start(trainer, module, experience, 0)
    means, rewards = experience.measurements.means(), experience.rollouts.rewards
    assert means["rollout/reward"] == pytest.approx(rewards.mean().item())
    assert means["rollout_by_source/reward/hard"] == pytest.approx(rewards[1:3].mean().item())
    assert (means["rollout/length"], means["rollout/truncated"], means["rollout/entropy"]) == (1, 0, 0.5)
    assert means["verifier/correct"] + means["verifier/wrong"] == rewards.numel()
    assert means["sampler/logprob_gap_max"] == 0


def test_the_sampler_is_checked_once_for_each_version(module, trainer, experience):
    station = RolloutGeneration(num_generations=2)
    station.on_train_batch_start(trainer, module, experience, 0)
    checked = []
    module.student.completion_logps = lambda *a, **k: checked.append(1) or []
    station.on_train_batch_start(trainer, module, experience, 1)
    assert not checked


def test_the_sampler_is_checked_again_when_it_has_taken_over_weights_between_two_steps(module, trainer, experience):
    station, checked = RolloutGeneration(num_generations=2, temperature=1.7, num_checked_sequences=3), []
    right = module.student.completion_logps

    def watched(sequences, **options):
        checked.append((sequences, options["temperature"]))
        return right(sequences, **options)

    module.student.completion_logps = watched
    for version, number in ((0, 1), (0, 1), (1, 2), (1, 2), (2, 3)):
        module.engine.sync_version = lambda version=version: version
        station.on_train_batch_start(trainer, module, experience, 0)
        assert len(checked) == number, "after each synchronisation, and only then"
    sequences, temperature = checked[0]
    assert temperature == 1.7, "that of the rollouts"
    # The first completions of the first prompts, with the prompts that they were sampled for.
    assert sequences.prompt_ids == [[10], [11], [12]]
    assert sequences.completion_ids == [group[0] for group in experience.rollouts.token_lists()[:3]]


def test_a_gap_is_the_mean_of_absolute_differences(module, trainer, experience):
    station = RolloutGeneration(num_generations=2, num_checked_sequences=4, max_logprob_gap=0.25)
    gaps = iter([0.3, -0.3, 0.1, -0.1])
    module.student.completion_logps = lambda sequences, **_: [
        torch.full((1,), -0.5 + next(gaps)) for _ in sequences.prompt_ids
    ]
    station.on_train_batch_start(trainer, module, experience, 0)
    means = experience.measurements.means()
    assert means["sampler/logprob_gap_mean"] == pytest.approx(0.2, rel=8 * F32)
    assert means["sampler/logprob_gap_max"] == pytest.approx(0.3, rel=8 * F32)
    # One prompt off, however near the others are.
    module.engine.sync_version = lambda: 1
    module.student.completion_logps = lambda sequences, **_: [
        torch.full((1,), -0.5 - 1.2 * (i == 2)) for i in range(len(sequences.prompt_ids))
    ]
    with pytest.raises(StaleSamplerError, match=r"differ from the policy's by 0.3 nats per token"):
        station.on_train_batch_start(trainer, module, experience, 0)


def test_no_sequence_is_compared_where_none_is_wanted(module, trainer, experience):
    module.student.completion_logps = lambda *_, **__: pytest.fail("not wanted")
    RolloutGeneration(num_generations=2, num_checked_sequences=0).on_train_batch_start(trainer, module, experience, 0)


def test_means_are_over_what_each_is_about(experience):
    lengths = torch.tensor([[1, 4], [2, 2], [3, 1], [4, 4]])
    mask = torch.arange(4) < lengths[..., None]
    outcomes = [["correct", "wrong"], ["error", "timeout"], ["no_answer", "correct"], ["wrong", "error"]]
    rewards = torch.tensor([[1.0, 0.25], [0.75, 0.5], [0.0, 1.0], [0.5, 1.0]])
    truncated = torch.tensor([[0, 1], [0, 0], [0, 1], [1, 1]]).bool()
    # One has no part called "short"; those of the ungraded say nothing.
    parts = [
        [{"right": 1.0, "short": 4.0}, {"right": 0.5, "short": 0.0}],
        [{}, {"right": 99.0}],
        [{"right": 0.0, "short": 2.0}, {"right": 1.0}],
        [{"right": 0.0, "short": 3.0}, {"short": 99.0}],
    ]
    experience.rollouts = Rollouts(mask.long(), mask, -0.5 * mask, truncated, rewards, outcomes, [], parts=parts)
    RolloutGeneration()._measure(experience, experience.rollouts)
    means = experience.measurements.means()
    # Five verdicts; what was not graded has no reward, whatever stands there.
    assert means["rollout/reward"] == pytest.approx((1 + 0.25 + 0 + 1 + 0.5) / 5)
    assert means["rollout_by_source/reward/hard"] == pytest.approx((0 + 1) / 2)
    assert means["rollout_by_source/reward/easy"] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert means["rollout/length"] == 21 / 8
    assert means["rollout/truncated"] == 4 / 8
    assert means["rollout/entropy"] == 0.5, "per token"
    assert means["rollout/terminated_length"] == (1 + 2 + 2 + 3) / 4
    # Of the two groups with two verdicts; the other two say nothing about a spread.
    assert means["rollout/reward_std"] == pytest.approx((0.75 + 1) / 2 / 2**0.5)
    shares = {"correct": 2, "wrong": 2, "no_answer": 1, "timeout": 1, "error": 2, "invalid_reference": 0}
    assert {name: means[f"rollout/{name}"] * 8 for name in shares} == shares
    named = {name: value for name, value in means.items() if name.startswith("reward/")}
    assert named == {"reward/right": (1 + 0.5 + 0 + 1 + 0) / 5, "reward/short": (4 + 0 + 2 + 3) / 4}


def test_an_evaluation_checks_a_version_that_no_step_has_checked(module, trainer, experience):
    station, checked = RolloutGeneration(num_val_samples=2, val_temperature=0.7), []
    right = module.student.completion_logps

    def watched(sequences, **options):
        checked.append(options["temperature"])
        return right(sequences, **options)

    module.student.completion_logps = watched
    station.on_validation_batch_start(trainer, module, experience, 0)
    station.on_validation_batch_start(trainer, module, experience, 1)
    assert checked == [0.7], "once, and with the temperature that was sampled"
    station.on_train_batch_start(trainer, module, experience, 0)
    assert checked == [0.7, 1.0], "a training step logs the gap of its own rollouts"
    station.on_predict_batch_start(trainer, module, experience, 0)
    assert len(checked) == 2
    module.engine.sync_version = lambda: 1
    module.student.completion_logps = lambda sequences, **_: [torch.full((1,), -3.0) for _ in sequences.prompt_ids]
    with pytest.raises(StaleSamplerError, match="the sampler's log-probabilities differ"):
        station.on_test_batch_start(trainer, module, experience, 0)


def test_a_gap_that_is_not_a_number_stops_the_run(module, trainer, experience):
    module.student.completion_logps = lambda sequences, **_: [
        torch.tensor([float("nan")]) for _ in sequences.prompt_ids
    ]
    with pytest.raises(TrainingStopped, match="the policy's log-probabilities are not finite after step 7"):
        RolloutGeneration(num_generations=2).on_train_batch_start(trainer, module, experience, 0)


def test_evaluation_uses_the_row_and_never_the_step(module, trainer, experience, expected_seeds):
    station = RolloutGeneration(num_val_samples=5, val_max_new_tokens=9)
    station.on_validation_batch_start(trainer, module, experience, 0)
    (_, sampled, first), (_, greedy, second) = module.engine.calls
    assert torch.equal(sampled, expected_seeds(5, 3, 0, [40, 50, 60, 70], 5))
    assert greedy.shape == (4, 1)
    assert (first.temperature, second.temperature, first.max_new_tokens) == (1.0, 0.0, 9)
    assert experience.greedy.rewards.tolist() == [[1.0]] * 4


def test_a_k_beyond_the_samples_is_refused(module, trainer):
    with pytest.raises(ValueError, match=r"model.pass_k asks for pass@2, but rollouts.num_val_samples is 1"):
        RolloutGeneration(num_val_samples=1).setup(trainer, module, "fit")
    # One set with enough samples of its own is enough.
    trainer.datamodule = SimpleNamespace(evaluation_groups={"aime24": 2, "math500": None})
    RolloutGeneration(num_val_samples=1).setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_generations", 1),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("val_temperature", -1.0),
        ("num_val_samples", 0),
    ],
)
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ValueError, match=f"rollouts.{option}"):
        RolloutGeneration(**{option: value})
