"""The warm-up: what is trained, on which problems, and that it learns, the same way each time."""

import math
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from hdpo.data.prompts import PromptRenderer
from hdpo.lab.build import train
from hdpo.lab.problems import rows, split_of
from hdpo.lab.task import LAB_PROMPTS, Recipe
from hdpo.lab.tokenizer import train_tokenizer
from hdpo.lab.warmup import (
    WarmupBatches,
    WarmupModule,
    collate,
    new_policy,
    warmup_texts,
)

TINY = Recipe(steps=15, num_plain=6, num_privileged=3, num_ramp_steps=5, learning_rate=5e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(warmup_texts(500, seed=0))


def split_at_assistant(tokenizer, context, completion):
    user = tokenizer.decode(context)
    return user.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>"), tokenizer.decode(completion)


def test_plain_examples_are_the_renderers_contexts_and_the_solution_with_eos(tokenizer):
    batches = WarmupBatches(tokenizer, TINY)
    renderer = PromptRenderer(tokenizer, LAB_PROMPTS)
    stories = rows(20, split="warmup", seed=TINY.seed, tiers=TINY.plain_tiers)
    for row, (context, completion) in zip(stories, batches.plain_examples(), strict=False):
        assert context == renderer.student(row["problem"])
        user, text = split_at_assistant(tokenizer, context, completion)
        assert (user, text) == (row["problem"], row["generated_solution"] + "<|end|>")


def test_hard_tiers_are_never_seen_without_their_solution(tokenizer):
    batches = WarmupBatches(tokenizer, TINY)
    hard_with_solution = 0
    for context, completion in islice(batches.plain_examples(), 300):
        problem, solution = split_at_assistant(tokenizer, context, completion)
        assert split_of(problem) == "warmup"
        assert solution.count("=") <= 4
    for i, (context, completion) in enumerate(islice(batches.privileged_examples(), 300), start=1):
        user, solution = split_at_assistant(tokenizer, context, completion)
        shown, problem = user.removeprefix("Solution: ").split("\n")
        assert split_of(problem) == "warmup"
        if i % TINY.answer_only_every:
            assert shown + "<|end|>" == solution
            hard_with_solution += solution.count("=") >= 5
        else:
            assert shown.startswith("The final answer is ")
            assert solution.count("=") <= 4
    assert hard_with_solution == 80  # two tiers of six, of 240


def test_collate_trains_completions_only():
    examples = collate([([5, 6, 7], [8, 1]), ([5], [9, 9, 9, 1])], pad_id=0)
    assert examples.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 1]]
    assert examples.labels.tolist() == [[-100, -100, -100, 8, 1], [-100, 9, 9, 9, 1]]
    assert collate([([5, 6], [1]), ([5], [1])], pad_id=0).attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_loss_is_the_completions_mean_nll_without_padding(tokenizer):
    torch.manual_seed(0)
    policy = new_policy(tokenizer).double()
    pairs = [([5, 6, 7, 20], [8, 1]), ([30, 31], [9, 10, 11, 1])]
    total, count = 0.0, 0
    for context, completion in pairs:  # one at a time, no padding, no shifting tricks
        for t, token in enumerate(completion):
            with torch.no_grad():
                logits = policy(torch.tensor([context + completion[:t]])).logits[0, -1]
            total -= F.log_softmax(logits, -1)[token].item()
            count += 1
    loss = WarmupModule(policy, TINY).loss(collate(pairs, pad_id=0))
    assert loss.item() == pytest.approx(total / count, abs=1e-9)


def test_learning_rate_ramps_up_then_decays(tokenizer):
    recipe = Recipe(steps=100, num_ramp_steps=10, learning_rate=1e-2, final_fraction=0.1)
    configured = WarmupModule(new_policy(tokenizer), recipe).configure_optimizers()
    factor = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert factor(0) == pytest.approx(0.1, rel=1e-3)
    assert factor(50) == pytest.approx(0.1 + 0.9 * 0.5, rel=1e-6)
    assert factor(100) == pytest.approx(0.1, rel=1e-6)
    assert all(factor(i) > factor(i + 1) for i in range(10, 100))


def test_a_short_warmup_learns_and_is_deterministic(tokenizer):
    def held_out_loss(policy):
        batches = WarmupBatches(tokenizer, Recipe(seed=99))
        examples = collate(list(islice(batches.plain_examples(), 32)), tokenizer.pad_token_id)
        with torch.no_grad():
            return WarmupModule(policy, TINY).loss(examples).item()

    torch.manual_seed(0)
    before = held_out_loss(new_policy(tokenizer).eval())
    first, _ = train(TINY, progress=False, tokenizer=tokenizer)
    second, _ = train(TINY, progress=False, tokenizer=tokenizer)
    assert before == pytest.approx(math.log(len(tokenizer)), abs=0.2)
    assert held_out_loss(first) < 0.75 * before
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    other, _ = train(Recipe(**{**vars(TINY), "seed": 1, "steps": 1}), progress=False, tokenizer=tokenizer)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_new_policy_is_small_and_untied(tokenizer):
    policy = new_policy(tokenizer)
    assert 350_000 < sum(p.numel() for p in policy.parameters()) < 450_000
    assert policy.lm_head.weight.data_ptr() != policy.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["steps", "num_plain", "num_privileged", "answer_only_every"])
def test_recipe_refuses_empty_runs(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Recipe(**{name: 0})
