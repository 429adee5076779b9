"""Which prompts are cliffs."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from hdpo.callbacks import CliffDetection, CliffReplay, LastCheckpoint, Station
from hdpo.callbacks.history import CliffHistory, Visit
from hdpo.measurements import Measurements
from tests.helpers import toy

REWARDS = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_cliffs_mixed_and_solved_groups(scored, module, trainer):
    batch = scored(REWARDS)
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [True, False, False, True]
    means = batch.measurements.means()
    assert (means["cliff/fraction"], means["cliff/mixed"], means["cliff/solved"]) == (0.5, 0.25, 0.25)
    assert (means["cliff_by_source/fraction/easy"], means["cliff_by_source/fraction/hard"]) == (1.0, 0.0)


def test_threshold_is_a_sum_of_rewards(scored, module, trainer):
    batch = scored(REWARDS)
    CliffDetection(threshold=1.0).on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == [True, True, False, True]


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_the_verifier_says_what_a_success_is_unless_a_threshold_does(scored, module, trainer, threshold):
    """Rewards of several parts: a wrong answer may have one, and a right one none."""
    outcomes = [["wrong", "no_answer"], ["wrong", "correct"], ["wrong", "error"], ["correct", "correct"]]
    batch = scored([[0.3, 0.1], [0.0, -0.5], [0.4, 0.0], [0.0, 0.0]], outcomes)
    CliffDetection(threshold).on_train_batch_start(trainer, module, batch, 0)
    assert batch.is_cliff.tolist() == ([True, False, False, False] if threshold is None else [False, True, False, True])
    means = batch.measurements.means()
    assert means["cliff/ungraded"] == (0.25 if threshold is None else 0.0)
    assert means["cliff/solved"] == (0.25 if threshold is None else 0.0)


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
    assert (
        means["cliff_by_source/fraction/easy"],
        means["cliff_by_source/mixed/hard"],
        means["cliff_by_source/ungraded/easy"],
    ) == (0.5, 0.5, 0.5)


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


# Former cliffs


def seen(history, step, outcomes, distilled=()):
    """A step with prompts {row: outcomes}, or pairs of them; "+" is a success, "-" a failure, "?" no verdict."""
    pairs = list(outcomes.items()) if isinstance(outcomes, dict) else outcomes
    success, verdict = (torch.tensor([[x in marks for x in text] for _, text in pairs]) for marks in ("+", "+-"))
    batch = SimpleNamespace(
        prompts=SimpleNamespace(
            row=torch.tensor([row for row, _ in pairs]), source=["odd" if r % 2 else "even" for r, _ in pairs]
        ),
        rollouts=SimpleNamespace(success=success, has_verdict=verdict, num_generations=success.shape[1]),
        is_cliff=verdict.all(-1) & ~success.any(-1),
        measurements=Measurements(),
    )
    history.visit(batch, step)
    history.distil(distilled, step)
    history.finish()
    return batch.measurements.means()


def test_former_cliffs_and_the_steps_that_they_took():
    history = CliffHistory()
    first = seen(history, 3, {1: "--", 2: "--", 3: "+-", 4: "-?", 6: "--"}, distilled=[2])
    assert first == {"cliff/seen_again": 0, "cliff_by_source/seen_again/odd": 0, "cliff_by_source/seen_again/even": 0}
    assert sorted(history.visits) == [1, 2, 6], "what was not graded is no cliff"
    means = seen(history, 10, {1: "++", 2: "--", 3: "--", 4: "++"})
    assert (means["cliff/seen_again"], means["cliff/converted"], means["cliff/steps_to_success"]) == (0.5, 0.5, 7)
    assert (means["cliff_by_source/converted/odd"], means["cliff_by_source/converted/even"]) == (1, 0)
    assert (means["cliff/converted_distilled"], means["cliff_by_source/converted_distilled/even"]) == (0, 0)
    assert "cliff_by_source/steps_to_success/even" not in means
    means = seen(history, 15, {1: "+-", 2: "-+", 3: "--", 6: "?-"})
    assert means["cliff/seen_again"] == 1
    assert means["cliff/converted"] == pytest.approx(2 / 3), "of the fourth nothing is known"
    assert means["cliff/converted_distilled"] == 1
    assert means["cliff/steps_to_success"] == 12, "the first success alone: it is the second of row 1"
    assert history.visits == {
        1: [Visit(3, 0, 2), Visit(10, 2, 2), Visit(15, 1, 2)],
        2: [Visit(3, 0, 2), Visit(10, 0, 2), Visit(15, 1, 2)],
        3: [Visit(10, 0, 2), Visit(15, 0, 2)],
        6: [Visit(3, 0, 2), Visit(15, 0, 1)],
    }
    assert history.distilled == {2: 3}


def test_a_success_counts_where_a_verdict_is_missing_and_a_problem_may_stand_in_a_batch_twice():
    history = CliffHistory()
    seen(history, 0, {8: "--"})
    means = seen(history, 4, [(8, "+?"), (8, "--"), (9, "--"), (9, "+-")])
    assert (means["cliff/seen_again"], means["cliff/converted"], means["cliff/steps_to_success"]) == (0.5, 0.5, 4)
    assert history.visits == {8: [Visit(0, 0, 2), Visit(4, 1, 3)], 9: [Visit(4, 0, 2)]}


def test_the_history_goes_through_a_checkpoint(tmp_path):
    history, restored = CliffHistory(), CliffDetection()
    torch.save(history.state_dict(), tmp_path / "empty.pt")
    restored.load_state_dict(torch.load(tmp_path / "empty.pt", weights_only=True))
    assert (restored.history.visits, restored.history.distilled) == ({}, {})
    seen(history, 3, {5: "--", 2: "--"})
    seen(history, 4, {5: "+-"}, distilled=[5, 7])
    station = CliffDetection()
    station.history = history
    torch.save(station.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.history.visits == history.visits
    assert restored.history.visits[7] == [Visit(4, 0, 0)], "a cliff of somebody else's making"
    assert restored.history.distilled == {5: 4, 7: 4}


class Steps(Callback):
    """What is needed to find the former cliffs of a run again."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        index = set(batch.distillation.index if batch.distillation else [])
        self.steps.append(
            (
                batch.prompts.row.tolist(),
                batch.rollouts.outcomes,
                {
                    row
                    for row, i in zip(batch.prompts.row.tolist(), batch.prompts.index.tolist(), strict=True)
                    if i in index
                },
                {name: value for name, value in batch.metrics.items() if name.startswith("cliff/")},
            )
        )


