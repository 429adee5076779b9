"""What the cache's tests and the processes that they start have in common; quick to import."""

from __future__ import annotations

from pathlib import Path

from hdpo.data.cache import ProblemCache
from hdpo.data.config import ProblemSet, Selection, SourceConfig
from hdpo.data.prompts import PromptConfig, PromptRenderer
from tests.helpers.openmath_fixture import tiny_tokenizer

LIMITS = {"val_fraction": 0.25, "test_fraction": 0.1, "max_prompt_tokens": 500, "max_privileged_tokens": 500}


def problems(folder, tokenizer, *, prompts=None, verifier=None, **selection) -> ProblemCache:
    renderer = PromptRenderer(tokenizer, prompts or PromptConfig())
    return ProblemCache(str(folder), Selection(**LIMITS | selection), renderer, verifier)


def slow(folder: Path, **kwargs) -> SourceConfig:
    return SourceConfig(path="python:tests.data.slow_source:rows", kwargs={"log": str(folder / "log"), **kwargs})


def splits(source: SourceConfig, **changes) -> list[ProblemSet]:
    """Validation and training as splits of one source."""
    defaults = {"key": "data.source", "source": source, "num_problems": None, **changes}
    return [
        ProblemSet(name="validation", splits=("validation",), **defaults),
        ProblemSet(name="train", splits=("train", "test"), **defaults),
    ]


def prepare_in_child(folder: str, kwargs: dict) -> None:
    problems(folder, tiny_tokenizer()).load(splits(slow(Path(folder), **kwargs)))
