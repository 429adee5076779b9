"""The decode loop against ``model.generate``, against the policy's own log-probabilities, and against itself."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hdpo.experience import Sequences
from hdpo.functional.random import derive_seeds, uniform
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.transformers import draw
from hdpo.policy import Policy

EOS = 2
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}


def build(kind):
    torch.manual_seed(0)
    match kind:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES))
        case "qwen2-tied":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        case "qwen2-eager":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager"))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES))
        case "mistral-sliding":
            return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))
    raise AssertionError(kind)


@pytest.fixture(scope="module", params=["qwen2", "qwen2-eager", "qwen2-tied", "qwen3", "llama", "mistral-sliding"])
def policy(request):
    return Policy(build(request.param))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in (5, 1, 9, 12, 3, 9)]


def seeds_for(num_prompts, num_samples):
    return derive_seeds(7, torch.arange(num_prompts)[:, None], torch.arange(num_samples))


def test_greedy_equals_generate(policy, prompts):
    sampling = SamplingConfig(max_new_tokens=14, temperature=0.0, eos_token_ids=(EOS,))
    out = TransformersEngine().generate(policy, prompts, seeds_for(6, 1), sampling)
    for prompt, (ids,) in zip(prompts, out.token_lists(), strict=True):
        expected = policy.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert ids == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_policys(policy, prompts, temperature):
    sampling = SamplingConfig(max_new_tokens=14, temperature=temperature, eos_token_ids=(EOS,))
    out = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling)
    flat = [ids for group in out.token_lists() for ids in group]
    contexts = [p for p in prompts for _ in range(3)]
    logps = policy.completion_logps(Sequences(contexts, flat), token_budget=64, temperature=temperature)
    for mine, mask, theirs in zip(out.logps.flatten(0, 1), out.mask.flatten(0, 1), logps, strict=True):
        torch.testing.assert_close(mine[mask], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_sequences", [1, 4, 512])
@pytest.mark.parametrize("compaction", [0.01, 1.0])
def test_a_sample_depends_on_nothing_else_in_the_batch(policy, prompts, max_sequences, compaction):
    sampling = SamplingConfig(max_new_tokens=14, temperature=1.0, eos_token_ids=(EOS,))
    seeds = seeds_for(6, 3)
    together = TransformersEngine().generate(policy, prompts, seeds, sampling).token_lists()
    other = TransformersEngine(max_sequences, compaction)
    assert other.generate(policy, prompts, seeds, sampling).token_lists() == together
    alone = other.generate(policy, prompts[2:3], seeds[2:3, 1:2], sampling).token_lists()
    assert alone[0][0] == together[2][1]


def test_a_cache_that_grows_keeps_what_it_holds(policy, prompts, monkeypatch):
    sampling = SamplingConfig(max_new_tokens=14, temperature=1.0, eos_token_ids=(EOS,))
    expected = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling)
    monkeypatch.setattr("hdpo.generation.cache._SPARE", 1)
    grown = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling)
    assert grown.token_lists() == expected.token_lists()
    torch.testing.assert_close(grown.logps, expected.logps, rtol=0, atol=1e-6)


def test_masks_stop_reasons_and_padding(policy, prompts):
    sampling = SamplingConfig(max_new_tokens=14, temperature=1.0, eos_token_ids=(EOS, 5, 9))
    out = TransformersEngine().generate(policy, prompts, seeds_for(6, 8), sampling)
    stops = torch.tensor([EOS, 5, 9])
    for ids, mask, truncated in zip(
        out.ids.flatten(0, 1), out.mask.flatten(0, 1), out.truncated.flatten(), strict=True
    ):
        length = int(mask.sum())
        assert mask[:length].all()
        assert not mask[length:].any()
        assert not torch.isin(ids[: length - 1], stops).any(), "a completion goes on after its end"
        assert bool(truncated) == (length == 14 and not torch.isin(ids[length - 1], stops))
    assert out.truncated.any()
    assert not out.truncated.all()
    assert (out.logps[~out.mask] == 0).all()


def test_no_prompts(policy):
    sampling = SamplingConfig(max_new_tokens=4, temperature=1.0, eos_token_ids=(EOS,))
    out = TransformersEngine().generate(policy, [], torch.zeros(0, 3, dtype=torch.long), sampling)
    assert out.ids.shape == (0, 3, 1)


def test_draw_follows_the_distribution():
    logits = torch.tensor([2.0, 0.0, -1.0, float("-inf"), 1.0])
    num = 200_000
    for temperature in (1.0, 0.5, 2.0):
        ids, logps = draw(logits.expand(num, 5), uniform(derive_seeds(3, torch.arange(num)), 4), temperature)
        expected = (logits.double() / temperature).softmax(-1)
        counts = ids.bincount(minlength=5)
        assert counts[3] == 0
        keep = expected > 0
        chi2 = ((counts[keep] - num * expected[keep]) ** 2 / (num * expected[keep])).sum()
        assert chi2 < 16.3  # 99.9 % quantile at 3 degrees of freedom
        torch.testing.assert_close(logps.double(), expected.log()[ids], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("argument", "value"), [("max_sequences", 0), ("compaction", 0.0)])
def test_bad_options_name_their_key(argument, value):
    with pytest.raises(ValueError, match=f"model.engine.{argument}"):
        TransformersEngine(**{argument: value})
