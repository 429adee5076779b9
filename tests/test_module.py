"""The module in whole runs: invariances, exact resume, precision, and what is refused."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from hdpo.callbacks.sampler_check import StaleSamplerError
from hdpo.errors import ConfigError
from hdpo.evaluation.scores import Scores
from hdpo.experience import Experience, Rollouts
from hdpo.generation import TransformersEngine
from hdpo.module import HDPOModule
from hdpo.policy import Policy, PolicyConfig
from hdpo.rewards import Grade
from tests.helpers import toy
from tests.helpers.reference import Options
from tests.helpers.tolerances import EXACT, F32


# Seconds are never the same, and the sampler is checked at the first step of each process.
class Tape(Callback):
    """Keeps the experience of each step, and the weights before and after it."""

    def __init__(self):
        self.experiences: list[Experience] = []
        self.before: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.metrics: list[dict] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in pl_module.student.parameters()]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.experiences.append(batch)
        self.metrics.append(
            {k: v for k, v in batch.metrics.items() if not k.startswith(("time/", "speed/", "sampler/"))}
        )


def weights(module):
    return torch.cat([p.detach().double().flatten() for p in module.student.parameters()])


def run(folder, *, steps=1, data=None, trainer=None, ckpt_path=None, **options):
    tape = Tape()
    module = toy.module(**options)
    fitter = toy.trainer(folder, tape, **{"max_steps": steps, "limit_val_batches": 0, **(trainer or {})})
    fitter.fit(module, datamodule=toy.datamodule(folder, **(data or {})), ckpt_path=ckpt_path)
    return module, tape


def test_the_chunk_size_does_not_matter(tmp_path, monkeypatch):
    exact = {"policy": PolicyConfig("pkg://hdpo.lab/policy", dtype="float64")}
    reference, tape = run(tmp_path, steps=2, **exact)
    load = Policy.load.__func__

    def load_small(cls, config):
        policy = load(cls, config)
        policy.chunk_elements = 1000
        return policy

    monkeypatch.setattr(Policy, "load", classmethod(load_small))
    module, _ = run(tmp_path, steps=2, **exact)
    way = (weights(reference) - tape.before[0]).norm()
    assert (weights(module) - weights(reference)).norm() < EXACT * weights(reference).norm() < 1e-6 * way


def test_weight_zero_is_grpo_and_does_no_privileged_work(tmp_path):
    _, tape = run(tmp_path, steps=2, distillation_weight=0.0)
    for experience, metrics in zip(tape.experiences, tape.metrics, strict=True):
        assert experience.is_cliff.any()
        assert experience.distillation is None
        assert not any(name.startswith(("privileged/", "time/privileged")) for name in metrics)
        assert metrics["loss/total"] == metrics["loss/policy"]


def test_only_cliffs_still_learn_by_distillation(tmp_path):
    data = {"source": toy.source("train", [6]), "prompts_per_step": 2}
    module, tape = run(tmp_path, data=data, rollouts={"num_generations": 2})
    assert tape.experiences[0].is_cliff.all()
    assert not torch.equal(weights(module), tape.before[0])
    assert tape.metrics[0]["privileged/pass_rate"] > 0.4


def test_bfloat16_autocast_keeps_float32_weights(tmp_path):
    module, tape = run(tmp_path, trainer={"precision": "bf16-mixed"})
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert tape.experiences[0].metrics["sampler/logprob_gap_mean"] < 0.05
    plain, _ = run(tmp_path)
    assert 0 < (weights(module) - weights(plain)).norm() / weights(plain).norm() < 1e-2


def test_a_stale_sampler_stops_the_run(tmp_path):
    class Stale(TransformersEngine):
        """Samples from other weights than the policy's."""

        def generate(self, policy, prompts, seeds, sampling, drafts=None):
            other = copy.deepcopy(policy)
            with torch.no_grad():
                for p in other.parameters():
                    p.mul_(0.5)
            return super().generate(other, prompts, seeds, sampling, drafts)

    with pytest.raises(StaleSamplerError, match="the sampler's log-probabilities differ"):
        run(tmp_path, engine=Stale())


def live(folder, steps, ckpt_path=None, **options):
    """A run that still has something to learn when it ends; returns what each step logged, and the module."""
    tape = Tape()
    chosen = replace(Options(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4), num_warmup_steps=5, **options)
    module = toy.fit(folder, chosen, tape, steps=steps, dtype="float32", tiers=[1, 2, 3, 4, 6], ckpt_path=ckpt_path)
    return module, tape


