"""A whole HDPO run in miniature: the laboratory's policy and problems, few prompts, grading in process."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from hdpo.callbacks import CliffDetection, DistillationRefresh, Evaluation, LastCheckpoint, RolloutGeneration
from hdpo.data import OpenMathDataModule, PromptConfig, Selection, SourceConfig
from hdpo.lab.task import LAB_PROMPTS
from hdpo.losses import JSD, ClippedPolicyLoss, ForwardKL, GeneralizedJSD, PolicyLoss, ReverseKL, UpdateConfig
from hdpo.module import HDPOModule
from hdpo.optim import LinearWarmup
from hdpo.policy import PolicyConfig
from hdpo.rewards import Grade, Outcome, Verifier
from hdpo.teacher import DriftingTeacher, EMATeacher, FrozenTeacher
from tests.helpers.reference import Options, boxed

__all__ = ["TEMPERATURE", "BoxedVerifier", "datamodule", "module", "source", "trainer"]


#: The laboratory's policy is sharp: at temperature 1 most groups of four are of one mind.
TEMPERATURE = 1.6


class BoxedVerifier(Verifier):
    """Grades in process, by default what stands in the last box, as text; enough for integers."""

    def __init__(self, outcome=boxed):
        super().__init__()
        self.outcome = outcome

    def grade(self, completions, references, **columns):
        outcomes = [Outcome(self.outcome(c, r)) for c, r in zip(completions, references, strict=True)]
        return [Grade(outcome, float(outcome is Outcome.CORRECT)) for outcome in outcomes]

    def usable(self, references, **columns):
        return [bool(r) for r in references]


def module(**options: Any) -> HDPOModule:
    """The module on the laboratory's policy, with the options of a step by their words; plain SGD shows gradients."""
    given = {
        "policy": PolicyConfig(path="pkg://hdpo.lab/policy"),
        "verifier": BoxedVerifier(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "lr_scheduler": lambda optimizer: LinearWarmup(optimizer, num_warmup_steps=0),
        "distillation_weight": 1.0,
        "micro_batch_tokens": 2048,
        "pass_k": (1, 2),
        "seed": 0,
        **options,
    }

    def take(kind: Any, *bases: Any) -> Any:
        names = {name for one in (kind, *bases) for name in inspect.signature(one).parameters}
        return kind(**{name: given.pop(name) for name in list(given) if name in names})

    tail, decay = given.pop("jsd_tail", "exact"), given.pop("teacher_decay", 0.99)
    teacher_weight = given.pop("teacher_weight", 0.5)
    divergence, teacher = given.pop("divergence", "jsd"), given.pop("teacher", "drifting")
    rollouts, distillation = given.pop("rollouts", {}), given.pop("distillation", {})
    return HDPOModule(
        policy_loss=take(ClippedPolicyLoss, PolicyLoss),
        update=take(UpdateConfig),
        divergence={
            "jsd": JSD(tail),
            "generalized_jsd": GeneralizedJSD(teacher_weight),
            "forward_kl": ForwardKL(),
            "reverse_kl": ReverseKL(),
        }[divergence],
        teacher={"drifting": DriftingTeacher, "frozen": FrozenTeacher, "ema": lambda: EMATeacher(decay)}[teacher](),
        rollouts=RolloutGeneration(
            **{
                "num_generations": 4,
                "max_new_tokens": 48,
                "num_val_samples": 2,
                "temperature": given.pop("temperature", TEMPERATURE),
                **rollouts,
            }
        ),
        distillation=DistillationRefresh(**{"num_privileged": 2, "max_new_tokens": 64, "topk": 16, **distillation}),
        **given,
    )


def source(split: str, tiers: list[int] | None = None) -> SourceConfig:
    """Problems of the laboratory."""
    return SourceConfig(path="python:hdpo.lab.problems:rows", kwargs={"split": split, "tiers": tiers or [4, 5, 6]})


def datamodule(folder: Path, **options: Any) -> OpenMathDataModule:
    """Problems of the two hardest and one easy tier, so that some are cliffs and some are mixed."""
    selection = {"num_train_problems": 90, "num_val_problems": 9, "test_fraction": 0.0, "check_references": False}
    selection |= {field.name: options.pop(field.name) for field in fields(Selection) if field.name in options}
    defaults: dict[str, Any] = {
        "source": source("train"),
        "val_source": source("validation"),
        "prompts": PromptConfig(**vars(LAB_PROMPTS)),
        "selection": Selection(**selection),
        "prompts_per_step": 6,
        "val_batch_size": 5,
        "cache_dir": str(folder / "cache"),
        "seed": 0,
    }
    return OpenMathDataModule(**{**defaults, **options})


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A CPU trainer."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": [*callbacks, Evaluation(summary=False), LastCheckpoint(every_n_steps=1000)],
    }
    return Trainer(**{**defaults, **options})


def fit(
    folder: Path,
    options: Options,
    *callbacks: Any,
    steps: int = 2,
    engine: Any = None,
    tiers: list[int] | None = None,
    path: str = "pkg://hdpo.lab/policy",
    data: dict | None = None,
    ckpt_path: Any = None,
    dtype: str = "float64",
    **settings: Any,
) -> HDPOModule:
    """Train on the laboratory's problems with the options of a step; returns the module."""
    o = options
    fitted = module(
        policy=PolicyConfig(path=path, dtype=dtype),
        engine=engine,
        verifier=BoxedVerifier(o.grade),
        lr_scheduler=lambda optimizer: LinearWarmup(optimizer, o.num_warmup_steps, o.start_factor),
        rollouts={"num_generations": o.num_generations, "max_new_tokens": o.max_new_tokens, "max_logprob_gap": 1.0},
        distillation={
            "num_privileged": o.num_privileged,
            "max_new_tokens": o.privileged_new_tokens,
            "temperature": o.privileged_temperature,
            "max_cliffs_per_step": o.max_cliffs_per_step,
            "topk": o.topk,
            "refresh_every": o.refresh_every,
            "completions": o.completions,
            "sampled_by": o.sampled_by,
            "target": o.target,
        },
        cliffs=CliffDetection(reference_in_group=o.reference_in_group),
        **{name: getattr(o, name) for name in MODULE_OPTIONS},
    )
    fitter = trainer(folder, *callbacks, **{"max_steps": steps, "limit_val_batches": 0, **settings})
    sources = {} if tiers is None else {"source": source("train", tiers)}
    fitter.fit(fitted, datamodule=datamodule(folder, **sources, **(data or {})), ckpt_path=ckpt_path)
    return fitted


MODULE_OPTIONS = (
    "optimizer",
    "distillation_weight",
    "teacher",
    "teacher_decay",
    "divergence",
    "jsd_tail",
    "teacher_weight",
    "privileged_policy_weight",
    "off_policy_shaping",
    "log_gradient_norms",
    "advantage_scale",
    "clip_eps_low",
    "clip_eps_high",
    "aggregation",
    "kl_coef",
    "mask_truncated",
    "count_zero_variance",
    "sampler_correction",
    "sampler_correction_threshold",
    "num_epochs",
    "num_minibatches",
    "max_grad_norm",
    "micro_batch_tokens",
    "temperature",
)
