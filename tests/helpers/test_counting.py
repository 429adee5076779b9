"""What is counted without values, against what the same code really allocates, and against counts by hand."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hdpo.experience import Sequences
from hdpo.policy import Policy, TokenBatch
from tests.helpers.counting import counted

SIZES = {"vocab_size": 5000, "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 1024}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def built(recomputes):
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), attn_implementation="sdpa")
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    # Small chunks of logits: logsumexp makes a copy of its own inside, which is seen on neither side at full size.
    return Policy(model, chunk_elements=1 << 17).train()


def train(policy, mixed):
    """Two micro-batches."""
    batch = TokenBatch.from_sequences(Sequences([[1] * 64] * 4, [[2] * 192] * 4), policy.device)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            policy(batch).sum().backward()


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_peak_is_that_of_the_allocator(tmp_path, recomputes, mixed):
    """Within 0.1 %, but for the float32 copy that a CPU makes of the 16 bits that it adds to the head's gradient."""
    with counted() as counts:
        policy = built(recomputes)
        before = counts.held
        train(policy, mixed)
    policy = built(recomputes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(policy, mixed)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    counted_peak = counts.peak - before
    assert 0.999 * counted_peak <= peak <= 1.001 * (counted_peak + mixed * 4 * 5000 * 256)


def test_kernels_and_bytes_are_those_that_can_be_counted_by_hand():
    with counted() as counts:
        a, b = torch.zeros(4, 8), torch.ones(8, 16)
        product = a @ b
        product[:2].t().add_(1.0)
        half = product.to(torch.bfloat16)
        held = counts.held
        del product
        assert (held, counts.held, counts.peak) == (32 * 4 + 128 * 4 + 64 * 4 + 64 * 2, held - 64 * 4, held)
        assert half.sum().item() == 1.0
    assert counts.kernels == {"zeros": 1, "ones": 1, "mm": 1, "add_": 1, "_to_copy": 1, "sum": 1}
    # zeros, ones, product, half of it read and written, cast, sum
    made = 32 * 4 + 128 * 4 + (32 + 128 + 64) * 4 + 2 * 32 * 4 + 64 * (4 + 2) + (64 + 1) * 2
    assert (counts.moved, counts.host_reads) == (made, 1)


def test_integers_keep_their_values():
    with counted() as counts:
        lengths = torch.tensor([2, 0, 3])
        rows = torch.arange(3).repeat_interleave(lengths)
        table = torch.zeros(3, 5)[rows]
        assert rows.tolist() == [0, 0, 2, 2, 2]
        assert table.shape == (5, 5)
        assert int(lengths.max()) == 3
    assert counts.host_reads == 0
