"""Which prompts are cliffs."""

import pytest

from hdpo.callbacks import CliffDetection

REWARDS = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_cliffs_mixed_and_solved_groups(scored, module, trainer):
    batch = scored(REWARDS)
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [True, False, False, True]
    means = batch.measurements.means()
    assert (means["cliff/fraction"], means["cliff/mixed"], means["cliff/solved"]) == (0.5, 0.25, 0.25)
    assert (means["cliff/fraction/easy"], means["cliff/fraction/hard"]) == (1.0, 0.0)


def test_threshold_is_a_sum_of_rewards(scored, module, trainer):
    batch = scored(REWARDS)
    CliffDetection(threshold=1.0).on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [True, True, False, True]


def test_what_could_not_be_graded_is_no_cliff(scored, module, trainer):
    """One rollout without a verdict is enough: it may have been a success."""
    outcomes = [["error", "wrong"], ["correct", "timeout"], ["correct", "correct"], ["no_answer", "wrong"]]
    batch = scored(REWARDS, outcomes)
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [False, False, False, True]
    means = batch.measurements.means()
    assert (means["cliff/ungraded"], means["cliff/mixed"], means["cliff/solved"]) == (0.25, 0.0, 0.25)


def test_a_reward_without_a_verdict_saves_no_prompt(scored, module, trainer):
    """Some verifier may hand out rewards with an error; they say nothing."""
    outcomes = [["error", "error"], ["wrong", "wrong"], ["correct", "timeout"], ["wrong", "wrong"]]
    batch = scored([[1.0, 1.0], [0.3, 0.2], [1.0, 0.0], [0.0, 0.0]], outcomes)
    CliffDetection(threshold=0.5).on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [False, True, False, True]
    means = batch.measurements.means()
    assert {name: means[f"cliff/{name}"] for name in ("fraction", "mixed", "solved", "ungraded")} == {
        "fraction": 0.5, "mixed": 0.25, "solved": 0.0, "ungraded": 0.25
    }  # fmt: skip
    assert (means["cliff/fraction/easy"], means["cliff/mixed/hard"], means["cliff/ungraded/easy"]) == (0.5, 0.5, 0.5)


def test_reference_solutions_join_the_groups_of_cliffs(scored, module, trainer):
    batch = scored(REWARDS)
    batch.prompts.solution[:] = ["four words of it", "not a cliff", "nor this", ""]
    module.tokenizer.encode = lambda text, add_special_tokens: [len(word) for word in text.split()]
    station = CliffDetection(reference_in_group=True, max_reference_tokens=5)
    station.on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [True, False, False, True]
    assert batch.off_policy.token_lists() == [[[4, 5, 2, 2, 1]], [[]], [[]], [[]]], "with the end of the turn"
    assert batch.off_policy.rewards.tolist() == [[1.0], [0.0], [0.0], [0.0]]
    assert batch.off_policy.has_verdict.tolist() == [[True], [False], [False], [False]]
    assert batch.measurements.means()["spent/solutions"] == 1
    short = CliffDetection(reference_in_group=True, max_reference_tokens=4)
    batch.off_policy = None
    short.on_train_batch_start(trainer, module, batch, 0)
    assert not batch.off_policy.has_verdict.any(), "a longer one does not join"
    batch.off_policy = None
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    assert batch.off_policy is None


def test_a_negative_threshold_is_refused():
    with pytest.raises(ValueError, match=r"cliffs.threshold"):
        CliffDetection(threshold=-1.0)
