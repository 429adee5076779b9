"""Scores of the laboratory's policy on problems that it never saw, tier by tier and context by context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hdpo.data.prompts import PromptRenderer
from hdpo.functional import pass_at_k
from hdpo.lab.problems import NUM_TIERS
from hdpo.lab.task import STORIES, Task, ground_truth
from hdpo.rewards.boxed import last_boxed

MAX_NEW_TOKENS = 72


def contexts(tokenizer: PreTrainedTokenizerBase, row: dict[str, str], task: Task = STORIES) -> dict[str, list[int]]:
    """Return a row's three contexts as token ids: ``plain``, with the ``solution``, with the ``answer`` only."""
    solution = PromptRenderer(tokenizer, task.prompts)
    answer = PromptRenderer(tokenizer, replace(task.prompts, privileged_context="answer"))
    truth = ground_truth(row)
    return {
        "plain": solution.student(row["problem"]),
        "solution": solution.privileged(*truth),
        "answer": answer.privileged(*truth),
    }


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    num_samples: int | None,
    batch_size: int = 256,
) -> list[list[str]]:
    """Write completions.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        prompts: contexts as token ids.
        num_samples: samples per prompt at temperature 1 (from torch's generator); None for one greedy completion.
        batch_size: completions written together.

    Returns:
        one list of texts for each prompt.
    """
    pad_id = tokenizer.pad_token_id
    options: dict[str, Any] = (
        {"do_sample": False} if num_samples is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    )
    repeats = num_samples or 1
    size = max(1, batch_size // repeats)
    texts: list[list[str]] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        length = max(map(len, batch))
        input_ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in batch])
        written: Tensor = policy.generate(  # type: ignore[operator]  # the model's generation mixin is typed loosely
            input_ids=input_ids,
            attention_mask=(input_ids != pad_id).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=repeats,
            pad_token_id=pad_id,
            **options,
        )
        decoded = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        texts.extend(decoded[i : i + repeats] for i in range(0, len(decoded), repeats))
    return texts


def _correct(texts: list[list[str]], answers: list[str]) -> Tensor:
    return torch.tensor([[last_boxed(t) == a for t in group] for group, a in zip(texts, answers, strict=True)])


def score_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_problems: int = 40,
    num_samples: int = 16,
    seed: int = 0,
    task: Task = STORIES,
) -> dict[str, dict[str, float]]:
    """Score a policy on problems of the split ``"validation"``.

    Args:
        policy: the model, on the CPU.
        tokenizer: its tokenizer.
        num_problems: problems per tier.
        num_samples: samples per problem at temperature 1, at least 8.
        seed: of the samples and the problems.
        task: the laboratory.

    Returns:
        source -> score -> value in [0, 1]: ``pass@1``, ``pass@8`` and ``greedy`` from the problem alone; ``privileged``
        (pass@1 with the solution in the context) with its ``copied`` share (correct completions that repeat the
        reference word for word), and ``answer_only``.
    """
    policy.eval()
    scores: dict[str, dict[str, float]] = {}
    for tier in range(1, NUM_TIERS + 1):
        torch.manual_seed(seed + tier)
        problems = list(task.rows(num_problems, split="validation", seed=seed, tiers=[tier]))
        answers = [row["expected_answer"] for row in problems]
        prompts = [contexts(tokenizer, row, task) for row in problems]
        plain = _correct(sample(policy, tokenizer, [p["plain"] for p in prompts], num_samples=num_samples), answers)
        greedy = _correct(sample(policy, tokenizer, [p["plain"] for p in prompts], num_samples=None), answers)
        guided = sample(policy, tokenizer, [p["solution"] for p in prompts], num_samples=4)
        kept = _correct(guided, answers)
        same = torch.tensor(
            [[t == row["generated_solution"] for t in g] for g, row in zip(guided, problems, strict=True)]
        )
        told = _correct(sample(policy, tokenizer, [p["answer"] for p in prompts], num_samples=4), answers)
        values = {
            **{f"pass@{k}": pass_at_k(num_samples, plain.sum(1), k).mean().item() for k in (1, 8)},
            "greedy": greedy.double().mean().item(),
            "privileged": kept.double().mean().item(),
            "copied": (same & kept).sum().item() / max(1, kept.sum().item()),
            "answer_only": told.double().mean().item(),
        }
        scores[f"tier{tier}"] = {name: round(value, 4) for name, value in values.items()}
    return scores
