"""The data module: problem sets, and the loaders that turn them into the steps' ``Experience``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hdpo.data.batches import (
    EvaluationSampler,
    ProblemDataset,
    PromptLoader,
    SizedPromptLoader,
    TrainSampler,
    check_batch,
)
from hdpo.data.cache import ProblemCache
from hdpo.data.config import EvaluationSource, ProblemSet, Selection, SourceConfig, problem_sets
from hdpo.data.preparation import PreparationReport
from hdpo.data.prompts import PromptConfig, PromptRenderer
from hdpo.errors import ConfigError, check_at_least, check_choice
from hdpo.evaluation.records import problem_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hdpo.rewards import Verifier

_SOURCE, _PROMPTS, _SELECTION = SourceConfig(), PromptConfig(), Selection()  # defaults; nothing writes to them


class OpenMathDataModule(LightningDataModule):
    """Problems with reference answers: OpenMathInstruct-2, anything with a column mapping, or generated rows.

    Rows are streamed, filtered, split and rendered once, and cached on disk; see :mod:`hdpo.data.preparation`. Only
    the sets that a stage needs are prepared: ``validate`` does not read the training problems. No problem is in two of
    training, validation and test (unless split by row): test sources are read whole, validation sources without the
    problems of the test sources, and the splits of ``source`` without those of any evaluation source.

    Args:
        source: where the training problems come from, and the validation and test problems where they have no source.
        prompts: how problems become prompts.
        selection: which rows become problems, how many, and in which split.
        val_source: a data set of its own for validation.
        val_sources: several by name, each with the keys of ``source`` and ``num_problems``, ``num_samples``,
            ``temperature`` and ``max_new_tokens``.
        test_source: a data set of its own for testing.
        test_sources: several by name, as ``val_sources``.
        predict_source: problems to write completions for; they need no answer. By default the validation problems.
        prompts_per_step: prompts per training step over ALL ranks together; a multiple of the number of ranks.
        evaluation_split: what ``fit`` evaluates on: ``validation``, or ``test`` for runs that are reported, in which
            nothing may be chosen by an evaluation (``best_checkpoint.monitor`` must be null). The training problems
            are the same either way.
        val_batch_size: problems per evaluation batch on EACH rank. Changes memory and speed, not the results.
        tokenizer: folder or hub id of a tokenizer, or the tokenizer; null for the policy's.
        verifier: tells which reference answers are usable; null for the LightningModule's.
        seed: of the order of the training problems; null for the LightningModule's, which is the run's.
        cache_dir: folder of prepared data.

    Raises:
        ConfigError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        source: SourceConfig = _SOURCE,
        prompts: PromptConfig = _PROMPTS,
        selection: Selection = _SELECTION,
        val_source: SourceConfig | None = None,
        val_sources: dict[str, EvaluationSource] | None = None,
        test_source: SourceConfig | None = None,
        test_sources: dict[str, EvaluationSource] | None = None,
        predict_source: SourceConfig | None = None,
        prompts_per_step: int = 32,
        evaluation_split: Literal["validation", "test"] = "validation",
        val_batch_size: int = 64,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        verifier: Verifier | None = None,
        seed: int | None = None,
        cache_dir: str = ".hdpo_cache",
    ) -> None:
        super().__init__()
        check_at_least(1, data__prompts_per_step=prompts_per_step, data__val_batch_size=val_batch_size)
        if prompts.privileged_context == "hint" and source.columns.solution is None:
            raise ConfigError("data.prompts.privileged_context=hint needs a column for data.source.columns.solution")
        if prompts.privileged_context == "column" and source.columns.context is None:
            raise ConfigError("data.prompts.privileged_context=column needs a column for data.source.columns.context")
        self.prompts = prompts
        self.selection = selection
        self.prompts_per_step = prompts_per_step
        check_choice("data.evaluation_split", evaluation_split, ("validation", "test"))
        self.evaluation_split = evaluation_split
        self.val_batch_size = val_batch_size
        self.cache_dir = cache_dir
        self._tokenizer = tokenizer
        self._verifier = verifier
        self._seed = seed
        #: All problem sets, each after those that it holds out.
        self.sets = problem_sets(
            selection, source, _named(val_source, val_sources), _named(test_source, test_sources), predict_source
        )
        self._datasets: dict[str, ProblemDataset] = {}
        self._stage = "fit"
        self._is_prepared = False
        # (problems consumed, optimizer step) at which this fit began; see `consumed`.
        self._origin = (0, 0)
        self._restored: int | None = None

    # What comes from the LightningModule unless it is given

    def _of_module(self, name: str) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, name, None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ConfigError: none is given, and there is no policy that has one.
        """
        if isinstance(self._tokenizer, str):
            from hdpo.policy import PolicyConfig, load_tokenizer

            self._tokenizer = load_tokenizer(PolicyConfig(path=self._tokenizer))
        tokenizer = self._tokenizer if self._tokenizer is not None else self._of_module("tokenizer")
        if tokenizer is None:
            raise ConfigError("data.tokenizer: there is no policy to take it from; give its folder or hub id")
        return cast("PreTrainedTokenizerBase", tokenizer)

    @property
    def verifier(self) -> Verifier:
        """Who tells which reference answers are usable; math-verify where neither this nor the module has one."""
        from hdpo.rewards import MathVerifier

        verifier = self._verifier if self._verifier is not None else self._of_module("verifier")
        return MathVerifier() if verifier is None else cast("Verifier", verifier)

    @property
    def seed(self) -> int:
        """Seed of the order of the training problems."""
        seed = self._seed if self._seed is not None else self._of_module("seed")
        return 42 if seed is None else int(seed)

    # Preparation

    def prepare_data(self) -> None:
        """Prepare and cache the sets of the stage, unless they are in the cache. Lightning calls it once per node."""
        stage = None if self.trainer is None else self.trainer.state.fn
        self._load("fit" if stage is None else stage.value)
        self._is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Read the cache, on every rank; what is missing is prepared (one process does, the others wait).

        Raises:
            ConfigError: fewer problems than a step takes, or a step that cannot be split evenly.
        """
        if not self._is_prepared:
            self._load(stage or "fit")
        self._is_prepared = False
        if self._stage == "fit":
            self._origin, self._restored = (0, 0), None
            # Refuse early what cannot be split or sampled.
            num_minibatches = getattr(self._of_module("update"), "num_minibatches", 1)
            check_batch(self.prompts_per_step, self._ranks()[1], num_minibatches)
            self._train_sampler()

    def _load(self, stage: str) -> None:
        self._stage = stage
        names = {wanted.name for wanted in self._evaluation_sets()} | ({"train"} if stage == "fit" else set())
        if not names:
            kind = "test" if self.evaluated_split == "test" else "val"
            raise ConfigError(
                f"data: there is nothing to {stage}: give data.{kind}_source, or data.selection.num_{kind}_problems "
                f"and {kind}_fraction"
            )
        for wanted in reversed(self.sets):
            names |= set(wanted.held_out) if wanted.name in names else set()
        sets = [wanted for wanted in self.sets if wanted.name in names]
        renderer = PromptRenderer(self.tokenizer, self.prompts)
        verifier = self.verifier if self.selection.check_references else None
        try:
            self._datasets = ProblemCache(self.cache_dir, self.selection, renderer, verifier).load(sets)
        finally:
            if verifier is not None and verifier is not self._of_module("verifier"):
                verifier.close()
        for wanted in sets:
            found, limit = len(self._datasets[wanted.name]), wanted.num_problems
            rank_zero_info(f"{wanted.name}: {found:,} problems of {wanted.source.path}")
            if wanted.splits is not None and limit is not None and found < limit:
                rank_zero_warn(
                    f"{wanted.key} ended after {found:,} usable {wanted.name} problems; {limit:,} are wanted"
                )

    def dataset(self, name: str) -> ProblemDataset:
        """Return a problem set of the current stage: ``train``, ``validation``, ``validation/NAME``, ``test``, ...

        Raises:
            RuntimeError: ``setup`` was not called for a stage that has it.
        """
        if name not in self._datasets:
            raise RuntimeError(f"the data module has no {name!r} data: call prepare_data() and setup() for its stage")
        return self._datasets[name]

    @property
    def reports(self) -> list[PreparationReport]:
        """What happened to the rows, one report for each problem set of the current stage."""
        return [dataset.report for dataset in self._datasets.values()]

    @property
    def evaluation_groups(self) -> dict[str, int | None]:
        """Groups of the current stage's evaluation problems, sorted: the same on all ranks.

        Returns:
            Name (as :func:`hdpo.evaluation.records.problem_groups` gives it) -> samples per problem; None for what
            ``rollouts`` says.
        """
        groups: dict[str, int | None] = {}
        for wanted in self._evaluation_sets():
            number = wanted.source.num_samples if isinstance(wanted.source, EvaluationSource) else None
            for source in self.dataset(wanted.name).sources():
                groups |= dict.fromkeys(problem_groups(wanted.name.partition("/")[2], source), number)
        return dict(sorted(groups.items()))

    # Loaders

    @property
    def evaluated_split(self) -> str:
        """The split that the current stage evaluates (or predicts)."""
        return {"fit": self.evaluation_split, "validate": "validation"}.get(self._stage, self._stage)

    def _evaluation_sets(self) -> list[ProblemSet]:
        kind = self.evaluated_split
        if kind == "predict" and not any(s.name == "predict" for s in self.sets):
            kind = "validation"
        return [s for s in self.sets if s.name.partition("/")[0] == kind]

    def _ranks(self) -> tuple[int, int]:
        """Return this rank and the number of ranks among which a batch is split (data-parallel ones only)."""
        kwargs = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return kwargs["rank"], kwargs["num_replicas"]

    def _train_sampler(self) -> TrainSampler:
        size = len(self.dataset("train"))
        return TrainSampler(size, self.prompts_per_step, self.seed, *self._ranks(), consumed=self.consumed)

    def train_dataloader(self) -> PromptLoader:
        """Return the endless stream of training batches, from where the run stands."""
        if self._restored is not None:
            self._origin, self._restored = (self._restored, self._global_step()), None
        return PromptLoader(self.dataset("train"), self._train_sampler())

    def val_dataloader(self) -> list[SizedPromptLoader]:
        """Return one loader per evaluation set of the current stage; an empty list where there is none."""
        loaders = []
        for wanted in self._evaluation_sets():
            dataset = self.dataset(wanted.name)
            sampler = EvaluationSampler(len(dataset), self.val_batch_size, *self._ranks())
            sampling = wanted.source.sampling if isinstance(wanted.source, EvaluationSource) else None
            loaders.append(SizedPromptLoader(dataset, sampler, wanted.name.partition("/")[2], sampling))
        return loaders

    test_dataloader = predict_dataloader = val_dataloader

    # Resuming

    def _global_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def consumed(self) -> int:
        """Problems that all ranks together have trained on.

        Counted in optimizer steps (one per batch), and not in batches that were handed out: Lightning fetches one
        batch ahead, and a step that was interrupted has changed no weights.
        """
        if self._restored is not None:
            return self._restored
        consumed, step = self._origin
        return consumed + (self._global_step() - step) * self.prompts_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands in the data: the same on all ranks, whatever their number."""
        if "train" not in self._datasets:
            return {}
        return {"consumed": self.consumed, "fingerprint": self.dataset("train").fingerprint, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint stands.

        Raises:
            ConfigError: the checkpoint was trained on other problems or in another order. (Evaluation may be on any.)
        """
        if self._stage != "fit" or not state_dict:
            return
        fingerprint = self.dataset("train").fingerprint
        if state_dict["fingerprint"] != fingerprint:
            raise ConfigError(
                "the checkpoint was trained on other problems than data.source gives now "
                f"(fingerprints {state_dict['fingerprint']} and {fingerprint}): resume with the same "
                "data settings, or start a new run from the exported policy"
            )
        if state_dict["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint's order of problems has seed {state_dict['seed']}, but data.seed is {self.seed}: "
                "resume with the same seed_everything"
            )
        self._restored = state_dict["consumed"]


def _named(one: SourceConfig | None, several: Mapping[str, SourceConfig] | None) -> dict[str, SourceConfig]:
    return ({} if one is None else {"": one}) | dict(several or {})
