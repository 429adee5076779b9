"""Hybrid Distillation Policy Optimization (arXiv 2603.23871, here "the paper") as a modular Lightning codebase.

A run is an :class:`HDPOModule` and an :class:`OpenMathDataModule` under a Lightning ``Trainer``; ``python -m hdpo fit``
makes the same from YAML. To extend it, subclass :class:`Divergence`, :class:`PolicyLoss`, :class:`Teacher`,
:class:`Verifier`, :class:`GenerationEngine` or :class:`Station`.

Shapes in docstrings: B prompts, K rollouts per prompt, N sequences, M completion tokens of a micro-batch, V tokens in
the vocabulary, k of them that the teacher reports. Log-probabilities and divergences are in nats.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdpo.callbacks import (
        BestCheckpoint,
        CliffDetection,
        CliffReplay,
        DistillationRefresh,
        Evaluation,
        LastCheckpoint,
        PolicyExport,
        Progress,
        RolloutGeneration,
        SampleLogger,
        Station,
    )
    from hdpo.data import ColumnMapping, EvaluationSource, OpenMathDataModule, PromptConfig, Selection, SourceConfig
    from hdpo.errors import ConfigError
    from hdpo.experience import Experience, Sequences
    from hdpo.generation import GenerationEngine, SamplingConfig, TransformersEngine, VLLMEngine
    from hdpo.losses import (
        JSD,
        ClippedPolicyLoss,
        Divergence,
        ForwardKL,
        GeneralizedJSD,
        PolicyLoss,
        ReverseKL,
        UpdateConfig,
    )
    from hdpo.module import HDPOModule
    from hdpo.optim import LinearWarmup
    from hdpo.policy import LoRAConfig, Policy, PolicyConfig, TokenBatch, load_tokenizer
    from hdpo.rewards import FunctionVerifier, Grade, MathVerifier, Outcome, Verifier
    from hdpo.teacher import DriftingTeacher, EMATeacher, FrozenTeacher, Teacher, teacher_topk

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "BestCheckpoint",
    "CliffDetection",
    "CliffReplay",
    "ClippedPolicyLoss",
    "ColumnMapping",
    "ConfigError",
    "DistillationRefresh",
    "Divergence",
    "DriftingTeacher",
    "EMATeacher",
    "Evaluation",
    "EvaluationSource",
    "Experience",
    "ForwardKL",
    "FrozenTeacher",
    "FunctionVerifier",
    "GeneralizedJSD",
    "GenerationEngine",
    "Grade",
    "HDPOModule",
    "LastCheckpoint",
    "LinearWarmup",
    "LoRAConfig",
    "MathVerifier",
    "OpenMathDataModule",
    "Outcome",
    "Policy",
    "PolicyConfig",
    "PolicyExport",
    "PolicyLoss",
    "Progress",
    "PromptConfig",
    "ReverseKL",
    "RolloutGeneration",
    "SampleLogger",
    "SamplingConfig",
    "Selection",
    "Sequences",
    "SourceConfig",
    "Station",
    "Teacher",
    "TokenBatch",
    "TransformersEngine",
    "UpdateConfig",
    "VLLMEngine",
    "Verifier",
    "load_tokenizer",
    "teacher_topk",
]

_HOMES = (
    *("module", "optim", "callbacks", "data", "losses", "teacher", "policy", "generation", "rewards", "experience"),
    "errors",
)


def __getattr__(name: str) -> Any:
    # torch and Lightning take seconds to import; `python -m hdpo --help` does not need them.
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"hdpo.{home}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
