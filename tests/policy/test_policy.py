"""The policy's per-token numbers against a plain forward pass, and their invariances."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DbrxConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
)

from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.files import resolve_path
from hdpo.policy import Policy, PolicyConfig, load_tokenizer
from hdpo.policy import attention as attention_module
from hdpo.policy import packing as packing_module
from hdpo.policy import policy as policy_module
from hdpo.policy.architecture import check_architecture, compile_layers, policy_config
from hdpo.policy.packing import Packing, TokenBatch
from tests.helpers.models import SIZES, random_ids, random_model, random_policy
from tests.helpers.reference import Reference
from tests.helpers.tolerances import EXACT, norms_in_float32

LAB = PolicyConfig(path="pkg://hdpo.lab/policy")


#: Of policies whose norms are float32: two layers of 32 features, log-probabilities of up to about 20.
NORMS = norms_in_float32(2, 32, 20.0)


@pytest.fixture
def policy():
    return random_policy()


@pytest.fixture
def sequences():
    return Sequences(random_ids((5, 1, 9, 12)), random_ids((3, 8, 1, 6), seed=2))


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", EXACT), ("qwen2", NORMS), ("llama", NORMS)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_a_plain_forward_pass(sequences, kind, tolerance, temperature):
    policy = random_policy(kind)
    logps = policy.completion_logps(sequences, token_budget=30, temperature=temperature)
    for prompt, completion, mine in zip(*sequences, logps, strict=True):
        dense = Reference.distribution(policy.model, prompt, completion, temperature)
        expected = dense[torch.arange(len(completion)), torch.tensor(completion)]
        torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance / temperature)
        assert not mine.requires_grad


@pytest.mark.parametrize("budget", [1, 20, 40])
@pytest.mark.parametrize("chunk_elements", [1, 61 * 3])
def test_packing_padding_and_chunks_do_not_matter(sequences, budget, chunk_elements):
    policy = random_policy("gpt2")
    whole = torch.cat(policy.completion_logps(sequences, token_budget=10_000))
    policy.chunk_elements = chunk_elements
    split = torch.cat(policy.completion_logps(sequences, token_budget=budget))
    torch.testing.assert_close(split, whole, rtol=0, atol=EXACT)


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
        logps = policy(batch)
        (logps * torch.arange(len(logps)).sin()).sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    expected, gradient = numbers("padded")
    mine, other = numbers(layout)
    # Qwen2's norms, and its eager softmax, compute in float32 whatever the weights are.
    tolerance = EXACT if name == "gpt2" else NORMS
    torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)
    assert (other - gradient).norm() < tolerance * gradient.norm()


def within_each(query, key, value, begins, keys_begin, longest, longest_key, *, scale, window_size, enable_gqa=True):
    """What torch.nn.attention.varlen computes, written out."""
    assert enable_gqa
    assert window_size == (-1, 0)
    assert torch.equal(begins, keys_begin)
    assert longest == longest_key == int(begins.diff().max())
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.empty_like(query)
    for start, end in pairwise(begins.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf)
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])  # whose positions are relative, and absolute
def test_a_packed_row_in_the_kernel_is_as_good_as_padded_rows(name, recomputed, monkeypatch):
    torch.manual_seed(0)
    policy = Policy(dict(models())[name]().double()).train()
    if recomputed:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    items = Sequences([[5, 6, 7, 8], [12, 13], [9], [5, 6, 7]], [[20, 21, 22], [23], [24, 25, 26, 27, 28], [29, 30]])

    def numbers():
        policy.zero_grad()
        packing = policy.pack(items, 12)
        batches = [TokenBatch.from_sequences(items.select(g), policy.device, packing.layout) for g in packing.groups]
        logps = [policy(batch) for batch in batches]
        (torch.cat(logps) * torch.arange(11).sin()).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        return packing, torch.cat(logps).detach(), gradient

    monkeypatch.setattr(Policy, "_shares_prefixes", lambda policy: False)
    monkeypatch.setattr(packing_module, "_by_length", lambda lengths: list(range(len(lengths))))  # one order for both
    packing, expected, gradient = numbers()
    assert packing.layout == "padded"
    for module in (attention_module, policy_module):
        monkeypatch.setattr(module, "packs_in_kernel", lambda *_: True)
    monkeypatch.setattr(attention_module, "varlen_attn", within_each)
    packing, mine, other = numbers()
    assert packing == Packing([[0, 1], [2, 3]], "packed", 21), "no padding counts"
    torch.testing.assert_close(mine, expected, rtol=0, atol=NORMS)
    assert (other - gradient).norm() < NORMS * gradient.norm()


@pytest.mark.parametrize(
    ("device", "dtype", "options", "expected"),
    [
        ("cuda", torch.bfloat16, {}, True),
        ("cuda", torch.float16, {}, True),
        ("cuda", torch.float32, {}, False),
        ("cpu", torch.bfloat16, {}, False),
        ("cuda", torch.bfloat16, {"attn_implementation": "eager"}, False),
        ("cuda", torch.bfloat16, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, False),
    ],
)
def test_where_a_kernel_tells_packed_sequences_apart(device, dtype, options, expected, monkeypatch):
    config = Qwen2Config(**SIZES, **options)
    asked = []
    monkeypatch.setattr(attention_module, "_attends_to_packed", lambda *given: asked.append(given) or True)
    model, device = Qwen2ForCausalLM(config), torch.device(device)
    assert attention_module.packs_in_kernel(model, device, dtype) is expected
    heads = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert asked == [(device, dtype, *heads)] * expected
    monkeypatch.setattr(attention_module, "_attends_to_packed", lambda *given: False)
    assert not attention_module.packs_in_kernel(model, device, dtype)


def test_a_kernel_that_does_not_take_the_heads_is_not_used(monkeypatch):
    """Without a kernel a long traceback would come from deep inside torch, and without its backward pass only then."""
    given = torch.device("cpu"), torch.float32, 4, 2, 8
    attends = attention_module._attends_to_packed.__wrapped__

    def refused(*_, **__):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query):
            return query.clone()

        backward = staticmethod(refused)

    monkeypatch.setattr(attention_module, "varlen_attn", within_each)
    with torch.inference_mode():
        assert attends(*given)
    monkeypatch.setattr(attention_module, "varlen_attn", refused)
    assert not attends(*given)
    monkeypatch.setattr(attention_module, "varlen_attn", lambda query, *_, **__: ForwardOnly.apply(query))
    assert not attends(*given)


def test_what_layouts_a_policy_takes(policy, monkeypatch):
    groups = Sequences([list(range(5, 55))] * 16, [[1, 2, 3]] * 16)
    assert policy.pack(groups, 4096).layout == "shared"
    policy.model.gradient_checkpointing_enable()
    assert policy.pack(groups, 4096).layout == "padded", "recomputed layers take no cache"
    policy.model.gradient_checkpointing_disable()
    monkeypatch.setattr(policy.model.config, "_attn_implementation_internal", "flash_attention_2")
    assert policy.pack(groups, 4096).layout == "packed"
    monkeypatch.undo()
    policy.model.gradient_checkpointing_enable()
    monkeypatch.setattr(policy_module, "packs_in_kernel", lambda *_: True)
    assert policy.pack(groups, 4096).layout == "packed"
    compile_layers(policy.backbone)
    assert policy.pack(groups, 4096).layout == "padded"


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
        policy(batch).sum().backward()
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


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(sequences):
    policy = random_policy(dtype=torch.float32)
    batch = TokenBatch.from_sequences(sequences, policy.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = policy(batch)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert policy.model.lm_head.weight.grad.dtype == torch.float32
    full = torch.cat(policy.completion_logps(sequences, token_budget=100))
    assert 0 < (out - full).abs().max() < 0.3


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


@pytest.mark.parametrize(("kind", "sizes"), [
    ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 2}),
    ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}),
    ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
], ids=["mpt", "bloom", "falcon", "falcon without"])  # fmt: skip
def test_distances_in_columns_are_those_of_the_sequence(kind, sizes):
    """ALiBi, with prompts of different lengths that several completions share."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=SIZES["vocab_size"], **sizes)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    for weight in model.parameters():
        weight.data *= 8 if weight.dim() > 1 else 1
    prompts, completions = random_ids((1000, 300)), random_ids((3, 2, 4, 5, 3, 2))
    sequences = Sequences([prompts[i % 2] for i in range(6)], completions)
    found = Policy(model).completion_logps(sequences, token_budget=4096)
    for logps, prompt, ids in zip(found, *sequences, strict=True):
        with torch.no_grad():
            plain = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = plain.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert (logps - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("falcon_h1", "lm_head_multiplier"),
        ("recurrent_gemma", "logits_soft_cap"),
        ("xlstm", "output_logit_soft_cap"),
        ("cohere", "logit_scale"),
        ("granite", "logits_scaling"),
    ],
)
def test_whatever_the_transformation_is_called(kind, name, tmp_path):
    """It is one: the model's own log-probabilities are others than those of its hidden states and output layer."""
    sizes = {**SIZES, "num_hidden_layers": 3, name: 0.25}
    sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "lru_width": 32}
    config = AutoConfig.for_model(kind, **sizes)
    with pytest.raises(ConfigError, match=rf"{kind}: its logits pass through {name}"):
        check_architecture(config)
    if kind == "xlstm":  # needs a package of its own
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5]])).logits
        plain = model.get_output_embeddings()(model.base_model(torch.tensor([[3, 4, 5]])).last_hidden_state)
    assert (logits.log_softmax(-1) - plain.log_softmax(-1)).abs().max() > 1e-3