def test_in_a_run_former_cliffs_are_those_of_earlier_steps_also_after_a_resume(tmp_path):
    def fit(folder, steps, ckpt_path=None):
        tape = Steps()
        trainer = toy.trainer(folder, tape, LastCheckpoint(every_n_steps=4), max_steps=steps, limit_val_batches=0)
        module = toy.module(optimizer=lambda p: torch.optim.SGD(p, lr=0.01), distillation={"max_cliffs_per_step": 2})
        # Few problems: they come again after two or three steps.
        data = toy.datamodule(tmp_path, source=toy.source("train", [4, 5]), num_train_problems=12)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return tape.steps, module.cliffs.history

    steps, history = fit(tmp_path / "a", 8)
    visits, distilled, found = defaultdict(list), {}, 0
    for step, (rows, outcomes, kept, metrics) in enumerate(steps):
        former = [(row, "correct" in group) for row, group in zip(rows, outcomes, strict=True) if row in visits]
        expected = [success for _, success in former]
        assert metrics["cliff/seen_again"] == pytest.approx(len(former) / len(rows))
        assert metrics.get("cliff/converted") == (pytest.approx(sum(expected) / len(expected)) if former else None)
        known = [success for row, success in former if row in distilled]
        assert metrics.get("cliff/converted_distilled") == (pytest.approx(sum(known) / len(known)) if known else None)
        first = [step - visits[r][0][0] for r, success in former if success and not any(v[1] for v in visits[r])]
        assert metrics.get("cliff/steps_to_success") == (pytest.approx(sum(first) / len(first)) if first else None)
        found += len(first)
        for row, group in zip(rows, outcomes, strict=True):
            if row in visits or set(group) <= {"wrong", "no_answer"}:
                visits[row].append((step, group.count("correct"), len(group)))
        distilled |= dict.fromkeys(kept, step)
    assert found > 0, "somebody must have come back up"
    assert history.visits == visits
    assert history.distilled == distilled
    fit(tmp_path / "b", 4)
    (checkpoint,) = (tmp_path / "b").rglob("last.ckpt")
    rest, resumed = fit(tmp_path / "b", 8, checkpoint)
    assert [step[3] for step in rest] == [step[3] for step in steps[4:]]
    assert (resumed.visits, resumed.distilled) == (history.visits, history.distilled)