@pytest.mark.parametrize("options", [
    {},
    {"teacher": "ema", "teacher_decay": 0.7, "refresh_every": 2},
    {"teacher": "frozen", "kl_coef": 0.1, "refresh_every": 3},
    {"num_epochs": 2, "num_minibatches": 2},
], ids=["paper", "ema", "frozen", "updates"])  # fmt: skip
def test_resume_is_bit_identical(tmp_path, options):
    straight, tape = live(tmp_path / "a", 8, **options)
    live(tmp_path / "b", 4 if options.get("refresh_every") == 3 else 5, **options)
    (checkpoint,) = (tmp_path / "b").rglob("last.ckpt")
    resumed, rest = live(tmp_path / "b", 8, ckpt_path=checkpoint, **options)
    first = 8 - len(rest.metrics)
    # Without a signal after the checkpoint everything would be equal whatever was restored.
    assert all(metrics["optim/grad_norm"] > 1e-3 for metrics in rest.metrics)
    assert sum("loss/distillation" in metrics for metrics in rest.metrics) >= 2
    if "refresh_every" in options:
        assert first % options["refresh_every"], "the first step after the checkpoint lives on the saved buffer"
        assert rest.metrics[0]["privileged/tokens"] > 0
    assert torch.equal(weights(resumed), weights(straight))
    assert rest.metrics == tape.metrics[first:]
    for mine, theirs in zip(rest.experiences, tape.experiences[first:], strict=True):
        assert mine.prompts.problem == theirs.prompts.problem
        assert torch.equal(mine.rollouts.completion_ids, theirs.rollouts.completion_ids)
    if options.get("teacher") == "ema":
        pairs = zip(resumed.teacher.average.parameters(), straight.teacher.average.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rollouts_do_not_share_memory_with_the_last_steps_gradients(tmp_path):
    class Held(Callback):
        def __init__(self):
            self.bytes = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.bytes.append(sum(p.grad.nbytes for p in pl_module.student.parameters() if p.grad is not None))

    held = Held()
    fitter = toy.trainer(tmp_path, held, max_steps=3, limit_val_batches=0)
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    assert held.bytes == [0, 0, 0]


@pytest.mark.parametrize(("key", "value"), [
    ("distillation_weight", -0.1),
    ("distillation_weight", math.nan),
    ("distillation_weight", math.inf),
    ("policy_loss.kl_coef", -1.0),
    ("policy_loss.clip_eps_low", -0.2),
    ("policy_loss.clip_eps_low", 1.5),
    ("policy_loss.clip_eps_high", math.nan),
    ("policy_loss.aggregation", "batch"),
    ("policy_loss.advantage_scale", "variance"),
    ("policy_loss.sampler_correction", "yes"),
    ("policy_loss.sampler_correction_threshold", 0.0),
    ("update.micro_batch_tokens", 0),
    ("update.max_grad_norm", 0.0),
    ("update.num_epochs", 0),
    ("update.num_minibatches", 0),
])  # fmt: skip
def test_bad_options_name_their_key(key, value):
    with pytest.raises(ConfigError, match=f"model.{key} must be"):
        toy.module(**{key.rpartition(".")[2]: value})


@pytest.mark.parametrize(("key", "value", "choices"), [
    ("divergence", "JSD", "ForwardKL, GeneralizedJSD, JSD, ReverseKL"),
    ("policy_loss", "clipped", "ClippedPolicyLoss"),
    ("teacher", "frozen", "DriftingTeacher, EMATeacher, FrozenTeacher"),
])  # fmt: skip
def test_a_wrong_word_is_refused_with_the_right_ones(key, value, choices):
    with pytest.raises(ConfigError, match=rf"model.{key} must be a \w+ \(.*{choices}.*\), got '{value}'"):
        HDPOModule(PolicyConfig(path="x"), **{key: value})


class Notes(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    name, version = "notes", 0

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (3, [0, 3])])
def test_every_so_many_steps_what_a_step_measured_is_logged_under_its_number(tmp_path, every, steps):
    notes, shown = Notes(), []

    class Watch(Tape):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.metrics.append(dict(batch.metrics))
            shown.append({k: v for k, v in trainer.progress_bar_metrics.items() if k in ("reward", "cliffs")})

    watch = Watch()
    fitter = toy.trainer(
        tmp_path, watch, max_steps=4, limit_val_batches=0, logger=notes, log_every_n_steps=every, callbacks=[watch]
    )
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    ours = [(step, metrics) for step, metrics in notes.metrics if "loss/total" in metrics]
    assert ours == [(step, watch.metrics[step]) for step in steps]
    expected = [{"reward": m["rollout/reward"], "cliffs": m["cliff/fraction"]} for m in watch.metrics]
    assert shown == [pytest.approx(values, rel=F32) for values in expected]


@pytest.mark.parametrize(("options", "is_loaded"), [
    ({"teacher": "frozen"}, True), ({"teacher": "frozen", "distillation": {"target": "token"}}, False),
    ({"teacher": "frozen", "distillation_weight": 0.0}, False),
    ({"teacher": "frozen", "distillation": {"target": "token", "sampled_by": "initial"}}, True),
    ({"teacher": "frozen", "distillation": {"target": "token", "sampled_by": "initial", "completions": "failures"}},
     False),
])  # fmt: skip
def test_a_teacher_is_loaded_where_it_reads_or_writes(options, is_loaded):
    module = toy.module(**options)
    module.configure_model()
    assert bool(module.teacher._holder) == is_loaded


