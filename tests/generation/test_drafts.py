"""Drafts change how fast completions are decoded, never what is decoded."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hdpo.functional.random import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.drafts import Drafts
from hdpo.policy import Policy

EOS, VOCAB, LIMIT = 2, 41, 30
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17], [20, 21, 22]]
SAMPLES = 6


def build(kind):
    torch.manual_seed(3)
    match kind:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES))
        case "sliding":
            return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))
        case "mixed":
            kinds = ["full_attention", "sliding_attention"]
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, layer_types=kinds))
        case "learned positions":
            # Exactly as many positions as the longest completion needs.
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=7 + LIMIT, eos_token_id=EOS)
            )
    raise AssertionError(kind)


@pytest.fixture(scope="module", params=["qwen2", "sliding", "mixed", "learned positions"])
def policy(request):
    return Policy(build(request.param).double())


@pytest.fixture
def passes(policy):
    """Counts forward passes of the policy."""
    found = []
    handle = policy.backbone.register_forward_hook(lambda module, args, output: found.append(1))
    yield found
    handle.remove()


def sample(policy, drafts, temperature=1.0, compaction=0.125, max_sequences=512):
    seeds = derive_seeds(9, torch.arange(len(PROMPTS))[:, None], torch.arange(SAMPLES))
    sampling = SamplingConfig(LIMIT, temperature, (EOS,))
    return TransformersEngine(max_sequences, compaction).generate(policy, PROMPTS, seeds, sampling, drafts)


def drafts_like(out, kind):
    """Drafts for each prompt, made of what its first sample is going to be."""
    right = [group[0] for group in out.token_lists()]
    match kind:
        case "right":
            return right
        case "without end":
            return [d[:-1] for d in right]
        case "going on":
            return [[*d, 30, 31, 32, 33] for d in right]
        case "replaced":
            return [[(t + 1) % VOCAB if i % 7 == 3 else t for i, t in enumerate(d)] for d in right]
        case "shifted":
            return [[33, 34, 35, *d] for d in right]
        case "cut out":
            return [d[:4] + d[7:] for d in right]
        case "repetitive":
            return [(d[:3] * 20) for d in right]
        case "wrong":
            return [[3] * 50 for _ in right]
        case "some empty":
            return [d if i % 2 else [] for i, d in enumerate(right)]
        case "all empty":
            return [[] for _ in right]
    raise AssertionError(kind)


KINDS = ("right", "without end", "going on", "replaced", "shifted", "cut out", "repetitive", "wrong", "some empty")


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("kind", [*KINDS, "all empty"])
def test_a_draft_does_not_change_the_completions(policy, kind, temperature):
    plain = sample(policy, None, temperature)
    assert plain.truncated.any() or temperature == 0
    other = sample(policy, drafts_like(plain, kind), temperature)
    assert other.token_lists() == plain.token_lists()
    assert torch.equal(other.truncated, plain.truncated)
    torch.testing.assert_close(other.logps, plain.logps, rtol=0, atol=1e-9 if temperature else 1e-5)


@pytest.mark.parametrize("max_sequences", [1, 512])
@pytest.mark.parametrize("compaction", [0.01, 1.0])
def test_nor_do_the_others_in_the_batch(policy, compaction, max_sequences):
    plain = sample(policy, None)
    other = sample(policy, drafts_like(plain, "replaced"), 1.0, compaction, max_sequences)
    assert other.token_lists() == plain.token_lists()


def test_a_right_draft_saves_forward_passes(policy, passes):
    plain = sample(policy, None, 0.0)  # all samples of a prompt are equal
    without = len(passes)
    assert without == plain.mask.any(0).any(0).sum()
    passes.clear()
    sample(policy, drafts_like(plain, "right"), 0.0)
    assert len(passes) <= 4 < without / 3


def test_the_engine_can_be_told_not_to_use_them(policy, passes):
    plain = sample(policy, None, 0.0)
    without = len(passes)
    passes.clear()
    seeds = derive_seeds(9, torch.arange(len(PROMPTS))[:, None], torch.arange(SAMPLES))
    sampling = SamplingConfig(LIMIT, 0.0, (EOS,))
    engine = TransformersEngine(use_drafts=False)
    engine.generate(policy, PROMPTS, seeds, sampling, drafts_like(plain, "right"))
    assert len(passes) == without


def propose(draft, completion, *, misses=0, window=None):
    drafts = Drafts([draft], torch.device("cpu"))
    if window:
        drafts.window[:] = window
    for _ in range(misses):
        drafts.learn(torch.tensor([0]))
    last, before = completion[-1], completion[-2] if len(completion) > 1 else -1
    guessed, counts = drafts.propose(torch.tensor([last]), torch.tensor([before]), torch.tensor([len(completion)]))
    return guessed[0, : int(counts[0])].tolist()


def test_what_is_proposed():
    assert propose([5, 6, 7, 8], [5, 6]) == [7, 8]
    assert propose([5, 6, 7, 8], [5]) == [6, 7, 8]
    assert propose([5, 6, 7, 8], [5, 9]) == [7, 8], "one was replaced"
    assert propose([5, 6, 7, 8], [9, 5, 6]) == [8], "one was added, which is not known yet"
    assert propose([5, 6, 7, 8], [9, 5, 6], misses=2) == [7, 8]
    assert propose([5, 6, 1, 5, 6, 2, 5, 6, 3], [0, 0, 0, 5, 6], misses=2) == [2, 5, 6, 3], "the nearest of all places"
    assert propose([5, 6, 7, 8], [5, 9], misses=2) == [7, 8], "they stand nowhere"
    assert propose([5, 6, 7, 8], [5, 6, 7, 8]) == []
    assert propose([], [5], misses=2) == []
    assert propose([5], [5], misses=2) == []
    assert propose([5, 6, 7, 8, 9], [5, 6], window=2) == [7, 8]


def test_a_shift_is_remembered_and_the_window_follows_what_went_well():
    drafts = Drafts([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]], torch.device("cpu"))
    for _ in range(2):
        drafts.learn(torch.tensor([0]))
    arguments = [torch.tensor([x]) for x in (6, 5, 4)]  # two tokens were added before 5, 6
    assert drafts.propose(*arguments)[0].tolist() == [[7, 8, 9, 10]]
    drafts.learn(torch.tensor([3]))
    assert drafts.propose(*(torch.tensor([x]) for x in (30, 9, 8)))[0].tolist() == [[11, 12, 13, 14, 15, 16]]
