"""vLLM engines in two processes that train together: plain, sharded by FSDP2, and one engine over both."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from hdpo.distributed import shard_policy
from hdpo.experience import Sequences
from hdpo.functional.random import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.vllm import VLLMEngine
from hdpo.policy import Policy
from hdpo.policy.packing import TokenBatch
from tests.helpers.processes import run_on

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

# Unequal work: three prompts for the first rank, one for the second, none for it in the last step.
SHARES = [(slice(0, 3), slice(3, 4)), (slice(0, 3), slice(3, 4)), (slice(0, 4), slice(4, 4))]
GREEDY = SamplingConfig(24, 0.0, (1,))


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 97, (n,), generator=generator).tolist() for n in (20, 30, 7, 40)]


def build(tied):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.1,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    return Policy(Qwen2ForCausalLM(config))


def train_step(policy, optimizer):
    batch = TokenBatch.from_sequences(Sequences(prompts(), [[50, 51, 1]] * 4), policy.device)
    (-policy(batch).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def sample(policy, engine, step, share):
    seeds = derive_seeds(3, step, torch.arange(4)[share, None], torch.arange(3))
    return engine.generate(policy, prompts()[share], seeds, SamplingConfig(24, 1.0, (1,))).token_lists()


def train_and_sample(policy, engine, shares):
    """What each step samples and what it decodes greedily, with an optimizer step after each."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.2)
    results = []
    for step, share in enumerate(shares):
        sampled = sample(policy, engine, step, share)
        num = len(sampled)
        greedy = engine.generate(policy, prompts()[share], torch.zeros(num, 1, dtype=torch.int64), GREEDY)
        results.append((sampled, greedy.token_lists()))
        train_step(policy, optimizer)
    return results


def two_ranks(rank, mode):
    shares = [share[rank] for share in SHARES]
    engine = VLLMEngine(tensor_parallel_size=2 if mode == "tensor parallel" else 1)
    policy = build(tied=mode != "plain")
    if mode == "sharded":
        from torch.distributed.device_mesh import init_device_mesh

        shard_policy(policy, init_device_mesh("cpu", (2,)))
    results = train_and_sample(policy, engine, shares)
    syncs = engine.sync_version()
    engine.close()
    assert dist.get_world_size() == 2, "closing an engine must not end the trainer's process group"
    again = sample(policy, engine, 3, shares[0])  # the engine starts again in the groups that are there
    engine.close()
    return results, syncs, again


@pytest.fixture
def shared_memory():
    """Remove what killed ranks leave behind: on a CPU vLLM names it by the ranks, and does not start beside it."""
    started = time.time()
    yield
    for path in Path("/dev/shm").glob("*-tp:0-[[]0-1]-cpushm_*"):
        if path.stat().st_mtime >= started:
            path.unlink()


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("mode", ["plain", "sharded", "tensor parallel"])
def test_two_ranks_sample_what_one_process_samples(tmp_path, mode):
    """The reference is the transformers engine for greedy completions, and one vLLM for the sampled ones."""
    first, second = run_on(2, tmp_path, two_ranks, mode, timeout=1000.0, fresh=True)
    policy, engine = build(tied=mode != "plain"), VLLMEngine()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.2)
    try:
        for step in range(3):
            (sampled_1, greedy_1), (sampled_2, greedy_2) = first[0][step], second[0][step]
            assert sampled_1 + sampled_2 == sample(policy, engine, step, slice(0, 4))
            greedy = TransformersEngine().generate(policy, prompts(), torch.zeros(4, 1, dtype=torch.int64), GREEDY)
            assert greedy_1 + greedy_2 == greedy.token_lists()
            train_step(policy, optimizer)
        assert first[2] + second[2] == sample(policy, engine, 3, slice(0, 4))
    finally:
        engine.close()
    assert first[1] == second[1] == 3
