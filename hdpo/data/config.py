"""What the ``data`` section says of sources and selection, and the problem sets that follow from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from hdpo.errors import ConfigError, check_at_least, check_choice
from hdpo.experience import EvaluationSampling

Split = Literal["train", "validation", "test"]

BY_ROW_SEED = 42
"""The paper's seed of the split over rows; not the run's, so that all runs validate on the same problems."""


@dataclass(frozen=True)
class ColumnMapping:
    r"""Which column of the source holds what. The defaults are OpenMathInstruct-2's.

    Attributes:
        problem: the problem's text.
        solution: the worked reference solution; null if there is none (the privileged context is then the answer).
        answer: the final answer; null to read it from the solution's last ``\boxed{}`` (or by ``answer_pattern``).
        source: where the problem comes from: metrics are also logged by it; null for one name for all rows.
        context: text of any kind (a hint, a formula, an excerpt) that is the privileged context where
            ``data.prompts.privileged_context`` is ``column``.
        extra: columns that travel with the problem to the verifier and into ``Experience.prompts.columns``: text,
            numbers, booleans, null, and lists and dictionaries of these.
    """

    problem: str = "problem"
    solution: str | None = "generated_solution"
    answer: str | None = "expected_answer"
    source: str | None = "problem_source"
    context: str | None = None
    extra: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("solution", "answer", "source", "context"):
            if getattr(self, key) == "None":  # what jsonargparse makes of a null on the command line
                object.__setattr__(self, key, None)
        for name in set(self.extra) & {"prompts", "completions", "references"}:
            raise ConfigError(f"columns.extra: verifiers use the name {name!r} for something else; rename the column")

    def named(self) -> dict[str, str]:
        """Return the columns that are read: key of the configuration -> name of the column."""
        keys = ("problem", "solution", "answer", "source", "context")
        named = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return named | {f"extra[{i}]": name for i, name in enumerate(self.extra)}


@dataclass
class SourceConfig:
    r"""A data set and how to read it.

    Attributes:
        path: hub id (``nvidia/OpenMathInstruct-2``); local Parquet, Arrow, JSONL or JSON file, folder or glob (also
            ``pkg://package/file``); or ``python:package.module:function``, a function that returns an iterator of rows
            (dictionaries).
        name: configuration of a hub data set that has several (``main`` for openai/gsm8k).
        split: split of a hub data set or of a folder whose file names tell splits apart.
        revision: commit, tag or branch on the hub. Pin a commit: the cache cannot see that a branch has moved.
        columns: which column holds what.
        answer_pattern: regular expression that finds the final answer inside the answer's column (its first group, or
            all of it; the last match counts). GSM8K: ``'####\s*(.+)'``.
        source_name: name of the source where ``columns.source`` is null; by default the end of ``path``.
        kwargs: arguments of the ``python:`` function, or more arguments of ``datasets.load_dataset`` for a hub id.
    """

    path: str = "nvidia/OpenMathInstruct-2"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: ColumnMapping = field(default_factory=ColumnMapping)
    answer_pattern: str | None = None
    source_name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ConfigError(
                    f"answer_pattern {self.answer_pattern!r} is no regular expression: {error}"
                ) from error


@dataclass
class EvaluationSource(SourceConfig, EvaluationSampling):
    """A data set for evaluation (see :class:`SourceConfig`), and how its completions are sampled.

    Where no column holds the problems' source, it is the name of the set (unless ``source_name`` gives another).

    Attributes:
        num_problems: stop reading after this many problems; null for ``data.selection.num_val_problems`` or
            ``num_test_problems``.
        num_samples: sampled completions per problem; null for ``rollouts.num_val_samples``.
        temperature: of the sampled completions; null for ``rollouts.val_temperature``.
        max_new_tokens: token limit of a completion; null for ``rollouts.val_max_new_tokens``.

    Raises:
        ConfigError: a value outside its range.
    """

    num_problems: int | None = None

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        EvaluationSampling.__post_init__(self)
        check_at_least(1, num_problems=self.num_problems)

    @property
    def sampling(self) -> EvaluationSampling:
        """How the completions are sampled."""
        return EvaluationSampling(self.num_samples, self.temperature, self.max_new_tokens)


@dataclass(frozen=True)
class Selection:
    """Which rows become problems, and in which split they are.

    Attributes:
        num_train_problems: stop reading after this many training problems; null for all. It does not follow from
            trainer.max_steps * prompts_per_step, so that a run can be continued for more steps on the same problems.
            The default is what the paper's 2000 steps of 32 prompts see.
        num_val_problems: stop reading after this many problems of a validation set; null for all, 0 for no validation.
        num_test_problems: the same for a test set.
        val_fraction: share of the problems (or rows) of ``data.source`` that belong to validation, where there is no
            validation source.
        test_fraction: share that belongs to the test split, where there is no test source; 0 for none.
        split_by: ``problem``: by a hash of the problem's text, so that no problem is in two splits. ``row``: over rows,
            as in the paper, which leaks: rows of one problem fall into several splits.
        keep_duplicates: keep all rows of a problem instead of the first.
        check_references: drop problems whose reference answer the verifier cannot use.
        max_prompt_tokens: problems whose prompt is longer are dropped.
        max_privileged_tokens: problems whose privileged prompt is longer stay, but cannot be distilled.

    Raises:
        ConfigError: a value out of its range.
    """

    num_train_problems: int | None = 64000
    num_val_problems: int | None = 2048
    num_test_problems: int | None = 2048
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    split_by: Literal["problem", "row"] = "problem"
    keep_duplicates: bool = False
    check_references: bool = True
    max_prompt_tokens: int = 1024
    max_privileged_tokens: int = 2048

    def __post_init__(self) -> None:
        for lowest, names in (
            (1, ("num_train_problems", "max_prompt_tokens", "max_privileged_tokens")),
            (0, ("num_val_problems", "num_test_problems", "val_fraction", "test_fraction")),
        ):
            check_at_least(lowest, **{f"data__selection__{name}": getattr(self, name) for name in names})
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("data.selection: val_fraction + test_fraction must be below 1; the rest is for training")
        check_choice("data.selection.split_by", self.split_by, ("problem", "row"))

    def split(self, row: int, digest: bytes) -> Split:
        """Return the split that a row belongs to, by its number (from 0) or its problem's digest."""
        if self.split_by == "row":
            digest = hashlib.sha256(f"{BY_ROW_SEED}:{row}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
        if share < self.val_fraction:
            return "validation"
        return "test" if share < self.val_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class ProblemSet:
    """Problems wanted from one source: those to train on, or those of one evaluation.

    Attributes:
        name: ``train``, ``validation``, ``test``, ``predict``, or ``validation/NAME`` and ``test/NAME``.
        key: the configuration key of the source, for messages.
        source: what is read.
        num_problems: stop reading after this many; None for all.
        splits: the splits of the source that belong to the set; None for the whole source.
        held_out: names of the sets whose problems are left out.
        labelled: whether problems need an answer (and a solution where a column holds it). If not, only rows without a
            usable prompt are dropped.
    """

    name: str
    key: str
    source: SourceConfig
    num_problems: int | None = None
    splits: tuple[Split, ...] | None = None
    held_out: tuple[str, ...] = ()
    labelled: bool = True

    def __post_init__(self) -> None:
        columns = self.source.columns
        if self.labelled and columns.answer is None and columns.solution is None:
            raise ConfigError(f"{self.key}.columns: one of answer and solution must name a column")


def problem_sets(
    selection: Selection,
    source: SourceConfig,
    validation: Mapping[str, SourceConfig],
    test: Mapping[str, SourceConfig],
    predict: SourceConfig | None,
) -> list[ProblemSet]:
    """Return all problem sets of a configuration, each after those that it holds out.

    Args:
        selection: how many problems are wanted, and the shares of the splits.
        source: of the training problems, and of validation and test where they have none of their own.
        validation: validation sources by name; the name may be empty.
        test: test sources by name.
        predict: problems to predict.
    """
    tests = _external("test", test, selection.num_test_problems, ())
    validations = _external("validation", validation, selection.num_val_problems, tests)
    held_out = tuple(other.name for other in (*tests, *validations))
    splits: dict[Split, tuple[tuple[Split, ...], int | None]] = {}
    if not test and selection.test_fraction > 0 and selection.num_test_problems != 0:
        splits["test"] = ("test",), selection.num_test_problems
    if not validation and selection.val_fraction > 0 and selection.num_val_problems != 0:
        splits["validation"] = ("validation",), selection.num_val_problems
    splits["train"] = tuple(split for split in get_args(Split) if split not in splits), selection.num_train_problems
    own = [ProblemSet(name, "data.source", source, number, parts, held_out) for name, (parts, number) in splits.items()]
    predicted = [] if predict is None else [ProblemSet("predict", "data.predict_source", predict, labelled=False)]
    return [*tests, *validations, *own, *predicted]


def _external(
    kind: str, sources: Mapping[str, SourceConfig], num_problems: int | None, held_out: Sequence[ProblemSet]
) -> list[ProblemSet]:
    """Return the evaluation sets that have a source of their own; none where 0 problems are wanted."""
    section = {"validation": "data.val", "test": "data.test"}[kind]
    sets = []
    for name, source in sources.items() if num_problems != 0 else ():
        own = source.num_problems if isinstance(source, EvaluationSource) else None
        key, full_name = (f"{section}_sources.{name}", f"{kind}/{name}") if name else (f"{section}_source", kind)
        limit = num_problems if own is None else own
        if name and source.columns.source is None:
            source = replace(source, source_name=source.source_name or name)
        sets.append(ProblemSet(full_name, key, source, limit, held_out=tuple(other.name for other in held_out)))
    return sets