MIXTURES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}, "num_local_experts is 4"),
    "qwen2_moe": (Qwen2MoeConfig, {"num_experts": 3, "moe_intermediate_size": 8}, "num_experts is 3"),
    "deepseek_v3": (DeepseekV3Config, {"n_routed_experts": 16}, "n_routed_experts is 16"),
    "dbrx": (DbrxConfig, {"ffn_config": {"moe_num_experts": 5}}, "moe_num_experts is 5"),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_one_clear_line_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    config, options, words = MIXTURES[kind]
    config(**options).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    for asked in (lambda path: Policy.load(PolicyConfig(path=path)), policy_config):
        with pytest.raises(
            ConfigError, match=rf"model.policy.path: {kind} is a mixture of experts \({words}\)"
        ) as error:
            asked(str(tmp_path))
        assert "\n" not in str(error.value)


def test_whatever_engine_samples_it_has_no_mixture_of_experts():
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ConfigError, match="vLLM names their weights otherwise"):
        Policy(AutoModelForCausalLM.from_config(MixtralConfig(**sizes)))
    assert Policy(AutoModelForCausalLM.from_config(MixtralConfig(**{**sizes, "num_local_experts": 1}))).vocab_size


# Loading


def test_everything_that_names_a_model_reaches_the_library(monkeypatch):
    asked = {}

    def refuse(kind):
        def from_pretrained(path, **options):
            asked[kind] = path, options
            raise OSError("not here")

        return from_pretrained

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", refuse(kind.__name__))
    config = PolicyConfig(
        "pkg://hdpo.lab/policy",
        revision="abc",
        dtype="bfloat16",
        attn_implementation="flash_attention_2",
        trust_remote_code=True,
    )
    for load in (Policy.load, load_tokenizer):
        with pytest.raises(ConfigError, match=r"model.policy.path: cannot load a .* from 'pkg:.*' \(not here\)"):
            load(config)
    path = resolve_path("pkg://hdpo.lab/policy")
    assert asked["AutoTokenizer"] == (path, {"revision": "abc", "trust_remote_code": True})
    given, options = asked["AutoModelForCausalLM"]
    assert given == path
    assert options == {
        "revision": "abc", "dtype": torch.bfloat16, "attn_implementation": "flash_attention_2",
        "trust_remote_code": True, "output_loading_info": True,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_are_held_as_it_says(dtype):
    policy = Policy.load(PolicyConfig(LAB.path, dtype=dtype, attn_implementation="eager"))
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    assert policy.compute_dtype == getattr(torch, dtype)
    assert policy.model.config._attn_implementation == "eager"
    assert not policy.model.is_gradient_checkpointing
    assert not policy.model.config.use_cache
    assert Policy.load(PolicyConfig(LAB.path, gradient_checkpointing=True)).model.is_gradient_checkpointing


@pytest.mark.parametrize(("damage", "message"), [
    ("missing", r"lacks the weights model.layers.0.mlp.down_proj.weight"),
    ("not finite", r"holds values that are not finite in model.embed_tokens.weight, model.norm.weight"),
    ("many", r"lacks the weights .*, .*, .* and \d+ more"),
])  # fmt: skip
def test_a_damaged_policy_is_refused(tmp_path, damage, message):
    model = random_model()
    state = model.state_dict()
    if damage == "missing":
        del state["model.layers.0.mlp.down_proj.weight"]
    elif damage == "many":
        state = {name: value for name, value in state.items() if "mlp" not in name}
    else:
        state["model.norm.weight"][3] = torch.nan
        state["model.embed_tokens.weight"][0, 0] = torch.inf
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=f"model.policy.path: .* {message}"):
        Policy.load(PolicyConfig(str(tmp_path)))


