"""The laboratory's supervised warm-up: what the tiny policy learns before any reinforcement learning.

It reads two kinds of examples: plain ones (problem -> solution) of the easy tiers only, and privileged ones (ground
truth and problem -> solution) of all tiers. So it can follow a worked solution on the hardest tier without ever having
solved one of its problems: that tier is a cliff.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count, islice
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from hdpo.data.prompts import PromptRenderer
from hdpo.lab.task import STORIES, Recipe, Sizes, Task, ground_truth

_IGNORED = -100


class Examples(NamedTuple):
    """A padded batch.

    Attributes:
        input_ids: ``[N, L]`` int64, padded on the right.
        attention_mask: ``[N, L]`` int64.
        labels: ``[N, L]`` int64, -100 wherever nothing is trained (context and padding).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def completion_ids(tokenizer: PreTrainedTokenizerBase, solution: str) -> list[int]:
    """Return the tokens that the policy should write after a context: the solution and the end of its turn."""
    return [*tokenizer.encode(solution, add_special_tokens=False), tokenizer.eos_token_id]


def collate(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> Examples:
    """Pad ``(context, completion)`` token lists on the right; only the completion's tokens are labels."""
    ids = [torch.tensor(context + completion) for context, completion in pairs]
    labels = [torch.tensor([_IGNORED] * len(context) + completion) for context, completion in pairs]
    parts = ((ids, pad_id), ([torch.ones_like(row) for row in ids], 0), (labels, _IGNORED))
    return Examples(*(pad_sequence(rows, batch_first=True, padding_value=filler) for rows, filler in parts))


def warmup_texts(num_problems: int, seed: int, task: Task = STORIES) -> Iterator[str]:
    """Yield texts that cover what the tokenizer will meet: every tier, plain and privileged, and the answer alone."""
    context = task.prompts.privileged_template
    for row in task.rows(num_problems, split="warmup", seed=seed):
        yield row["problem"]
        yield row["generated_solution"]
        yield from (row[name] for name in ("own_solution", "context") if name in row)
        yield context.format(context=f"The final answer is \\boxed{{{row['expected_answer']}}}.", problem="")


class WarmupBatches(IterableDataset[tuple[Examples, Examples]]):
    """``(plain, privileged)`` batches, one a step, from problems of the split ``"warmup"``.

    Contexts are rendered by the same :class:`~hdpo.data.prompts.PromptRenderer` as in reinforcement learning, so that
    the policy meets the same tokens there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, task: Task = STORIES) -> None:
        self.tokenizer, self.recipe, self.task = tokenizer, recipe, task
        self.solution = PromptRenderer(tokenizer, task.prompts)
        self.answer = PromptRenderer(tokenizer, replace(task.prompts, privileged_context="answer"))

    def plain_examples(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (student's context, completion) without end."""
        for row in self.task.rows(split="warmup", seed=self.recipe.seed, tiers=self.recipe.plain_tiers):
            yield self.solution.student(row["problem"]), completion_ids(self.tokenizer, row[self.task.completion])

    def privileged_examples(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (privileged context, completion) without end."""
        # Other seeds: a problem of an easy tier should not come in several forms more often than chance has it.
        recipe, rows = self.recipe, self.task.rows
        solved = rows(split="warmup", seed=recipe.seed + 1, tiers=recipe.privileged_tiers)
        told = rows(split="warmup", seed=recipe.seed + 2, tiers=recipe.answer_only_tiers)
        for i in count(1):
            renderer, row = (self.solution, next(solved)) if i % recipe.answer_only_every else (self.answer, next(told))
            context = renderer.privileged(*ground_truth(row))
            yield context, completion_ids(self.tokenizer, row[self.task.completion])

    def __iter__(self) -> Iterator[tuple[Examples, Examples]]:
        plain, privileged = self.plain_examples(), self.privileged_examples()
        pad_id = self.tokenizer.pad_token_id
        for _ in range(self.recipe.steps):
            yield (
                collate(list(islice(plain, self.recipe.num_plain)), pad_id),
                collate(list(islice(privileged, self.recipe.num_privileged)), pad_id),
            )


def new_policy(tokenizer: PreTrainedTokenizerBase, sizes: Sizes = STORIES.sizes) -> Qwen2ForCausalLM:
    """Return an untrained Qwen2 for the tokenizer's vocabulary.

    Embeddings are not tied, so that a sampler with weights of its own takes both over; heads have 32 channels, the
    fewest that vLLM's CPU attention knows.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **asdict(sizes),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


class WarmupModule(LightningModule):
    """Supervised training of the laboratory's policy."""

    def __init__(self, policy: PreTrainedModel, recipe: Recipe) -> None:
        super().__init__()
        self.policy: nn.Module = policy
        self.recipe = recipe

    def loss(self, examples: Examples) -> Tensor:
        """Return the mean negative log-likelihood (nats) of the completions' tokens."""
        logits = self.policy(input_ids=examples.input_ids, attention_mask=examples.attention_mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), examples.labels[:, 1:].flatten(), ignore_index=_IGNORED)

    def training_step(self, batch: tuple[Examples, Examples], batch_idx: int) -> Tensor:
        """Return the plain loss plus the weighted privileged loss."""
        plain, privileged = (self.loss(examples) for examples in batch)
        self.log("loss/plain", plain.detach(), prog_bar=True)
        self.log("loss/privileged", privileged.detach(), prog_bar=True)
        return plain + self.recipe.privileged_weight * privileged

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with a linear ramp and a cosine decay, both counted in steps."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )

        def factor(step: int) -> float:
            ramp = min(1.0, (step + 1) / recipe.num_ramp_steps)
            cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, step / recipe.steps))).item())
            return ramp * (recipe.final_fraction + (1 - recipe.final_fraction) * cosine)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
