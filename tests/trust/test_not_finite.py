"""A step that is not finite is not taken, wherever it became so, and nothing that is not finite is saved."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from hdpo.callbacks import BestCheckpoint, LastCheckpoint, PolicyExport, Station
from hdpo.callbacks.skipped import SkippedSteps
from hdpo.errors import TrainingStopped
from hdpo.experience import Experience
from hdpo.generation import TransformersEngine
from hdpo.losses import JSD, ClippedPolicyLoss
from hdpo.optim import LinearWarmup
from tests.helpers import toy
from tests.helpers.small_disk import small_disk

BAD = 1
"""The step in which something is not finite."""


class Tape(Callback):
    """Weights, teacher, optimizer state and learning rate after each step, and what it logged."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        state = [v.clone() for s in optimizer.state.values() for v in s.values()]
        weights = [p.detach().clone() for p in pl_module.parameters()]  # the average of the teacher is among them
        self.steps.append((weights, state, optimizer.param_groups[0]["lr"], dict(batch.metrics)))


class BadLoss(ClippedPolicyLoss):
    """One micro-batch of the policy loss is NaN, as a sum whose gradient is finite."""

    def __call__(self, *arguments, group, **options):
        loss = super().__call__(*arguments, group=group, **options)
        bad = self.trainer.global_step == BAD and 0 in group
        return loss + torch.tensor(math.nan) if bad else loss


class BadDivergence(JSD):
    def __call__(self, student_logps, teacher_logps):
        value = super().__call__(student_logps, teacher_logps)
        return value * math.inf if self.trainer.global_step == BAD else value


class BadTeacher(Station):
    def after_distillation(self, trainer, pl_module, batch):
        if trainer.global_step == BAD and batch.distillation is not None:
            batch.distillation.topk_logits[0][0, 0] = math.nan


class BadGradient(Callback):
    """The gradient of one weight, with a finite loss."""

    def __init__(self, steps):
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            next(pl_module.student.parameters()).grad.view(-1)[3] = math.nan


class BadSampler(TransformersEngine):
    """Log-probabilities of the sampler that are not numbers; the importance weights use them."""

    trainer = None

    def generate(self, policy, prompts, seeds, sampling, drafts=None):
        out = super().generate(policy, prompts, seeds, sampling, drafts)
        if self.trainer.global_step == BAD:
            out.logps.fill_(math.nan)
        return out


PLACES = {
    "loss": {"policy_loss": BadLoss(advantage_scale="std")},
    "divergence": {"divergence": BadDivergence()},
    "teacher": {"station": BadTeacher()},
    "gradient": {"station": BadGradient([BAD])},
    "sampler": {"engine": BadSampler(), "policy_loss": ClippedPolicyLoss(sampler_correction="truncated")},
}


def fit(folder, place, steps=3):
    tape = Tape()
    given = dict(PLACES[place]) if place else {}
    callbacks = [tape, PolicyExport(), BestCheckpoint(), *filter(None, [given.pop("station", None)])]
    module = toy.module(
        teacher="ema",
        teacher_decay=0.5,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
        lr_scheduler=lambda o: LinearWarmup(o, num_warmup_steps=10),
        micro_batch_tokens=400,
    )
    for name, value in given.items():
        setattr(module, name, value)
        value.trainer = None
    trainer = toy.trainer(folder, *callbacks, max_steps=steps, val_check_interval=1)
    for value in given.values():
        value.trainer = trainer
    trainer.fit(module, datamodule=toy.datamodule(folder))
    return tape.steps


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, place):
    steps = fit(tmp_path, place)
    before, bad, after = steps
    assert [s[3]["optim/skipped"] for s in steps] == [0, 1, 0]
    for mine, theirs in zip(bad[0] + bad[1], before[0] + before[1], strict=True):
        assert torch.equal(mine, theirs), "weights, the teacher's average and the optimizer's state"
    assert bad[2] == before[2], "the schedule"
    assert after[2] > before[2]
    assert not all(torch.equal(a, b) for a, b in zip(after[0], bad[0], strict=True)), "the run goes on"
    assert all(w.isfinite().all() for w in after[0])
    # What was trained on is there for inspection.
    kept = torch.load(tmp_path / "skipped" / f"step_{BAD:06d}.rank0.pt", weights_only=True)
    assert len(kept["prompts"]["problem"]) == 6
    assert kept["rollouts"]["completion_ids"].shape[:2] == (6, 4)
    assert kept["is_cliff"].dtype == torch.bool
    saved = list(saved_tensors(tmp_path))
    assert len(saved) > 100
    assert all(w.isfinite().all() for w in saved)


