"""What a user brings from a file of their own, named in YAML and nowhere else."""

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import fit

MODULE = '''
"""Everything that a user may bring."""

import json

from hdpo.callbacks import Station
from hdpo.lab.problems import rows as stories
from hdpo.losses import ClippedPolicyLoss, Divergence
from hdpo.rewards import Grade, Outcome, Verifier
from hdpo.rewards.boxed import last_boxed


class CrossEntropy(Divergence):
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, student_logps, teacher_logps):
        return -self.factor * (teacher_logps.exp() * student_logps).sum(-1)


class Reinforce(ClippedPolicyLoss):
    def token_losses(self, logps, old_logps, advantages):
        return -3.0 * logps * advantages, {}


class Contrarian(Station):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def after_cliffs(self, trainer, pl_module, batch):
        batch.rollouts.rewards = self.scale * (1 - batch.rollouts.rewards)


class Diary(Station):
    """Writes down what each moment has to show."""

    def note(self, moment, trainer, pl_module, batch):
        names = ("rollouts", "is_cliff", "privileged", "distillation")
        there = [name for name in names if getattr(batch, name) is not None]
        prompts = [pl_module.tokenizer.decode(ids) for ids in batch.prompts.privileged_ids]
        row = {"step": trainer.global_step, "moment": moment, "there": there, "privileged": prompts}
        with open("diary.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")

    def after_prompts(self, *args):
        self.note("prompts", *args)

    def after_rollouts(self, *args):
        self.note("rollouts", *args)

    def after_cliffs(self, *args):
        self.note("cliffs", *args)

    def after_distillation(self, *args):
        self.note("distillation", *args)


class TargetVerifier(Verifier):
    """Grades against a column of the data, not against the reference."""

    def grade(self, completions, references, prompts, target, **columns):
        assert len(prompts) == len(target) == len(completions)
        right = [last_boxed(c) == str(t["value"]) for c, t in zip(completions, target)]
        return [Grade(Outcome.CORRECT, 1.0) if r else Grade(Outcome.WRONG, 0.0) for r in right]

    def usable(self, references, target, **columns):
        return [t["value"] % 7 != 0 for t in target]


def rows(split, tiers):
    for row in stories(300, split=split, tiers=tiers):
        value = int(row["expected_answer"])
        yield {**row, "expected_answer": "none", "target": {"value": value}, "formula": f"Formula of {value}"}
'''


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def divergence(factor):
    return {"model": {"divergence": {"class_path": "brought.CrossEntropy", "init_args": {"factor": factor}}}}


def test_a_divergence(workplace):
    once, thrice = (fit(divergence(factor), steps=1, name=str(factor)) for factor in (1.0, 3.0))
    assert thrice["loss/distillation"][0] == pytest.approx(3 * once["loss/distillation"][0], rel=1e-6)
    # Cross-entropy is KL and the teacher's entropy, which has no gradient.
    plain = fit({"model": {"divergence": {"class_path": "hdpo.losses.ForwardKL"}}}, steps=1, name="kl")
    assert once["loss/distillation"][0] > plain["loss/distillation"][0]
    assert once["optim/grad_norm"][0] == pytest.approx(plain["optim/grad_norm"][0], rel=1e-4)


def test_a_policy_loss(workplace):
    grpo = {"model": {"distillation_weight": 0.0}}
    plain = fit(grpo, steps=1, name="plain")
    brought = fit({"model": {**grpo["model"], "policy_loss": {"class_path": "brought.Reinforce"}}}, steps=1)
    assert plain["optim/grad_norm"][0] > 0.1
    assert brought["optim/grad_norm"][0] == pytest.approx(3 * plain["optim/grad_norm"][0], rel=1e-4)


def test_a_station_shapes_rewards_after_cliffs_are_known(workplace):
    loss = {"class_path": "hdpo.losses.ClippedPolicyLoss", "init_args": {"advantage_scale": "none"}}
    grpo = {"model": {"distillation_weight": 0.0, "policy_loss": loss}}
    plain = fit(grpo, steps=1, name="plain")
    assert abs(plain["loss/policy"][0]) > 1e-3
    against = {"class_path": "brought.Contrarian", "init_args": {"scale": 2.0}}
    shaped = fit({**grpo, "trainer": {"callbacks": [against]}}, steps=1)
    # The advantages are reward minus group mean: twice as large and of the other sign.
    assert shaped["loss/policy"][0] == pytest.approx(-2 * plain["loss/policy"][0], rel=1e-4)
    assert shaped["optim/grad_norm"][0] == pytest.approx(2 * plain["optim/grad_norm"][0], rel=1e-4)
    for verdicts in ("rollout/reward", "cliff/fraction", "cliff/solved"):
        assert shaped[verdicts] == plain[verdicts], "logged from the verifier's word, before the station acted"


def test_a_station_sees_what_each_moment_has_added(workplace):
    fit({"trainer": {"callbacks": [{"class_path": "brought.Diary"}]}})
    rows = [json.loads(line) for line in Path("diary.jsonl").read_text().splitlines()]
    assert [row["moment"] for row in rows] == ["prompts", "rollouts", "cliffs", "distillation"] * 2
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["there"] for row in rows[:3]] == [[], ["rollouts"], ["rollouts", "is_cliff"]]
    assert rows[3]["there"] == ["rollouts", "is_cliff", "privileged", "distillation"]


def test_a_verifier_reads_an_extra_column_and_any_text_is_the_context(workplace):
    source = {"path": "python:brought:rows", "columns": {"extra": ["target"], "context": "formula"}}
    overlay = {
        "model": {"verifier": {"class_path": "brought.TargetVerifier"}},
        "data": {
            "source": {**source, "kwargs": {"split": "train", "tiers": [1, 6]}},
            "val_source": {**source, "kwargs": {"split": "validation", "tiers": [1]}},
            "test_source": None,
            "prompts": {"privileged_context": "column"},
        },
        "evaluation": {"after_fit": True},
        "trainer": {"limit_val_batches": None, "val_check_interval": 5, "callbacks": [{"class_path": "brought.Diary"}]},
    }
    curves = fit(overlay, steps=1)
    # No reference is a number: only the column can have told right from wrong.
    assert curves["val/pass@1"][1] > 0.9
    assert curves["verifier/correct"][0] > 4
    shown = json.loads(Path("diary.jsonl").read_text().splitlines()[0])["privileged"]
    assert all("Formula of " in prompt and "So \\boxed" not in prompt for prompt in shown)
    numbers = [int(prompt.split("Formula of ")[1].split()[0]) for prompt in shown]
    assert all(number % 7 for number in numbers), "the configured verifier says which problems are usable"
    dropped = [json.loads(row) for file in Path(".hdpo_cache").glob("*.dropped.jsonl") for row in file.open()]
    assert {row["reason"] for row in dropped} == {"unusable"}