def test_a_tokenizer_whose_completions_could_not_end_is_refused(tmp_path):
    tokenizer = load_tokenizer(LAB)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    random_model().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        load_tokenizer(PolicyConfig(str(tmp_path)))


def test_every_token_that_ends_a_completion(policy):
    policy.model.generation_config.eos_token_id = [5, 3]
    policy.model.config.eos_token_id = 4
    assert policy.eos_token_ids == (5, 3)
    policy.model.generation_config.eos_token_id = 6
    assert policy.eos_token_ids == (6,)
    policy.model.generation_config.eos_token_id = None
    assert policy.eos_token_ids == (4,)
    policy.model.config.eos_token_id = None
    with pytest.raises(ConfigError, match="names no eos_token_id"):
        _ = policy.eos_token_ids


def test_dropout_of_any_form_is_off():
    options = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=8, **options))
    policy, ids = Policy(model).train(), torch.tensor([[3, 4, 5]])
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(policy.model(ids).logits, policy.model(ids).logits)
    qwen = Policy(random_model(attention_dropout=0.5)).model
    assert [layer.self_attn.attention_dropout for layer in qwen.model.layers] == [0.0] * 2
    assert qwen.config.attention_dropout == 0.0


# Numbers


def test_an_output_layer_with_a_bias(sequences):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    policy = Policy(PhiForCausalLM(PhiConfig(**sizes)).double())
    torch.nn.init.normal_(policy.model.lm_head.bias)
    batch = TokenBatch.from_sequences(sequences, policy.device)
    logps, (ids, logits) = policy(batch).split(batch.lengths), policy(batch, topk=4)
    dense = [Reference.distribution(policy.model, p, c, 1.0) for p, c in zip(*sequences, strict=True)]
    for mine, whole, completion in zip(logps, dense, sequences.completion_ids, strict=True):
        expected = whole[torch.arange(len(completion)), torch.tensor(completion)]
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
    top = torch.cat(dense).topk(4)
    assert torch.equal(ids.long(), top.indices)
    torch.testing.assert_close(logits.log_softmax(-1), top.values.log_softmax(-1), rtol=1e-12, atol=1e-12)
    chosen = policy(batch, ids)
    torch.testing.assert_close(chosen, top.values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_passes", [None, 1, 5])
def test_missing_passes_are_made_on_a_placeholder(policy, sequences, num_passes):
    passes = []
    policy.register_forward_hook(lambda *_: passes.append(1))
    policy.completion_logps(sequences, token_budget=30, num_passes=num_passes)
    groups = len(policy.pack(sequences, 30).groups)
    assert groups == 2
    assert len(passes) == max(groups, num_passes or 0)


def test_layers_that_masks_say_nothing_about_share_no_prompts(policy):
    groups = Sequences([list(range(5, 55))] * 16, [[1, 2, 3]] * 16)
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    assert policy.pack(groups, 4096).layout == "padded"


# Saving


def test_what_is_saved_generates_with_a_cache_and_the_policy_goes_on_without(tmp_path, policy):
    state = {name: value + 1 for name, value in policy.model.state_dict().items()}
    policy.model.config.use_cache = False
    policy.save(tmp_path / "a", state_dict=dict(state))
    assert not policy.model.config.use_cache
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config.use_cache
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

    def full(*_, **__):
        raise OSError("no space left")

    policy.model.save_pretrained = full
    with pytest.raises(OSError, match="no space left"):
        policy.save(tmp_path / "b")
    assert not policy.model.config.use_cache
