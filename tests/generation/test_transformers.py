"""The decode loop against ``model.generate``, against the policy's own log-probabilities, and against itself."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.functional.random import derive_seeds, uniform
from hdpo.functional.sampling import draw
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation import transformers as module
from hdpo.generation.cache import SlotCache
from hdpo.generation.weights import cast_weights
from hdpo.policy import Policy
from tests.helpers.host_reads import host_reads
from tests.helpers.models import EOS, VOCAB, random_ids, random_policy
from tests.helpers.tolerances import F32, of_sum

#: Log-probabilities are computed in float64 and kept in float32: one rounding, that of either side.
ROUNDED = 2 * F32
KINDS = {
    "qwen2": {},
    "qwen2-eager": {"attn_implementation": "eager"},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "llama": {},
    "mistral-sliding": {"sliding_window": 6},
}


@pytest.fixture(scope="module", params=KINDS)
def policy(request):
    return random_policy(request.param.partition("-")[0], **KINDS[request.param])


@pytest.fixture(scope="module")
def prompts():
    return random_ids((5, 1, 9, 12, 3, 9))


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
    # Eager attention takes its softmax in float32 whatever the policy's dtype: two layers of it, up to 26 tokens each.
    tolerance = ROUNDED * (32 if policy.model.config._attn_implementation == "eager" else 1)
    logps = policy.completion_logps(Sequences(contexts, flat), token_budget=64, temperature=temperature)
    for mine, mask, theirs in zip(out.logps.flatten(0, 1), out.mask.flatten(0, 1), logps, strict=True):
        torch.testing.assert_close(mine[mask], theirs.float(), rtol=tolerance, atol=0)


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
    torch.testing.assert_close(grown.logps, expected.logps, rtol=ROUNDED, atol=0)


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
    assert (out.ids[~out.mask] == 0).all()


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
        atol = of_sum(5, 1.0) + of_sum(2, 3.0 / temperature)  # of five probabilities, and of logits of up to 3
        torch.testing.assert_close(logps.double(), expected.log()[ids], rtol=0, atol=atol)


def test_every_token_of_a_large_vocabulary_can_be_drawn():
    """Among 150,000 tokens most have less probability than float32 tells from nothing beside a sum of almost 1."""
    vocab = 150_000
    logits = torch.full((vocab,), -18.0)
    logits[: vocab // 3] = torch.linspace(0, -12, vocab // 3)
    probabilities = logits.log_softmax(-1).double().exp()
    ends = probabilities.cumsum(0)
    tokens = torch.arange(0, vocab, 37)
    middles = (ends - probabilities / 2)[tokens] / ends[-1]
    assert probabilities[-1] < torch.finfo(torch.float32).eps / 8
    drawn, logps = draw(logits[None], middles[None], 1.0)
    assert torch.equal(drawn[0], tokens)
    assert torch.equal(logps[0], logits.log_softmax(-1)[tokens])
    # The sum is not exactly 1: neither end of [0, 1) may lead beyond the vocabulary.
    ends = draw(logits[None], torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64), 1.0)[0]
    assert ends.tolist() == [[0, vocab - 1]]


def test_probabilities_are_float32_or_better_under_autocast():
    policy = random_policy(dtype=torch.float32)
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, eos_token_ids=(EOS,))
    given = []

    def noted(logits, numbers, temperature):
        given.append(logits.dtype)
        return draw(logits, numbers, temperature)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(module, "draw", noted)
        out = TransformersEngine().generate(policy, random_ids((5, 3)), seeds_for(2, 4), sampling)
        flat = [ids for group in out.token_lists() for ids in group]
        contexts = [p for p in random_ids((5, 3)) for _ in range(4)]
        logps = policy.completion_logps(Sequences(contexts, flat), token_budget=64)
    assert set(given) == {torch.float32}
    # The products are bfloat16 on both sides, their softmax is not: the two agree far closer than bfloat16's 2^-8.
    for mine, mask, theirs in zip(out.logps.flatten(0, 1), out.mask.flatten(0, 1), logps, strict=True):
        assert (mine[mask] - theirs).abs().mean() < 2**-5


@pytest.mark.parametrize("elements", [1, 61 * 3])
def test_blocks_of_logits_are_bounded_and_change_nothing(policy, prompts, elements, monkeypatch):
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, eos_token_ids=(EOS,))
    expected = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling)
    rows = []
    monkeypatch.setitem(module._SAMPLE_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(module, "draw", lambda logits, *rest: rows.append(len(logits)) or draw(logits, *rest))
    found = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling)
    assert found.token_lists() == expected.token_lists()
    assert max(rows) == max(1, elements // 61)


@pytest.mark.parametrize(("max_sequences", "num_samples", "rows"), [(4, 2, 4), (1, 3, 3), (512, 3, 18)])
def test_so_many_completions_are_decoded_at_a_time(policy, prompts, max_sequences, num_samples, rows):
    sizes = []
    handle = policy.backbone.register_forward_hook(
        lambda _, __, kwargs, ___: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampling = SamplingConfig(max_new_tokens=4, temperature=1.0, eos_token_ids=(EOS,))
    TransformersEngine(max_sequences).generate(policy, prompts, seeds_for(6, num_samples), sampling)
    handle.remove()
    assert max(sizes) == rows


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_as_it_was(training):
    policy, modes = random_policy(), []
    policy.model.gradient_checkpointing_enable()
    policy.train(training)
    policy.backbone.register_forward_hook(lambda model, *_: modes.append(model.training))
    sampling = SamplingConfig(max_new_tokens=3, temperature=1.0, eos_token_ids=(EOS,))
    TransformersEngine().generate(policy, [[5, 6]], seeds_for(1, 2), sampling)
    assert set(modes) == {False}
    assert {m.training for m in policy.modules()} == {training}
    assert not any(p.grad is not None for p in policy.parameters())


def test_layers_that_no_mask_describes_are_refused():
    policy = random_policy()
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    sampling = SamplingConfig(max_new_tokens=3, temperature=1.0, eos_token_ids=(EOS,))
    with pytest.raises(ConfigError, match=r"cannot decode a qwen2 with layers of kind linear_attention; choose .*VLLM"):
        TransformersEngine().generate(policy, [[5, 6]], seeds_for(1, 2), sampling)


@pytest.mark.parametrize(
    ("kind", "options"), [("bloom", {"n_head": 4}), ("falcon", {"num_attention_heads": 4, "alibi": True})]
)
def test_distances_that_a_mask_without_queries_says_are_refused(kind, options):
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, hidden_size=32, **options)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    sampling = SamplingConfig(max_new_tokens=3, temperature=1.0, eos_token_ids=(EOS,))
    with pytest.raises(ConfigError, match=rf"^model.engine: .* cannot decode a {kind} with ALiBi; choose .*VLLM"):
        TransformersEngine().generate(policy, [[5, 6]], seeds_for(1, 2), sampling)


def test_a_model_that_looks_no_attention_up_samples_what_it_reads():
    """Falcon takes a name that it does not know for eager attention, and adds a mask of truth values to its scores."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, initializer_range=0.3))
    policy, prompts = Policy(model.double()), random_ids((7, 4))
    out = TransformersEngine().generate(policy, prompts, seeds_for(2, 1), SamplingConfig(9, 1.0, (EOS,)))
    sequences = Sequences(prompts, [group[0] for group in out.token_lists()])
    for mine, theirs in zip(policy.completion_logps(sequences, token_budget=1), out.logps[:, 0], strict=True):
        assert (mine - theirs[: len(mine)]).abs().max() < 4 * F32


