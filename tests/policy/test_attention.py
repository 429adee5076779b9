"""Masks, shared prefixes and grouped heads against attention written out."""

import math

import pytest
import torch
from torch.nn.functional import softmax
from transformers import DynamicCache

from hdpo.policy import attention
from hdpo.policy.attention import (
    MASKED_KINDS,
    PrefixCache,
    attention_kinds,
    attention_masks,
    causal_attention,
    grouped_attention,
)
from tests.helpers.models import random_ids, random_model, random_policy

FULL, SLIDING = "full_attention", "sliding_attention"


def test_kinds_of_layers():
    assert attention_kinds(random_model("qwen2")) == [FULL] * 2
    assert attention_kinds(random_model("mistral", sliding_window=6)) == [SLIDING] * 2
    mixed = {"use_sliding_window": True, "sliding_window": 6, "layer_types": [SLIDING, FULL]}
    assert attention_kinds(random_model("qwen2", **mixed)) == [SLIDING, FULL]
    # GPT-2's configuration knows neither kinds nor windows, as other models' own code may not.
    assert attention_kinds(random_model("gpt2", n_layer=3)) == [FULL] * 3
    without = random_model("gpt2")
    without.config.sliding_window = 4
    assert attention_kinds(without) == [SLIDING] * 2
    assert {FULL, SLIDING} == MASKED_KINDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_query_sees_what_stands_at_or_before_it_and_within_the_window(dtype):
    window, queries, keys = (
        3,
        torch.tensor([[4, 5], [0, 7]]),
        torch.tensor([[0, 1, 2, 3, 4, 5, 99], [7, 6, 5, 4, 3, 0, 1]]),
    )
    mixed = random_model("qwen2", use_sliding_window=True, sliding_window=window, layer_types=[FULL, SLIDING])
    masks = attention_masks(mixed, queries, keys, dtype)
    assert set(masks) == {FULL, SLIDING}
    for kind, mask in masks.items():
        assert mask.dtype == dtype
        assert mask.shape == (2, 1, 2, 7)
        for row in range(2):
            for i, query in enumerate(queries[row].tolist()):
                for column, key in enumerate(keys[row].tolist()):
                    seen = key <= query and (kind == FULL or query - key < window)
                    assert mask[row, 0, i, column] == (0 if seen else torch.finfo(dtype).min), (kind, query, key)
    # One kind needs no names; one row of keys serves all rows of queries.
    alone = attention_masks(random_model("qwen2"), queries, keys[0], dtype)
    assert torch.equal(alone[0], masks[FULL][0])


def heads(rows, number, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, number, length, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("query_heads", "key_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("length", [1, 3, 200])
def test_heads_that_share_keys_attend_as_if_each_had_its_own(query_heads, key_heads, length, monkeypatch):
    query, key, value = heads(2, query_heads, length, 0), heads(2, key_heads, 7, 1), heads(2, key_heads, 7, 2)
    hidden = torch.rand(2, 1, length, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[..., 0] = False
    mask = hidden.double() * torch.finfo(torch.float64).min
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = query_heads // key_heads, True
    copied = []
    original = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: copied.append(1) or original(*a, **k))
    for scaling in (None, 0.5):
        out, _ = attention._grouped_sdpa(module, query, key, value, mask, scaling=scaling)
        assert out.shape == (2, length, query_heads, 8)
        for head in range(query_heads):
            shared = head // (query_heads // key_heads)
            scores = query[:, head] @ key[:, shared].mT * (scaling or 1 / math.sqrt(8)) + mask[:, 0]
            torch.testing.assert_close(out[:, :, head], softmax(scores, -1) @ value[:, shared], rtol=0, atol=1e-12)
    # Copies of the keys are made only where nothing is shared, or a mask for every head would cost more.
    assert bool(copied) == (query_heads == key_heads or query_heads // key_heads * length > 512)


def test_prefixes_are_continued_by_their_own_rows_and_collect_the_gradients_of_all():
    rows = torch.tensor([1, 0, 1])
    cache = PrefixCache(1, rows)
    prefix = [heads(2, 1, 4, seed).requires_grad_() for seed in (0, 1)]
    assert all(a is b for a, b in zip(cache.update(*prefix, 0), prefix, strict=True))
    own = [heads(3, 1, 2, seed) for seed in (2, 3)]
    for _ in range(2):  # nothing of the rows is kept
        found = cache.update(*own, 0)
        for whole, before, after in zip(found, prefix, own, strict=True):
            assert torch.equal(whole, torch.cat([before[rows], after], -2))
    sum(x.sum() for x in found).backward()
    for before in prefix:
        assert before.grad.flatten(1).unique(dim=1).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_is_as_it_was_after_the_block_whatever_happens_in_it(kind):
    model = random_model("qwen2", attn_implementation=kind)
    inside = []

    def fail():
        with grouped_attention(model):
            inside.append(model.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [attention._GROUPED if kind == "sdpa" else "eager"]
    assert model.config._attn_implementation == kind


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
def test_a_model_computes_the_same_in_the_block(options):
    model = random_model("qwen2", **options).double()
    (first, second) = random_ids((6, 6))
    ids, new = torch.tensor([first, second]), torch.tensor([[5, 6], [7, 8]])
    positions = torch.arange(8).expand(2, -1)

    def read():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        mask = attention_masks(model, positions[:, 6:], positions, torch.float64)
        return model(new, attention_mask=mask, position_ids=positions[:, 6:], past_key_values=cache).logits

    with torch.no_grad():
        plain = model(torch.cat([ids, new], 1)).logits[:, 6:]
        with grouped_attention(model):
            grouped = read()
    # Qwen2's norms are computed in float32, two in each of two layers and one at the end.
    tolerance = 5 * math.sqrt(32) * torch.finfo(torch.float32).eps * plain.abs().max().item()
    torch.testing.assert_close(grouped, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "options", "used"),
    [
        ("qwen2", {}, "hdpo_causal_sdpa"),
        ("gpt2", {}, "hdpo_causal_sdpa"),
        ("qwen2", {"attn_implementation": "eager"}, "eager"),
        ("mistral", {"sliding_window": 3}, "sdpa"),
    ],
)
def test_causal_attention_without_masks_is_the_same(kind, options, used):
    """Windows and eager attention need their masks; the others get the same bits without a search for them."""
    policy, ids, seen = random_policy(kind, **options), torch.tensor(random_ids((9, 9, 9))), []
    policy.backbone.register_forward_hook(lambda *_: seen.append(policy.model.config._attn_implementation))
    with torch.no_grad():
        expected = policy.backbone(input_ids=ids, use_cache=False).last_hidden_state
        with causal_attention(policy.model):
            found = policy.backbone(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    assert seen[-1] == used
    assert policy.model.config._attn_implementation == seen[0]
