"""Drafts change how fast completions are decoded, never what is decoded."""

import pytest
import torch

from hdpo.functional.random import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.drafts import Drafts
from tests.helpers.models import EOS, VOCAB, random_policy
from tests.helpers.tolerances import F32

LIMIT = 30
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17], [20, 21, 22]]
SAMPLES = 6
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
}
KINDS_OF_POLICIES = {
    "qwen2": ("qwen2", {}),
    "sliding": ("mistral", {"sliding_window": 6}),
    "mixed": ("qwen2", MIXED),
    # Exactly as many positions as the longest completion needs.
    "learned positions": ("gpt2", {"n_positions": 7 + LIMIT}),
}


@pytest.fixture(scope="module", params=KINDS_OF_POLICIES)
def policy(request):
    kind, options = KINDS_OF_POLICIES[request.param]
    return random_policy(kind, seed=3, **options)


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
    # Computed in float64, kept in float32: one rounding on either side.
    torch.testing.assert_close(other.logps, plain.logps, rtol=2 * F32, atol=0)


@pytest.mark.parametrize("max_sequences", [1, 512])
@pytest.mark.parametrize("compaction", [0.01, 1.0])
def test_nor_do_the_others_in_the_batch(policy, compaction, max_sequences):
    plain = sample(policy, None)
    other = sample(policy, drafts_like(plain, "replaced"), 1.0, compaction, max_sequences)
    assert other.token_lists() == plain.token_lists()


@pytest.mark.parametrize("kind", ["right", "going on", "replaced", "some empty"])
def test_nor_does_a_cache_without_room_to_spare(policy, kind, monkeypatch):
    """Finished rows stay in the batch and read as many guesses as the others, at places further right."""
    plain = sample(policy, None)
    monkeypatch.setattr("hdpo.generation.cache._SPARE", 0)
    monkeypatch.setattr("hdpo.generation.cache._GROWTH", 1.0)
    other = sample(policy, drafts_like(plain, kind), compaction=1.0)
    assert other.token_lists() == plain.token_lists()
    torch.testing.assert_close(other.logps, plain.logps, rtol=2 * F32, atol=0)


def test_a_right_draft_saves_forward_passes(policy, passes):
    plain = sample(policy, None, 0.0)  # all samples of a prompt are equal
    without = len(passes)
    assert without == plain.mask.any(0).any(0).sum()
    passes.clear()
    sample(policy, drafts_like(plain, "right"), 0.0)
    assert len(passes) <= 4 < without / 3


@pytest.mark.parametrize("kind", ["wrong", "used up"])
def test_a_draft_that_guesses_nothing_right_is_given_up(policy, kind):
    widths = []
    handle = policy.backbone.register_forward_hook(
        lambda _, __, kwargs, ___: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    plain = sample(policy, None, 0.0)
    without = len(widths)
    drafts = {"wrong": [[(t + 1) % VOCAB for t in group[0]] for group in plain.token_lists()]}
    drafts["used up"] = [group[0][:6] for group in plain.token_lists()]
    widths.clear()
    assert sample(policy, drafts[kind], 0.0).token_lists() == plain.token_lists()
    handle.remove()
    # With the prompts; then behind the last token; then, if at all, where the last two tokens stand in the draft.
    assert max(widths[3:]) == 1
    assert len(widths) == without - (6 if kind == "used up" else 0)


def test_the_engine_can_be_told_not_to_use_them(policy, passes):
    plain = sample(policy, None, 0.0)
    without = len(passes)
    passes.clear()
    seeds = derive_seeds(9, torch.arange(len(PROMPTS))[:, None], torch.arange(SAMPLES))
    sampling = SamplingConfig(LIMIT, 0.0, (EOS,))
    engine = TransformersEngine(use_drafts=False)
    engine.generate(policy, PROMPTS, seeds, sampling, drafts_like(plain, "right"))
    assert len(passes) == without


def test_without_any_draft_nothing_is_guessed(policy, monkeypatch):
    plain = sample(policy, None)
    monkeypatch.setattr("hdpo.generation.transformers.Drafts", None)
    assert sample(policy, [[]] * len(PROMPTS)).token_lists() == plain.token_lists()


def propose(draft, completion, *, misses=0, window=None):
    drafts = Drafts([draft], torch.device("cpu"))
    if window:
        drafts.window[:] = window
    for _ in range(misses):
        drafts.learn(torch.tensor([0]))
    last, before = completion[-1], completion[-2] if len(completion) > 1 else -1
    places, counts = drafts.propose(torch.tensor([last]), torch.tensor([before]), torch.tensor([len(completion)]))
    return drafts.guesses(places, int(counts[0]))[0].tolist()


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
    places, counts = drafts.propose(*arguments)
    assert drafts.guesses(places, int(counts)).tolist() == [[7, 8, 9, 10]]
    drafts.learn(torch.tensor([3]))
    places, counts = drafts.propose(*(torch.tensor([x]) for x in (30, 9, 8)))
    assert drafts.guesses(places, int(counts)).tolist() == [[11, 12, 13, 14, 15, 16]]


def test_after_three_misses_in_a_row_nothing_is_guessed_until_the_end():
    drafts = Drafts([[5, 6, 7, 8, 9]] * 2, torch.device("cpu"))
    arguments = [torch.tensor([x, x]) for x in (6, 5, 2)]
    counts = []
    for right in ([0, 0], [0, 2], [0, 0], [0, 0]):
        drafts.learn(torch.tensor(right))
        counts.append(drafts.propose(*arguments)[1].tolist())
    assert counts == [[3, 3], [3, 3], [0, 3], [0, 3]]


def test_at_first_a_row_guesses_no_more_than_its_draft_holds():
    guessed, counts = Drafts([[5, 6], [], [5, 6, 7, 8]], torch.device("cpu")).first(3)
    assert counts.tolist() == [2, 0, 3]
    assert [ids[:n] for ids, n in zip(guessed.tolist(), counts.tolist(), strict=True)] == [[5, 6], [], [5, 6, 7]]