@pytest.mark.parametrize(("argument", "value"), [("max_sequences", 0), ("compaction", 0.0), ("compaction", 1.1)])
def test_bad_options_name_their_key(argument, value):
    with pytest.raises(ValueError, match=f"model.engine.{argument}"):
        TransformersEngine(**{argument: value})


def reads_and_casts(policy, limit, drafts=None):
    """What decoding ``limit`` tokens of 6 x 3 rows reads back and casts; no token ends a completion."""
    sampling = SamplingConfig(limit, 1.0, (VOCAB,))
    prompts = random_ids((5, 1, 9, 12, 3, 9))
    with host_reads() as seen:
        out = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling, drafts)
    assert out.mask.all()
    return seen


@pytest.mark.parametrize("drafts", [None, [[7, 8, 9] * 9] * 6])
def test_one_read_a_pass_and_every_weight_is_cast_once(drafts):
    policy, passes = random_policy(dtype=torch.float32, tie_word_embeddings=True), []
    policy.backbone.register_forward_hook(lambda *_: passes.append(1))
    linear = [m for m in policy.model.modules() if isinstance(m, torch.nn.Linear)]
    shapes = [tuple(p.shape) for m in linear for p in m.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short, few = reads_and_casts(policy, 6, drafts), len(passes)
        long, many = reads_and_casts(policy, 24, drafts), len(passes) - few
    assert many > few
    assert len(long.names) - len(short.names) == many - few, "one host read a pass"
    assert len(short.names) <= few + 5, "and a few for each wave and each call"
    weights = [shape for shape in long.casts if shape in set(shapes)]
    assert sorted(weights) == sorted(shapes), "each weight and bias of the linear layers once a call"
    # Of the 18 rows' keys those of a pass are cast, not again all columns of the cache, of which the prompt has 12.
    assert not [shape for shape in long.casts if len(shape) == 4 and shape[0] == 18 and shape[2] > 12]


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("drafts", [None, [[7, 8, 9] * 9] * 6])
def test_weights_and_keys_that_are_cast_once_sample_what_autocast_samples(prompts, options, drafts):
    policy = random_policy(dtype=torch.float32, **options)
    sampling = SamplingConfig(max_new_tokens=14, temperature=1.0, eos_token_ids=(EOS,))
    before = {name: (p, p.clone()) for name, p in policy.model.named_parameters(remove_duplicate=False)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling, drafts)
        for name, parameter in policy.model.named_parameters(remove_duplicate=False):
            assert parameter is before[name][0], "the policy's own parameters are back"
            assert torch.equal(parameter, before[name][1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "cast_weights", lambda policy: nullcontext())
            # Bfloat16 values survive float32, and what float32 holds is cast by autocast at every use.
            patch.setattr(module, "SlotCache", lambda *given: SlotCache(*given[:3], torch.float32))
            expected = TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling, drafts)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logps, expected.logps)
    assert not torch.equal(found.logps, TransformersEngine().generate(policy, prompts, seeds_for(6, 3), sampling).logps)


def test_an_error_gives_the_weights_back():
    policy = random_policy(dtype=torch.float32)
    before, during = list(policy.model.parameters()), []

    def fails():
        with torch.autocast("cpu", dtype=torch.bfloat16), cast_weights(policy):
            during.extend(p.dtype for p in policy.model.parameters())
            policy.model(torch.tensor([[VOCAB + 5]]))

    with pytest.raises(IndexError):
        fails()
    assert set(during) == {torch.float32, torch.bfloat16}
    assert all(a is b for a, b in zip(policy.model.parameters(), before, strict=True))
    with cast_weights(policy):  # without autocast there is nothing to do
        assert policy.model.lm_head.weight is before[-1]
