"""Seeds, rewards and measurements of the first station."""

import pytest
import torch

from hdpo.callbacks import RolloutGeneration


def test_seeds_derive_from_run_step_and_global_position(module, trainer, experience, expected_seeds):
    station = RolloutGeneration(num_generations=6, max_new_tokens=5, seed=3)
    station.on_train_batch_start(trainer, module, experience, 0)
    prompts, seeds, sampling = module.engine.calls[0]
    assert torch.equal(seeds, expected_seeds(3, 1, 7, [4, 5, 6, 7], 6))
    assert prompts == [[10], [11], [12], [13]]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.eos_token_ids) == (5, 1.0, (1, 3))
    assert torch.equal(experience.rollouts.rewards, (seeds & 1).float())


def test_measurements(module, trainer, experience):
    RolloutGeneration(num_generations=6, max_new_tokens=5).on_train_batch_start(trainer, module, experience, 0)
    means, rewards = experience.statistics.means(), experience.rollouts.rewards
    assert means["rollout/reward"] == pytest.approx(rewards.mean().item())
    assert means["rollout/reward/hard"] == pytest.approx(rewards[1:3].mean().item())
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
    with pytest.raises(RuntimeError, match="the sampler's log-probabilities differ"):
        station.on_test_batch_start(trainer, module, experience, 0)


def test_a_gap_that_is_not_a_number_stops_the_run(module, trainer, experience):
    module.student.completion_logps = lambda sequences, **_: [
        torch.tensor([float("nan")]) for _ in sequences.prompt_ids
    ]
    with pytest.raises(RuntimeError, match="the sampler's log-probabilities differ"):
        RolloutGeneration(num_generations=2).on_train_batch_start(trainer, module, experience, 0)


def test_evaluation_uses_the_row_and_never_the_step(module, trainer, experience, expected_seeds):
    station = RolloutGeneration(num_val_samples=5, val_max_new_tokens=9, seed=2)
    station.on_validation_batch_start(trainer, module, experience, 0)
    (_, sampled, first), (_, greedy, second) = module.engine.calls
    assert torch.equal(sampled, expected_seeds(2, 3, 0, [40, 50, 60, 70], 5))
    assert greedy.shape == (4, 1)
    assert (first.temperature, second.temperature, first.max_new_tokens) == (1.0, 0.0, 9)
    assert experience.greedy.rewards.tolist() == [[1.0]] * 4


def test_a_k_beyond_the_samples_is_refused(module, trainer):
    with pytest.raises(ValueError, match=r"model.pass_k asks for pass@2, but rollouts.num_val_samples is 1"):
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
