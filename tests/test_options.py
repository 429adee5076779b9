"""Each option where its user sets it, in YAML or on the command line, and that it reaches what it is about."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from hdpo.commands.run import read_config
from hdpo.data import OpenMathDataModule, SourceConfig
from hdpo.experience import EvaluationSampling
from hdpo.files import resolve_path
from hdpo.functional.random import Purpose, derive_seeds
from hdpo.losses import UpdateConfig
from hdpo.module import HDPOModule
from hdpo.optim import LinearWarmup, paper_adamw
from hdpo.policy import PolicyConfig
from hdpo.policy.architecture import is_compiled
from tests.helpers import toy
from tests.helpers.command_line import fit
from tests.helpers.record import Captured, Recorder, StepTape, StopAtStart
from tests.helpers.reference import Options, Reference
from tests.test_step_reference import TOLERANCE, check_logged

STOP = {"callbacks": [{"class_path": "tests.helpers.record.StopAtStart"}]}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def built(overlay, *arguments):
    """What the command line makes of an overlay."""
    with pytest.raises(StopAtStart.Stopped):
        fit({**overlay, "trainer": {**overlay.get("trainer", {}), **STOP}}, *arguments)
    return Captured.last.module, Captured.last.trainer


def attributes(thing, names):
    return {name: getattr(thing, name) for name in names}


LOSS = {
    "clip_eps_low": 0.11,
    "clip_eps_high": 0.33,
    "advantage_scale": "none",
    "aggregation": "sequence",
    "mask_truncated": True,
    "count_zero_variance": False,
    "kl_coef": 0.07,
    "sampler_correction": "truncated",
    "sampler_correction_threshold": 3.5,
    "off_policy_shaping": 0.4,
}
UPDATE = {
    "num_epochs": 2,
    "num_minibatches": 3,
    "max_grad_norm": 0.7,
    "micro_batch_tokens": 3000,
    "sync_every_micro_batch": True,
    "max_skipped_steps": 5,
    "log_gradient_norms": True,
}
ROLLOUTS = {
    "num_generations": 5,
    "max_new_tokens": 33,
    "temperature": 1.9,
    "num_val_samples": 6,
    "val_temperature": 0.8,
    "val_max_new_tokens": 44,
    "max_resamples": 0,
}
CHECK = {"num_checked_sequences": 2, "max_logprob_gap": 0.3}
CLIFFS = {"threshold": 0.25, "reference_in_group": True, "max_reference_tokens": 99}
DISTILLATION = {
    "num_privileged": 3,
    "max_cliffs_per_step": 5,
    "temperature": 0.9,
    "max_new_tokens": 55,
    "success_reward": 0.5,
    "topk": 7,
    "refresh_every": 4,
    "completions": "failures",
    "sampled_by": "current",
    "target": "token",
}
SAMPLES = {"every_n_steps": 3, "num_prompts": 4, "num_completions": 5}
EVALUATION = {"before_fit": False, "after_fit": False, "summary": False}
EVERYTHING = {
    "seed_everything": 7,
    "model": {
        "policy": {
            "path": "pkg://hdpo.lab/policy",
            "dtype": "float64",
            "gradient_checkpointing": True,
            "compile": True,
        },
        "engine": {"init_args": {"max_sequences": 33, "compaction": 0.5, "use_drafts": False}},
        "verifier": {"init_args": {"profile": "nemo", "num_workers": 1, "timeout": 7.0, "batch_timeout": 70.0}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25, "momentum": 0.5}},
        "lr_scheduler": {"init_args": {"num_warmup_steps": 8, "start_factor": 0.5}},
        "policy_loss": {"init_args": LOSS},
        "distillation_weight": 0.6,
        "privileged_policy_weight": 0.2,
        "divergence": {"class_path": "hdpo.losses.JSD", "init_args": {"tail": "paper"}},
        "teacher": {"class_path": "hdpo.teacher.EMATeacher", "init_args": {"decay": 0.8}},
        "update": UPDATE,
        "pass_k": [2, 5],
    },
    "rollouts": {**ROLLOUTS, **CHECK},
    "cliffs": CLIFFS,
    "replay": {"max_share": 0.2, "after_steps": 6},
    "distillation": DISTILLATION,
    "samples": SAMPLES,
    "evaluation": EVALUATION,
    "export": {"enabled": False, "path": "exported"},
    "predictions": {"path": "written.jsonl"},
    "checkpoint": {"every_n_steps": 13},
    "best_checkpoint": {"monitor": "val/greedy_accuracy", "mode": "min"},
    "data": {
        "val_batch_size": 3,
        "val_source": None,
        "val_sources": {
            "hard": {
                "path": "python:hdpo.lab.problems:rows",
                "kwargs": {"split": "validation", "tiers": [5]},
                "num_problems": 4,
                "num_samples": 9,
                "temperature": 0.4,
                "max_new_tokens": 66,
            }
        },
        "selection": {"check_references": False},
    },
}


def test_everything_that_yaml_says_is_what_is_built(workplace):
    module, trainer = built(EVERYTHING)
    assert attributes(module.policy_loss, LOSS) == LOSS
    assert module.update == UpdateConfig(**UPDATE)
    assert attributes(module.rollouts, ROLLOUTS) == ROLLOUTS
    checked = module.rollouts.check_sampler
    assert (checked.num_sequences, checked.max_gap) == (2, 0.3)
    assert attributes(module.cliffs, CLIFFS) == CLIFFS
    assert attributes(module.distillation, DISTILLATION) == DISTILLATION
    assert (module.distillation_weight, module.divergence.tail, module.teacher.decay) == (0.6, "paper", 0.8)
    assert (module.privileged_policy_weight, module.temperature, module.privileged_temperature) == (0.2, 1.9, 0.9)
    assert module.pass_k == module.scores.pairs[0].pass_at_k.k == (2, 5)
    assert attributes(module.engine, ("max_sequences", "compaction", "use_drafts")) == {
        "max_sequences": 33, "compaction": 0.5, "use_drafts": False
    }  # fmt: skip
    verifier = {"profile": "nemo", "num_workers": 1, "timeout": 7.0, "batch_timeout": 70.0}
    assert attributes(module.verifier, verifier) == verifier
    assert {p.dtype for p in module.student.parameters()} == {torch.float64}
    assert module.student.model.is_gradient_checkpointing
    assert is_compiled(module.student.backbone)
    (optimizer,) = trainer.optimizers
    assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (torch.optim.SGD, 0.25, 0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.student.parameters()))
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (type(scheduler), scheduler.total_iters, scheduler.start_factor) == (LinearWarmup, 8, 0.5)

    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert attributes(callbacks["SampleLogger"], SAMPLES) == SAMPLES
    assert attributes(callbacks["Evaluation"], EVALUATION) == EVALUATION
    assert (callbacks["PolicyExport"].enabled, callbacks["PolicyExport"].path) == (False, "exported")
    assert callbacks["PredictionWriter"].path == "written.jsonl"
    assert callbacks["LastCheckpoint"].every_n_steps == 13
    assert attributes(callbacks["CliffReplay"], ("max_share", "after_steps")) == {"max_share": 0.2, "after_steps": 6}
    assert (callbacks["BestCheckpoint"].monitor, callbacks["BestCheckpoint"].mode) == ("val/greedy_accuracy", "min")
    ours = [type(callback).__name__ for callback in trainer.callbacks]
    stations = [ours.index(name) for name in ("RolloutGeneration", "CliffDetection", "DistillationRefresh")]
    assert stations == sorted(stations), "the stations act in this order"

    data = trainer.datamodule
    assert (data.prompts_per_step, data.val_batch_size, data.seed, module.seed) == (6, 3, 7, 7)
    assert data.tokenizer is module.tokenizer
    assert data.verifier is module.verifier
    (loader,) = data.val_dataloader()
    (first, *_) = loader
    assert (first.prompts.dataset, len(loader.dataset), len(first)) == ("hard", 4, 3)
    assert first.prompts.sampling == EvaluationSampling(9, 0.4, 66)


def test_what_is_not_said(workplace):
    Path("bare.yaml").write_text("model: {policy: {path: pkg://hdpo.lab/policy}}\n")
    assert read_config(["--config", "bare.yaml", "--trainer.max_steps=1"])["seed_everything"] == 42
    _, trainer = built({})
    assert (trainer.max_epochs, trainer.check_val_every_n_epoch) == (-1, None), "steps are counted, not epochs"


def test_a_word_on_the_command_line_needs_no_class(workplace):
    module, trainer = built(
        {},
        "--model.divergence.init_args.tail=paper",
        "--model.policy_loss.init_args.clip_eps_high=0.5",
        "--model.engine.init_args.max_sequences=11",
        "--model.teacher=EMATeacher",
        "--seed_everything=5",
        "--rollouts.temperature=1.25",
    )
    assert (module.divergence.tail, module.policy_loss.clip_eps_high, module.engine.max_sequences) == ("paper", 0.5, 11)
    assert (type(module.teacher).__name__, module.seed, trainer.datamodule.seed) == ("EMATeacher", 5, 5)
    assert module.temperature == 1.25


def test_a_step_at_another_temperature_and_seed_is_the_one_written_out(workplace):
    """What the command line links, seen from what it does: seeds, temperatures and the loss."""
    overlay = {
        "seed_everything": 11,
        "model": {
            "policy": {"path": "pkg://hdpo.lab/policy", "dtype": "float64"},
            "engine": {"class_path": "tests.helpers.record.Recorder"},
            "verifier": {"class_path": "tests.helpers.toy.BoxedVerifier"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.004, "weight_decay": 0}},
            "lr_scheduler": {"init_args": {"num_warmup_steps": 0}},
            "distillation_weight": 0.7,
        },
        "rollouts": {"num_generations": 4, "temperature": 1.7, "max_logprob_gap": 1e-5},
        "distillation": {"num_privileged": 2, "temperature": 1.3, "topk": 16},
        "trainer": {"precision": "64-true", "callbacks": [{"class_path": "tests.helpers.record.Captured"}]},
    }
    fit(overlay, steps=2)
    tape = Captured.last
    options = Options(
        distillation_weight=0.7, temperature=1.7, privileged_temperature=1.3, num_privileged=2, max_grad_norm=1.0
    )
    reference = Reference(options, resolve_path("pkg://hdpo.lab/policy"))
    for number, step in enumerate(tape.steps):
        rollouts, *rest = step.calls
        assert [call.temperature for call in step.calls] == [1.7, *([1.3] * len(rest))]
        expected = reference.step(step.batch.prompts, rollouts, rest[0] if rest else None)
        check_logged(step.logged, expected.metrics)
        assert (step.weights - expected.weights).norm() < TOLERANCE * 0.004, "the way of a clipped step"
        assert step.batch.prompts.row.tolist() == order(11, 30)[6 * number : 6 * number + 6]
    assert [step.logged["cliff/mixed"] > 0 for step in tape.steps] == [True] * 2
    seeds = iter(tape.module.engine.seeds)
    for number, step in enumerate(tape.steps):
        everyone, few = torch.arange(6)[:, None], torch.tensor(step.batch.is_cliff.nonzero()[:, :1].tolist())
        assert torch.equal(next(seeds), derive_seeds(11, Purpose.ROLLOUT, number, everyone, torch.arange(4)))
        if len(step.calls) > 1:
            assert torch.equal(next(seeds), derive_seeds(11, Purpose.PRIVILEGED, number, few, torch.arange(2)))


def order(seed, number):
    """The rows of the first pass."""
    return derive_seeds(seed, Purpose.PROBLEM_ORDER, 0, torch.arange(number)).argsort(stable=True).tolist()


def test_without_a_command_line_the_data_module_takes_seed_verifier_and_tokenizer_from_the_module(tmp_path):
    module, data = toy.module(seed=13), toy.datamodule(tmp_path, seed=None)
    given = toy.datamodule(tmp_path, seed=3, verifier=toy.BoxedVerifier(), tokenizer="pkg://hdpo.lab/policy")
    for datamodule in (data, given):
        datamodule.trainer = SimpleNamespace(lightning_module=module)
    assert (data.seed, given.seed) == (13, 3)
    assert data.verifier is module.verifier is not given.verifier
    assert data.tokenizer is module.tokenizer is not given.tokenizer
    assert toy.datamodule(tmp_path, seed=None).seed == 42


class Backwards(Callback):
    """Counts the first layer's forward passes within the backward passes of each step."""

    def __init__(self):
        self.counts, self.inside = [], False

    def on_train_start(self, trainer, pl_module):
        def count(*_):
            self.counts[-1] += self.inside

        layer = next(m for m in pl_module.student.backbone.modules() if isinstance(m, torch.nn.ModuleList))[0]
        layer.self_attn.register_forward_hook(count)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(0)

    def on_before_backward(self, trainer, pl_module, loss):
        self.inside = True

    def on_after_backward(self, trainer, pl_module):
        self.inside = False


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_computes_layers_again_in_every_step(tmp_path, checkpointing):
    backwards = Backwards()
    policy = PolicyConfig("pkg://hdpo.lab/policy", gradient_checkpointing=checkpointing)
    fitter = toy.trainer(tmp_path, backwards, max_steps=3, limit_val_batches=0)
    fitter.fit(toy.module(policy=policy), datamodule=toy.datamodule(tmp_path))
    assert [count > 0 for count in backwards.counts] == [checkpointing] * 3


