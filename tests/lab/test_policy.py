"""The shipped policy: it loads offline, fits its tokenizer, and solves what it should and nothing more."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from hdpo.data.prompts import PromptRenderer
from hdpo.lab.build import POLICY, load
from hdpo.lab.problems import NUM_TIERS, rows
from hdpo.lab.scoring import contexts, sample
from hdpo.lab.task import LAB_PROMPTS, Recipe
from hdpo.rewards.boxed import last_boxed


@pytest.fixture(scope="module")
def lab():
    return load(POLICY)


def greedy_accuracy(lab, tiers, num_problems, context="plain"):
    problems = list(rows(num_problems, split="validation", seed=11, tiers=tiers))
    texts = sample(*lab, [contexts(lab[1], row)[context] for row in problems], num_samples=None)
    hits = [last_boxed(t) == row["expected_answer"] for (t,), row in zip(texts, problems, strict=True)]
    return sum(hits) / len(hits)


def test_files_are_small_and_weights_are_bfloat16_and_untied():
    assert sum(f.stat().st_size for f in POLICY.iterdir()) < 1.5e6
    weights = load_file(POLICY / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_it_loads_in_float32_with_the_same_values_and_its_settings(lab):
    policy, tokenizer = lab
    stored = load_file(POLICY / "model.safetensors")
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float()), name
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id


def test_every_digit_is_one_token_and_alone(lab):
    tokenizer = lab[1]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("12*3=36. So \\boxed{1907}", add_special_tokens=False))
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("123361907")


def test_ids_are_those_that_the_weights_were_trained_with(lab):
    """A rebuilt tokenizer permutes the ids, and the policy silently knows nothing any more."""
    assert lab[1].encode("Ben has 12 eggs, triples them.", add_special_tokens=False) == [
        38,
        342,
        298,
        225,
        21,
        22,
        345,
        16,
        341,
        307,
        18,
    ]


def test_auto_tokenizer_reads_what_the_saved_file_says(lab):
    """AutoTokenizer picks Qwen2's class, with a splitting rule of its own; the warm-up used the file's."""
    saved = Tokenizer.from_file(str(POLICY / "tokenizer.json"))
    for row in rows(120, split="train", seed=2):
        for text in (
            row["problem"],
            row["generated_solution"],
            f"Solution: {row['generated_solution']}\n{row['problem']}",
        ):
            assert lab[1].encode(text, add_special_tokens=False) == saved.encode(text).ids


def test_contexts_end_in_the_same_tokens(lab):
    renderer = PromptRenderer(lab[1], LAB_PROMPTS)
    ending = lab[1].convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    for row in rows(12, split="validation"):
        rendered = contexts(lab[1], row)
        assert rendered["plain"] == renderer.student(row["problem"])
        truth = (row["problem"], row["generated_solution"], row["expected_answer"])
        assert rendered["solution"] == renderer.privileged(*truth)
        assert all(ids[-2:] == ending for ids in rendered.values())
        assert len(rendered["plain"]) < len(rendered["answer"]) <= len(rendered["solution"])


def test_easy_tiers_are_solved_and_the_hardest_is_a_cliff(lab):
    assert greedy_accuracy(lab, [1, 2, 3], 30) >= 0.9
    assert greedy_accuracy(lab, [6], 20) <= 0.1


def test_the_solution_in_the_prompt_opens_the_hardest_tier(lab):
    assert greedy_accuracy(lab, [6], 20, context="solution") >= 0.7


def test_a_permuted_vocabulary_would_be_caught(lab):
    policy = lab[0]
    kept = policy.model.embed_tokens.weight.data.clone()
    try:
        policy.model.embed_tokens.weight.data = kept.roll(1, 0)
        assert greedy_accuracy(lab, [1], 10) <= 0.2
    finally:
        policy.model.embed_tokens.weight.data = kept


def test_scores_are_recorded_with_the_recipe():
    record = json.loads((POLICY / "scores.json").read_text())
    assert set(record["scores"]) == {f"tier{t}" for t in range(1, NUM_TIERS + 1)}
    assert set(record["recipe"]) == set(vars(Recipe()))
    assert record["scores"]["tier6"]["pass@8"] <= 0.05
    assert record["scores"]["tier6"]["privileged"] >= 0.8
    assert min(record["scores"][f"tier{t}"]["greedy"] for t in (1, 2, 3, 4)) >= 0.9
