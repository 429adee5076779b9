"""Problems as batches, in an order that is a pure function of the seed and of how many were seen before.

Training sees an endless sequence of global batches that depends on neither the number of ranks nor on where a run was
interrupted. Evaluation sees every problem once, in order, with the same number of batches on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hdpo.errors import ConfigError, check_at_least
from hdpo.experience import EvaluationSampling, Experience, Prompts
from hdpo.functional.random import Purpose, derive_seeds

if TYPE_CHECKING:
    import pyarrow

    from hdpo.data.preparation import PreparationReport


def check_batch(prompts_per_step: int, num_ranks: int = 1, num_minibatches: int = 1) -> None:
    """Refuse a batch that cannot be split evenly.

    Args:
        prompts_per_step: prompts of one training step over all ranks together.
        num_ranks: data-parallel processes that share it.
        num_minibatches: updates per pass over it (``model.update.num_minibatches``).

    Raises:
        ConfigError: one of them does not divide it.
    """
    check_at_least(1, data__prompts_per_step=prompts_per_step)
    for number, what in ((num_ranks, "ranks"), (num_minibatches, "minibatches (model.update.num_minibatches)")):
        if prompts_per_step % number:
            raise ConfigError(
                f"data.prompts_per_step={prompts_per_step} cannot be split evenly over {number} {what}: "
                f"choose a positive multiple of {number}"
            )


@dataclass(frozen=True)
class BatchRows:
    """One rank's part of a global batch.

    Attributes:
        rows: rows of the data set.
        index: their positions in the global batch.
        valid: False for a repetition that only evens out the ranks.
    """

    rows: list[int]
    index: list[int]
    valid: list[bool]


class TrainSampler:
    """Endless, seeded, resumable stream of this rank's share of the global training batches.

    Pass p goes through all problems in an order drawn from (seed, p). A batch may span two passes; the new pass then
    begins with problems that the batch does not hold yet. Rank r of W gets positions r*P/W ... (r+1)*P/W - 1 of each
    global batch of P problems, so that the sequence of global batches is the same for every W.

    Args:
        num_rows: problems in the training set.
        prompts_per_step: P, problems in a global batch.
        seed: of the permutations.
        rank: this rank's number among those that share the batch.
        num_ranks: W, how many share it.
        consumed: problems that all ranks together have seen before: the first batch is number consumed // P.

    Raises:
        ConfigError: fewer problems than a batch holds, or a batch that cannot be split evenly.
    """

    def __init__(
        self, num_rows: int, prompts_per_step: int, seed: int, rank: int = 0, num_ranks: int = 1, consumed: int = 0
    ) -> None:
        check_batch(prompts_per_step, num_ranks)
        if num_rows < prompts_per_step:
            raise ConfigError(
                f"data.prompts_per_step={prompts_per_step} is more than the {num_rows} training problems, so that a "
                "step would hold some of them twice: lower it, or give more problems"
            )
        self.num_rows = num_rows
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.consumed = consumed

    def __iter__(self) -> Iterator[BatchRows]:
        share = self.prompts_per_step // self.num_ranks
        index = list(range(self.rank * share, (self.rank + 1) * share))
        for rows in self._global_batches(self.consumed // self.prompts_per_step):
            yield BatchRows([rows[i] for i in index], index, [True] * share)

    def _permutation(self, number: int) -> list[int]:
        # Sorting hashes depends on nothing but the hash: no generator whose algorithm may change between releases.
        keys = derive_seeds(self.seed, Purpose.PROBLEM_ORDER, number, torch.arange(self.num_rows))
        return torch.argsort(keys, stable=True).tolist()

    def _global_batches(self, start: int) -> Iterator[list[int]]:
        size = self.prompts_per_step
        # With whole batches only, passes do not depend on each other and the ones before `start` need not be drawn.
        skipped = start * size // self.num_rows if self.num_rows % size == 0 else 0
        start -= skipped * self.num_rows // size
        left: list[int] = []
        number = skipped
        while True:
            order = self._permutation(number)
            if left:
                held = set(left)
                fresh = [row for row in order if row not in held][: size - len(left)]
                first = set(fresh)
                order = left + fresh + [row for row in order if row not in first]
            whole = len(order) // size
            for batch in range(min(start, whole), whole):
                yield order[batch * size : (batch + 1) * size]
            start -= min(start, whole)
            left = order[whole * size :]
            number += 1


class EvaluationSampler:
    """This rank's batches of an evaluation: all ranks together see every problem once.

    Every rank gets the same number of batches of the same sizes, because ranks that sample together must also stop
    together. Where the problems do not suffice, the first ones are repeated with ``valid`` False.

    Args:
        num_rows: problems in the evaluation set.
        batch_size: problems in one batch of ONE rank.
        rank: this rank's number.
        num_ranks: how many ranks share the pass.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks

    def _starts(self) -> range:
        return range(0, self.num_rows, self.batch_size * self.num_ranks)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[BatchRows]:
        for start in self._starts():
            # The last batch is shared out evenly: less than one repetition per rank.
            share = min(self.batch_size, -(-(self.num_rows - start) // self.num_ranks))
            positions = range(start + self.rank * share, start + (self.rank + 1) * share)
            yield BatchRows(
                [position % self.num_rows for position in positions],
                [position - start for position in positions],
                [position < self.num_rows for position in positions],
            )


class ProblemDataset:
    """The problems of one set, by row. They stay on disk, memory-mapped, and are shared by all processes.

    Args:
        table: columns problem, answer, solution, source, extra (text), prompt_ids, privileged_ids (lists of integers).
        report: what happened to the rows of the source.
        fingerprint: hash of problems, answers and extra columns in their order; a run resumes on equal data only.
    """

    def __init__(self, table: pyarrow.Table, report: PreparationReport, fingerprint: str = "") -> None:
        self._columns = table
        self._extra = tuple(json.loads(table["extra"][0].as_py())) if table.num_rows else ()
        self.report = report
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def sources(self) -> list[str]:
        """Return the distinct sources, sorted."""
        return sorted(self._columns["source"].unique().to_pylist())

    def column(self, name: str) -> list[str]:
        """Return a text column: problem, answer, solution or source."""
        return list(self._columns[name].to_pylist())

    def prompts(
        self, rows: Sequence[int], index: Sequence[int] | None = None, valid: Sequence[bool] | None = None
    ) -> Prompts:
        """Build the prompts of some rows.

        Args:
            rows: rows of this data set, B of them.
            index: their positions in the global batch; 0 ... B-1 by default.
            valid: see :class:`hdpo.experience.Prompts`; all True by default.

        Raises:
            IndexError: a row that does not exist.
        """
        wrong = [row for row in rows if not 0 <= row < len(self)]
        if wrong:
            raise IndexError(f"row {wrong[0]} of a data set of {len(self)} problems")
        taken = {name: [self._columns[name][row].as_py() for row in rows] for name in self._columns.column_names}
        extra = [json.loads(text) for text in taken["extra"]]
        return Prompts(
            index=torch.tensor(list(range(len(rows)) if index is None else index), dtype=torch.int64),
            row=torch.tensor(list(rows), dtype=torch.int64),
            problem=taken["problem"],
            reference=taken["answer"],
            solution=taken["solution"],
            source=taken["source"],
            prompt_ids=taken["prompt_ids"],
            privileged_ids=taken["privileged_ids"],
            valid=torch.tensor([True] * len(rows) if valid is None else list(valid), dtype=torch.bool),
            columns={name: [values[name] for values in extra] for name in self._extra},
        )


class PromptLoader:
    """Yields this rank's batches.

    A plain iterable, so that Lightning leaves its order alone: it replaces the samplers of a ``DataLoader`` when it
    predicts or runs on several ranks. There is nothing for worker processes to do, since the prompts are token ids
    already.

    Args:
        dataset: the problems.
        sampler: which of them make up the batches.
        name: of the evaluation set, which the batches carry.
        sampling: how its completions are sampled, which the batches carry too.
    """

    def __init__(
        self,
        dataset: ProblemDataset,
        sampler: TrainSampler | EvaluationSampler,
        name: str = "",
        sampling: EvaluationSampling | None = None,
    ) -> None:
        self.dataset = dataset
        self.batches = sampler
        self.name = name
        self.sampling = sampling or EvaluationSampling()

    def __iter__(self) -> Iterator[Experience]:
        for batch in self.batches:
            prompts = self.dataset.prompts(batch.rows, batch.index, batch.valid)
            yield Experience(replace(prompts, dataset=self.name, sampling=self.sampling))


class SizedPromptLoader(PromptLoader):
    """A loader that ends, and knows when. Training has one endless epoch, and its loader no length."""

    batches: EvaluationSampler

    def __len__(self) -> int:
        return len(self.batches)
