"""Problems: where they come from, how they become prompts, and in which order they are seen."""

from hdpo.data.config import ColumnMapping, EvaluationSource, Selection, SourceConfig
from hdpo.data.datamodule import OpenMathDataModule
from hdpo.data.prompts import PromptConfig, PromptRenderer

__all__ = [
    "ColumnMapping",
    "EvaluationSource",
    "OpenMathDataModule",
    "PromptConfig",
    "PromptRenderer",
    "Selection",
    "SourceConfig",
]
