"""Every cliff so far, and its pass rate whenever it was seen again: one store, for the metrics and for replay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from hdpo.distributed import gather_objects
from hdpo.experience import Experience


class Visit(NamedTuple):
    """One step in which a prompt was sampled without help: its successes, and its rollouts with a verdict."""

    step: int
    successes: int
    verdicts: int


class CliffHistory:
    """The training problems that were a cliff at least once; the same on all ranks.

    What a step notes counts from its end on: one that breaks off comes again when the run is resumed.

    Attributes:
        visits: row of the training problems -> its visits in the order of steps, first the one at which it was a cliff.
        distilled: row -> the last step at which completions of it were taken to be distilled.
    """

    def __init__(self) -> None:
        self.visits: dict[int, list[Visit]] = {}
        self.distilled: dict[int, int] = {}
        self._seen: dict[int, Visit] = {}  # in the step under way
        self._taken: dict[int, int] = {}

    def visit(self, batch: Experience, step: int) -> None:
        """Measure how former cliffs fare in a batch, then note its cliffs and them; all ranks must call it together.

        A former cliff counts as observed if one of its rollouts succeeds, or all have a verdict.
        """
        prompts, rollouts, measured = batch.prompts, batch.rollouts, batch.measurements
        assert rollouts is not None
        assert batch.is_cliff is not None
        seen: list[tuple[int, int, int]] = []
        counts = (rollouts.success.sum(-1), rollouts.has_verdict.sum(-1), batch.is_cliff)
        columns = zip(prompts.row.tolist(), prompts.source, *(x.tolist() for x in counts), strict=True)
        for row, source, successes, verdicts, is_cliff in columns:
            former = self.visits.get(row)
            observed = former and (successes or verdicts == rollouts.num_generations)
            for of, suffix in (("", ""), ("_by_source", f"/{source}")):
                measured.add(f"cliff{of}/seen_again{suffix}", float(bool(former)))
                if observed:
                    measured.add(f"cliff{of}/converted{suffix}", float(successes > 0))
                if observed and row in self.distilled:
                    measured.add(f"cliff{of}/converted_distilled{suffix}", float(successes > 0))
                if former and successes and not any(visit.successes for visit in former[1:]):
                    measured.add(f"cliff{of}/steps_to_success{suffix}", step - former[0].step)
            if former or is_cliff:
                seen.append((row, successes, verdicts))
        together: dict[int, tuple[int, int]] = {}  # a row may stand in a batch twice
        for row, successes, verdicts in (entry for part in gather_objects(seen) for entry in part):
            others = together.get(row, (0, 0))
            together[row] = others[0] + successes, others[1] + verdicts
        self._seen = {row: Visit(step, *both) for row, both in sorted(together.items())}
        self._taken = {}

    def distil(self, rows: Iterable[int], step: int) -> None:
        """Note the rows of this rank of which completions are distilled; all ranks must call it together."""
        self._taken = {row: step for part in gather_objects(sorted(set(rows))) for row in part}

    def finish(self, *, distilled: bool = True) -> None:
        """Take over what the step that has ended noted; ``distilled`` is whether what it took was trained on."""
        for row, visit in self._seen.items():
            self.visits.setdefault(row, []).append(visit)
        for row, step in self._taken.items() if distilled else ():
            self.visits.setdefault(row, [Visit(step, 0, 0)])  # a station of the user's may have made it a cliff
            self.distilled[row] = step
        self._seen, self._taken = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Both, as tables of integers."""
        visits = [[row, *visit] for row, visits in self.visits.items() for visit in visits]
        return {
            "visits": torch.tensor(visits, dtype=torch.int64).view(-1, 4),
            "distilled": torch.tensor(list(self.distilled.items()), dtype=torch.int64).view(-1, 2),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.visits = {}
        for row, *visit in state_dict["visits"].tolist():
            self.visits.setdefault(row, []).append(Visit(*visit))
        self.distilled = dict(state_dict["distilled"].tolist())
