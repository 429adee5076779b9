"""Problems: where they come from, how they become prompts, and in which order they are seen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdpo.data.config import ColumnMapping, EvaluationSource, Selection, SourceConfig
    from hdpo.data.datamodule import OpenMathDataModule
    from hdpo.data.prompts import PromptConfig, PromptRenderer

_HOMES = {
    "ColumnMapping": "config",
    "EvaluationSource": "config",
    "OpenMathDataModule": "datamodule",
    "PromptConfig": "prompts",
    "PromptRenderer": "prompts",
    "Selection": "config",
    "SourceConfig": "config",
}

__all__ = [
    "ColumnMapping",
    "EvaluationSource",
    "OpenMathDataModule",
    "PromptConfig",
    "PromptRenderer",
    "Selection",
    "SourceConfig",
]


def __getattr__(name: str) -> Any:
    # Lightning is imported only by who asks for the data module: `python -m hdpo --help` stays quick.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
