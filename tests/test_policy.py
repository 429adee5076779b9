"""The policy's per-token numbers against a plain forward pass, and their invariances."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hdpo.batching import TokenBatch
from hdpo.experience import Sequences
from hdpo.policy import Policy, PolicyConfig, load_tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LAB = PolicyConfig(path="pkg://hdpo.lab/policy")


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Policy(Qwen2ForCausalLM(Qwen2Config(**SIZES)))


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(1)

    def draw(lengths):
        return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]

    return Sequences(draw((5, 1, 9, 12)), draw((3, 8, 1, 6)))


def test_logps_equal_a_plain_forward_pass(policy, sequences):
    logps = policy.completion_logps(sequences, token_budget=1000)
    for prompt, completion, mine in zip(*sequences, logps, strict=True):
        logits = policy.model.double()(torch.tensor([prompt + completion])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0]
        policy.model.float()
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 40])
@pytest.mark.parametrize("chunk_elements", [1, 61 * 3])
def test_packing_padding_and_chunks_do_not_matter(policy, sequences, budget, chunk_elements):
    policy.double()
    whole = torch.cat(policy.completion_logps(sequences, token_budget=10_000))
    policy.chunk_elements = chunk_elements
    split = torch.cat(policy.completion_logps(sequences, token_budget=budget))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)


def models():
    kinds = ["full_attention", "sliding_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": 5}
    yield "qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))
    yield "sliding", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **sliding, layer_types=kinds))
    yield "eager", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager"))
    yield "gpt2", lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40))


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(("name", "build"), list(models()), ids=[name for name, _ in models()])
def test_layouts_do_not_matter(name, build, layout):
    torch.manual_seed(0)
    policy = Policy(build().double())
    # Groups of rollouts, a prompt that another one begins with, completions of one token.
    a, b, c = [5, 6, 7, 8, 9, 10, 11], [12, 13], [5, 6, 7]
    completions = [[20, 21, 22], [23], [24, 25, 26, 27, 28], [29, 30], [31], [32, 33, 34, 35], [20, 21, 22], [36]]
    sequences = Sequences([a, a, b, b, b, c, c, a], completions)

    def numbers(layout):
        policy.zero_grad()
        batch = TokenBatch.from_sequences(sequences, policy.device, layout)
        logps = policy(batch).logps[:, 0]
        (logps * torch.arange(len(logps)).sin()).sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    expected, gradient = numbers("padded")
    mine, other = numbers(layout)
    # Qwen2's norms, and its eager softmax, compute in float32 whatever the weights are.
    tolerance = 1e-12 if name == "gpt2" else 2e-6
    torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)
    assert (other - gradient).norm() < tolerance * gradient.norm()


def test_what_layouts_a_policy_takes(policy, monkeypatch):
    groups = Sequences([list(range(5, 55))] * 16, [[1, 2, 3]] * 16)
    assert policy.pack(groups, 4096).layout == "shared"
    policy.model.gradient_checkpointing_enable()
    assert policy.pack(groups, 4096).layout == "padded", "recomputed layers take no cache"
    policy.model.gradient_checkpointing_disable()
    monkeypatch.setattr(policy.model.config, "_attn_implementation_internal", "flash_attention_2")
    assert policy.pack(groups, 4096).layout == "packed"


def test_dropout_is_off(sequences):
    torch.manual_seed(0)
    policy = Policy(Qwen2ForCausalLM(Qwen2Config(**SIZES, attention_dropout=0.5))).train()
    first = torch.cat(policy.completion_logps(sequences, token_budget=100))
    assert policy.model.config.attention_dropout == 0
    torch.testing.assert_close(torch.cat(policy.completion_logps(sequences, token_budget=100)), first)


def test_gradient_checkpointing_gives_the_same_gradients(policy, sequences):
    def gradients():
        policy.zero_grad()
        batch = TokenBatch.from_sequences(sequences, policy.device)
        policy(batch).logps.sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    policy.train()
    plain = gradients()
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_lab_policy_loads_in_float32_and_is_exported(tmp_path):
    policy, tokenizer = Policy.load(LAB), load_tokenizer(LAB)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.save(tmp_path, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(policy.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert again.config.use_cache


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(policy, sequences):
    batch = TokenBatch.from_sequences(sequences, policy.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = policy(batch)
    out.logps.sum().backward()
    assert out.logps.dtype == torch.float32
    assert policy.model.lm_head.weight.grad.dtype == torch.float32
    full = torch.cat(policy.completion_logps(sequences, token_budget=100))
    assert 0 < (out.logps[:, 0] - full).abs().max() < 0.3


@pytest.mark.parametrize("path", ["no/such-model", "pkg://hdpo.lab/nothing", "pkg://no_such_package/x"])
def test_a_missing_policy_is_one_clear_line(path):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Policy.load(PolicyConfig(path=path))
    message = str(caught.value)
    assert path in message
    assert "\n" not in message


def test_models_with_transformed_logits_are_refused():
    sizes = {**SIZES, "head_dim": 8, "final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(AutoModelForCausalLM.from_config(Gemma2Config(**sizes)))