def test_the_learning_rate_rises_linearly_and_stays():
    def rates(steps, **options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler, found = LinearWarmup(optimizer, **options), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    rising = [2 * (0.2 + 0.8 * min(step, 4) / 4) for step in range(7)]
    assert rates(7, num_warmup_steps=4, start_factor=0.2) == pytest.approx(rising)
    assert rates(3, num_warmup_steps=0, start_factor=0.2) == [2.0] * 3
    paper = rates(52)
    assert (paper[0], paper[50], paper[51]) == pytest.approx((0.2, 2.0, 2.0))
    assert paper[25] == pytest.approx(2 * (0.1 + 0.9 / 2))


def test_the_logged_learning_rate_is_the_one_of_the_update(tmp_path):
    tape = StepTape()
    options = Options(num_warmup_steps=2, start_factor=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.004))
    toy.fit(tmp_path, options, tape, steps=3, engine=Recorder(), dtype="float32")
    assert [step.logged["optim/lr"] for step in tape.steps] == pytest.approx([0.002, 0.003, 0.004])


def test_defaults_are_the_papers():
    module = HDPOModule(PolicyConfig("pkg://hdpo.lab/policy"))
    assert (module.distillation_weight, module.pass_k, module.seed) == (0.1, (1, 4, 8), 42)
    assert (type(module.policy_loss).__name__, module.policy_loss.kl_coef) == ("ClippedPolicyLoss", 0.0)
    assert (type(module.divergence).__name__, module.divergence.tail) == ("JSD", "exact")
    assert type(module.teacher).__name__ == "DriftingTeacher"
    assert (type(module.engine).__name__, type(module.verifier).__name__) == ("TransformersEngine", "MathVerifier")
    optimizer = paper_adamw([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    names = ("lr", "betas", "eps", "weight_decay")
    assert tuple(optimizer.defaults[name] for name in names) == (1e-6, (0.9, 0.999), 1e-8, 0.01)
    data = OpenMathDataModule(SourceConfig())
    assert (data.prompts_per_step, data.val_batch_size) == (32, 64)