@pytest.mark.parametrize(("goes_on", "expected"), [(False, [0]), (True, [0, 1])])
def test_a_second_fit_remembers_no_cliffs_of_another_run(tmp_path, goes_on, expected):
    module, data = toy.module(distillation_weight=0.0), toy.datamodule(tmp_path)
    trainers = [toy.trainer(tmp_path, max_steps=1, limit_val_batches=0) for _ in range(2)]
    trainers[0].fit(module, datamodule=data)
    trainers[0].fit_loop.epoch_loop.max_steps = 2
    trainers[0 if goes_on else 1].fit(module, datamodule=data)
    visits = [visit.step for visits in module.cliffs.history.visits.values() for visit in visits]
    assert sorted(set(visits)) == expected
    assert len(visits) <= 6 * len(expected), "no prompt of a batch is visited twice"


class BreaksOff(Station):
    """Fails once, right before a step's update or right after it, and notes where evaluations are made."""

    def __init__(self, step=None, late=False):
        self.step, self.late, self.evaluated = step, late, []

    def after_distillation(self, trainer, pl_module, batch):
        if not self.late and trainer.global_step == self.step:
            raise RuntimeError("boom")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.late and trainer.global_step - 1 == self.step:
            raise RuntimeError("boom")

    def on_validation_start(self, trainer, pl_module):
        self.evaluated.append(trainer.global_step)


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_breaks_off_comes_again(tmp_path, late):
    """With former cliffs in the batch, whose return that step had noted already; late, its update is made twice."""

    def fit(folder, breaks_off, ckpt_path=None):
        tape = Steps()
        replay, last = CliffReplay(max_share=0.5, after_steps=1), LastCheckpoint(every_n_steps=4 if late else 100)
        trainer = toy.trainer(
            folder, tape, breaks_off, replay, last, max_steps=7, val_check_interval=3, limit_val_batches=1
        )
        module = toy.module(optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        data = toy.datamodule(tmp_path, source=toy.source("train", [4, 6]), num_train_problems=12, num_val_problems=2)
        with nullcontext() if breaks_off.step is None else pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return tape.steps, breaks_off.evaluated, module.cliffs.history

    steps, evaluated, history = fit(tmp_path / "a", BreaksOff())
    assert evaluated == [0, 3, 6, 7]
    first, before, _ = fit(tmp_path / "b", BreaksOff(4, late))
    assert len(first) == 4 + late
    (checkpoint,) = (tmp_path / "b").rglob("last.ckpt")
    rest, after, resumed = fit(tmp_path / "b", BreaksOff(), checkpoint)
    assert first[:4] + rest == steps
    assert any(row in {r for rows, *_ in steps[:4] for r in rows} for row in rest[0][0]), "a former cliff is among them"
    assert before + after == evaluated
    assert (resumed.visits, resumed.distilled) == (history.visits, history.distilled)
