"""What makes a laboratory: rows, prompts, warm-up and sizes. Each laboratory is an instance of :class:`Task`.

Training knows nothing of it. A configuration names the rows, the prompts and the policy that came out of the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hdpo.data.prompts import PromptConfig
from hdpo.lab import transfer
from hdpo.lab.problems import foreign_rows, rows

# Short on purpose: the tiny policy pays for every token of its prompt.
LAB_PROMPTS = PromptConfig(instruction="", privileged_template="Solution: {context}\n{problem}")


@dataclass(frozen=True)
class Recipe:
    """The supervised warm-up of an embedded policy; written beside the weights. The defaults are the stories'.

    Attributes:
        seed: of problems, initial weights and the order of examples.
        steps: optimizer steps.
        num_plain: plain examples a step.
        num_privileged: privileged examples a step.
        plain_tiers: tier -> weight among the plain examples. Hard tiers must stay out: one per cent of five-step
            examples is enough to teach that tier, and the cliffs are gone.
        privileged_tiers: tier -> weight among the privileged examples with a worked solution.
        answer_only_tiers: tier -> weight among those with the answer alone. Hard tiers must stay out here too: the
            answer says nothing of the steps, so these are almost plain examples.
        answer_only_every: one privileged example in so many shows the answer alone.
        privileged_weight: factor of the privileged examples' loss.
        learning_rate: peak learning rate of AdamW.
        num_ramp_steps: steps of linear increase to the peak, before the cosine decay.
        final_fraction: share of the peak learning rate that is left at the end.
    """

    seed: int = 0
    steps: int = 1400
    num_plain: int = 48
    num_privileged: int = 20
    plain_tiers: Mapping[int, float] = field(default_factory=lambda: {1: 0.36, 2: 0.31, 3: 0.25, 4: 0.08})
    privileged_tiers: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys(range(1, 7), 1.0))
    answer_only_tiers: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys(range(1, 5), 1.0))
    answer_only_every: int = 5
    privileged_weight: float = 1.0
    learning_rate: float = 2e-3
    num_ramp_steps: int = 50
    final_fraction: float = 0.05

    def __post_init__(self) -> None:
        for name in ("steps", "num_plain", "num_privileged", "answer_only_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Sizes:
    """The policy's sizes, by the names of ``Qwen2Config``. Heads have 32 channels, see :func:`~.warmup.new_policy`."""

    hidden_size: int = 96
    intermediate_size: int = 288
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    num_key_value_heads: int = 1


@dataclass(frozen=True)
class Task:
    """A laboratory.

    Attributes:
        name: names the task on the command line.
        policy: folder of the embedded policy.
        rows: called with ``(num_problems, split=, seed=, tiers=)``, yields rows with OpenMathInstruct-2's columns, as
            :func:`hdpo.lab.problems.rows` does. No problem may be in two splits.
        prompts: how problem and privileged context become prompts; what the laboratory's configuration says, too.
        completion: column of the completions that the warm-up teaches, in both contexts.
        recipe: the warm-up.
        sizes: of the policy.
    """

    name: str
    policy: Path
    rows: Callable[..., Iterator[dict[str, str]]] = rows
    prompts: PromptConfig = LAB_PROMPTS
    completion: str = "generated_solution"
    recipe: Recipe = Recipe()
    sizes: Sizes = Sizes()


def ground_truth(row: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Return what :meth:`hdpo.data.prompts.PromptRenderer.privileged` takes of a row."""
    return row["problem"], row["generated_solution"], row["expected_answer"], row.get("context", "")


STORIES = Task("stories", Path(__file__).parent / "policy")
"""The first laboratory: references are written as the policy writes, so that the context can be copied."""

FOREIGN = Task(
    "foreign",
    Path(__file__).parent / "policy_foreign",
    rows=foreign_rows,
    completion="own_solution",
    # Writing five and six steps with a solution in the prompt teaches a little of the tier above the plain ones. So
    # these end at three steps: tier 4 is solved now and then, 5 and 6 are cliffs.
    recipe=Recipe(plain_tiers={1: 0.4, 2: 0.35, 3: 0.25}, answer_only_tiers={1: 1.0, 2: 1.0, 3: 1.0}),
)
"""References in another style than the policy's own: the context can be read and translated, and never copied."""

TRANSFER = Task(
    "transfer",
    Path(__file__).parent / "policy_transfer",
    rows=transfer.rows,
    prompts=replace(LAB_PROMPTS, privileged_template="Hint: {context}\n{problem}", privileged_context="column"),
    recipe=Recipe(
        plain_tiers={1: 0.25, 2: 0.3, 3: 0.25, 4: 0.2},
        privileged_tiers={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0},
    ),
)
"""The privileged context is one formula: the steps must be worked out, and it alone tells the size of some words."""

LEARNABLE = replace(
    FOREIGN,
    name="learnable",
    policy=Path(__file__).parent / "policy_learnable",
    rows=partial(foreign_rows, style="other_signs"),
    recipe=replace(FOREIGN.recipe, steps=2000),  # after 1,400 it still adds and subtracts badly
)
"""References in other signs than the policy's: as foreign, but a policy can learn to write so."""

TASKS = {task.name: task for task in (STORIES, FOREIGN, LEARNABLE, TRANSFER)}