@pytest.mark.parametrize(("completions", "is_loaded"), [("privileged", True), ("reference", False)])
def test_an_average_is_kept_where_it_reads_or_writes(completions, is_loaded):
    options = {"target": "token", "sampled_by": "ema", "completions": completions}
    module = toy.module(teacher="ema", distillation=options)
    module.configure_model()
    assert (module.teacher.average is not None) == is_loaded == module.reads_teacher


def test_an_interval_of_0_logs_nothing(tmp_path):
    notes = Notes()
    toy.trainer(tmp_path, limit_val_batches=0, logger=notes, log_every_n_steps=0).fit(
        toy.module(), datamodule=toy.datamodule(tmp_path)
    )
    assert not any("loss/total" in metrics for _, metrics in notes.metrics)


class Whole(toy.BoxedVerifier):
    def grade(self, completions, references, **columns):
        grades = super().grade(completions, references, **columns)
        return [Grade(grade.outcome, int(grade.reward)) for grade in grades]


def test_rewards_may_be_whole_numbers(tmp_path):
    tapes = [Tape(), Tape()]
    for tape, verifier in zip(tapes, (toy.BoxedVerifier(), Whole()), strict=True):
        module, easy = toy.module(verifier=verifier), toy.datamodule(tmp_path, source=toy.source("train", [1, 2]))
        toy.trainer(tmp_path, tape, limit_val_batches=0).fit(module, datamodule=easy)
    assert tapes[0].metrics[-1]["rollout/reward"] == tapes[1].metrics[-1]["rollout/reward"] > 0


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_the_policies_of_a_module(teacher, monkeypatch):
    module = toy.module(teacher=teacher, kl_coef=0.1)
    module.configure_model()
    student, other, reference = module.student, module.teacher.policy(module.student), module.reference_policy
    # The frozen teacher IS the initial policy: one copy serves as teacher and as reference of the KL penalty.
    assert len({id(policy) for policy in (student, other, reference)}) == (2 if teacher == "frozen" else 3)
    # An engine with weights of its own never calls train(): layers are checkpointed in training mode only.
    assert all(m.training for m in student.modules())
    assert not any(m.training for policy in (other, reference) for m in policy.modules())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    module.configure_model()
    assert module.student is student, "Lightning calls it once for each stage"
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in student.parameters()}, "the student's alone"
    assert not group["fused"]
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "device", torch.device("cuda"))
        assert module.configure_optimizers()["optimizer"].param_groups[0]["fused"] is True
    plain = toy.module(distillation_weight=0.0, teacher=teacher)
    plain.configure_model()
    assert plain.reference_policy is None
    with pytest.raises((ValueError, AssertionError)):
        plain.teacher.policy(plain.student)  # GRPO loads no second copy


def test_engine_and_verifier_are_closed_at_the_end(tmp_path):
    closed = []

    class Engine(TransformersEngine):
        def close(self):
            closed.append("engine")

    class Verifier(toy.BoxedVerifier):
        def close(self):
            closed.append("verifier")

    run(tmp_path, engine=Engine(), verifier=Verifier())
    assert set(closed) == {"engine", "verifier"}


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": math.nan}, r"model.optimizer.init_args.lr must be a finite number, got nan"),
    ({"lr": 0.1, "momentum": math.inf}, r"model.optimizer.init_args.momentum must be a finite number, got inf"),
    ({"lr": -1.0}, r"model.optimizer: Invalid learning rate: -1.0"),
])  # fmt: skip
def test_an_optimizer_that_cannot_be_is_refused(options, message):
    module = toy.module(optimizer=lambda parameters: torch.optim.SGD(parameters, **options))
    module.policy = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=message):
        module.configure_optimizers()


def test_repeated_problems_do_not_count_in_an_evaluation():
    module = toy.module()
    module.scores = Scores(dict.fromkeys(["", "a", "b"], (1, 2)))
    outcomes = [["correct", "wrong"], ["wrong", "wrong"], ["correct", "correct"]]
    prompts = SimpleNamespace(dataset="", source=["a", "b", "a"], valid=torch.tensor([True, True, False]))
    sampled, greedy = (
        Rollouts(None, None, None, None, torch.ones(3, len(o[0])), o, [])  # each has some reward
        for o in (outcomes, [["wrong"], ["correct"], ["correct"]])
    )
    module.validation_step(SimpleNamespace(prompts=prompts, rollouts=sampled, greedy=greedy), 0)
    values = {name: value.item() for name, value in module.scores.compute_and_reset("val").items()}
    assert (values["val/pass@1"], values["val/pass@2"], values["val/greedy_accuracy"]) == (0.25, 0.5, 0.5)
    assert (values["val/a/pass@1"], values["val/b/greedy_accuracy"], values["val/a/greedy_accuracy"]) == (0.5, 1, 0)


def test_the_largest_k_is_shown_beside_the_progress_bar(tmp_path):
    module = toy.module()
    fitter = toy.trainer(tmp_path, max_steps=-1)
    fitter.validate(module, datamodule=toy.datamodule(tmp_path, num_val_problems=3), verbose=False)
    assert fitter.progress_bar_metrics["pass@2"] == pytest.approx(fitter.callback_metrics["val/pass@2"].item())