def saved_tensors(folder):
    """Every tensor of every checkpoint and exported policy: weights, averages, optimizer state, what callbacks keep."""

    def inside(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from inside(item)

    for name in ("last", "best"):
        assert (folder / f"checkpoints/{name}.ckpt").exists()
    for path in (folder / "checkpoints").iterdir():
        yield from inside(torch.load(path, weights_only=True))
    yield from load_file(folder / "policy/model.safetensors").values()


def test_with_several_updates_those_before_stand_and_no_other_is_made(tmp_path):
    """Each batch makes three; the second of one is not finite."""
    tape, number, seen = Tape(), [0], []

    class Second(Callback):
        def on_after_backward(self, trainer, pl_module):
            number[0] += 1
            if number[0] == 3 + 2:
                seen.append([p.detach().clone() for p in pl_module.parameters()])
                next(pl_module.student.parameters()).grad.view(-1)[3] = math.nan

    module = toy.module(
        num_epochs=3,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
        distillation_weight=0.0,
        micro_batch_tokens=10**6,
    )
    toy.trainer(tmp_path, tape, Second(), max_steps=3, limit_val_batches=0).fit(
        module, datamodule=toy.datamodule(tmp_path)
    )
    assert [s[3]["optim/skipped"] for s in tape.steps] == [0, 1, 0]
    assert number[0] == 3 + 2 + 3
    assert all(torch.equal(a, b) for a, b in zip(tape.steps[1][0], seen[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tape.steps[1][0], tape.steps[0][0], strict=True))


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The weights after the next step are those of a run whose step before had no update."""
    steps = fit(tmp_path / "a", "gradient")
    monkeypatch.setattr("hdpo.module.update_policy", _without(BAD))
    without = fit(tmp_path / "b", None)
    assert all(torch.equal(a, b) for a, b in zip(steps[2][0], without[2][0], strict=True))


def _without(step):
    from hdpo.losses.update import update_policy

    def update(module, batch):
        if module.trainer.global_step != step:
            return update_policy(module, batch)
        module.optimizers().zero_grad()
        module.optimizers().step()
        batch.measurements.add("optim/skipped", 1.0)
        return False

    return update


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_a_skipped_step_has_distilled_nothing(tmp_path, refresh_every):
    """Unless its completions are distilled in the next steps, too."""
    module = toy.module(distillation={"completions": "reference", "refresh_every": refresh_every})
    trainer = toy.trainer(tmp_path, BadGradient([2]), max_steps=4, limit_val_batches=0)
    trainer.fit(module, datamodule=toy.datamodule(tmp_path))
    history = module.cliffs.history
    assert {visit.step for visits in history.visits.values() for visit in visits} == {0, 1, 2, 3}, "all were sampled"
    assert set(history.distilled.values()) == ({0, 1, 3} if refresh_every == 1 else {0, 2})


def test_after_three_in_a_row_training_stops_itself_and_saves_nothing_more(tmp_path):
    tape = Tape()
    module = toy.module(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4), distillation_weight=0.0)
    # Step 0 is not of the row: step 1 ends it.
    trainer = toy.trainer(tmp_path, tape, BadGradient([0, *range(2, 9)]), max_steps=9, limit_val_batches=0)
    last = next(c for c in trainer.callbacks if isinstance(c, LastCheckpoint))
    last.every_n_steps = 2
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row, up to step 4; no weight was changed"):
        trainer.fit(module, datamodule=toy.datamodule(tmp_path))
    assert [s[3]["optim/skipped"] for s in tape.steps] == [1, 0, 1, 1, 1]
    assert len(list((tmp_path / "skipped").iterdir())) == 4
    saved = [torch.load(p, weights_only=True) for p in (tmp_path / "checkpoints").glob("last-*.ckpt")]
    assert {c["global_step"] for c in saved} == {2, 4}
    assert all(v.isfinite().all() for c in saved for v in c["state_dict"].values())
    counts = {c["global_step"]: c["callbacks"]["SkippedSteps"]["num_in_a_row"] for c in saved}
    assert counts == {2: 0, 4: 2}


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path):
    def run(steps, ckpt_path=None):
        trainer = toy.trainer(tmp_path, BadGradient(range(9)), max_steps=steps, limit_val_batches=0)
        module = toy.module(distillation_weight=0.0)
        trainer.fit(module, datamodule=toy.datamodule(tmp_path), ckpt_path=ckpt_path)

    run(2)
    with pytest.raises(TrainingStopped, match="in 3 steps in a row, up to step 2"):
        run(9, tmp_path / "checkpoints/last.ckpt")


def test_a_diverged_policy_stops_the_run_and_is_not_saved(tmp_path):
    """The learning rate makes the weights so large that the policy's probabilities are no numbers."""
    module = toy.module(optimizer=lambda p: torch.optim.SGD(p, lr=1e36), max_grad_norm=None, distillation_weight=0.0)
    trainer = toy.trainer(tmp_path, PolicyExport(), max_steps=9, limit_val_batches=0)
    with pytest.raises(TrainingStopped):
        trainer.fit(module, datamodule=toy.datamodule(tmp_path))
    assert not (tmp_path / "policy").exists()
    for path in (tmp_path / "checkpoints").glob("*.ckpt") if (tmp_path / "checkpoints").exists() else ():
        content = torch.load(path, weights_only=True)["state_dict"]
        assert all(v.isfinite().all() for v in content.values())


@pytest.mark.parametrize("cached", [False, True])
def test_several_updates_under_autocast_read_the_weights_of_the_one_before(tmp_path, monkeypatch, cached):
    """Lightning switches autocast's cache of cast weights off; with it on, later updates would use old weights."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def forward_context(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached)

    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", forward_context)
    tape = Tape()
    module = toy.module(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5), num_epochs=4, max_grad_norm=None, distillation_weight=0.0
    )
    trainer = toy.trainer(tmp_path, tape, max_steps=1, limit_val_batches=0, precision="bf16-mixed")
    trainer.fit(module, datamodule=toy.datamodule(tmp_path))
    CACHED[cached] = torch.cat([w.flatten() for w in tape.steps[0][0]])
    assert tape.steps[0][3]["loss/ratio"] != pytest.approx(1.0, abs=1e-4), "the policy has moved between updates"
    if len(CACHED) == 2:
        assert torch.equal(CACHED[True], CACHED[False])


CACHED: dict[bool, torch.Tensor] = {}


def test_a_full_disk_is_what_the_system_says(tmp_path):
    """A line of the program makes of it; PyTorch's own error would be a traceback."""
    batch = SimpleNamespace(metrics={"optim/skipped": 1.0}, as_plain_data=lambda: {"x": torch.zeros(100_000)})
    fitter = SimpleNamespace(log_dir=None, default_root_dir=tmp_path, global_rank=0, global_step=3)
    module = SimpleNamespace(update=SimpleNamespace(max_skipped_steps=3))
    with small_disk(10_000), pytest.raises(OSError, match="File too large"):
        SkippedSteps().on_train_batch_end(fitter, module, None, batch, 0)
    assert not list((tmp_path / "skipped").iterdir())


def test_plain_data_holds_every_field_and_no_class_of_ours(tmp_path):
    fit(tmp_path, "loss")
    kept = torch.load(next((tmp_path / "skipped").iterdir()), weights_only=True)
    assert kept.keys() == {f for f in Experience.__dataclass_fields__ if f != "measurements"}
