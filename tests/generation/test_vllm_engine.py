"""The real vLLM on a CPU, against the transformers engine and against the policy's own log-probabilities."""

import copy
import importlib.util
import json
import os
import random
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from lightning.pytorch import Callback
from transformers import Qwen2Config, Qwen2ForCausalLM

from hdpo.callbacks.sampler_check import StaleSamplerError
from hdpo.errors import TrainingStopped
from hdpo.experience import Sequences
from hdpo.files import resolve_path
from hdpo.functional.random import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.vllm import VLLMEngine
from hdpo.policy import Policy, PolicyConfig
from hdpo.policy.packing import TokenBatch
from hdpo.rewards import Grade, Outcome
from tests.helpers.toy import BoxedVerifier, datamodule, module, trainer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

LAB = PolicyConfig(path="pkg://hdpo.lab/policy")
EOS = 1
LENGTHS = (20, 30, 7, 41, 1, 30)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine():
    """One engine for the laboratory's policy; a test that needs another closes it, and it starts again by itself."""
    engine = VLLMEngine()
    yield engine
    engine.close()


@pytest.fixture
def policy():
    return Policy.load(LAB)


def tiny(tied):
    """A random Qwen2; vLLM's CPU attention wants heads of at least 32."""
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
        eos_token_id=EOS,
        tie_word_embeddings=tied,
    )
    return Policy(Qwen2ForCausalLM(config))


def prompts_for(policy, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(8, policy.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def seeds_for(num_prompts, num_samples, run=7):
    return derive_seeds(run, torch.arange(num_prompts)[:, None], torch.arange(num_samples))


def sampling(temperature=1.0, max_new_tokens=40, eos=(EOS,)):
    return SamplingConfig(max_new_tokens, temperature, eos)


def gaps(policy, prompts, out, temperature=1.0):
    """Absolute differences between the engine's log-probabilities and the policy's, one per token."""
    flat = [ids for group in out.token_lists() for ids in group]
    contexts = [p for p in prompts for _ in range(out.ids.shape[1])]
    logps = policy.completion_logps(Sequences(contexts, flat), token_budget=4096, temperature=temperature)
    pairs = zip(out.logps.flatten(0, 1), out.mask.flatten(0, 1), logps, strict=True)
    return torch.cat([(mine[mask] - theirs).abs() for mine, mask, theirs in pairs])


def train_step(policy, optimizer, prompts):
    """A step that makes random continuations likelier."""
    completions = [p[::-1][:8] for p in prompts]
    loss = -policy(TokenBatch.from_sequences(Sequences(prompts, completions), policy.device)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("eos", [(EOS,), (EOS, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29), (99,)])
def test_greedy_is_the_transformers_engines_token_for_token(engine, policy, eos):
    prompts = prompts_for(policy)
    greedy = sampling(temperature=0.0, eos=eos)
    mine = engine.generate(policy, prompts, seeds_for(6, 1), greedy)
    theirs = TransformersEngine().generate(policy, prompts, seeds_for(6, 1), greedy)
    assert mine.token_lists() == theirs.token_lists()
    assert torch.equal(mine.mask, theirs.mask)
    assert torch.equal(mine.truncated, theirs.truncated)
    torch.testing.assert_close(mine.logps, theirs.logps, rtol=0, atol=1e-4)
    if eos == (99,):
        assert mine.truncated.any(), "the config's own end-of-sequence token must not end a completion"


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_sampled_log_probs_are_the_policys(engine, policy, temperature):
    prompts = prompts_for(policy)
    out = engine.generate(policy, prompts, seeds_for(6, 5), sampling(temperature))
    assert gaps(policy, prompts, out, temperature).max() < 1e-4


def test_first_tokens_follow_the_full_distribution(engine, policy):
    # A generation config that truncates, as many on the hub do.
    policy.model.generation_config.top_k, policy.model.generation_config.top_p = 2, 0.5
    policy.model.generation_config.min_p = 0.2
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.3)  # a flat distribution says more
    prompt, num, temperature = prompts_for(policy)[1], 6000, 1.3
    out = engine.generate(policy, [prompt], seeds_for(1, num), sampling(temperature, max_new_tokens=1))
    logits = policy.model(torch.tensor([prompt])).logits[0, -1].detach().double()
    expected = num * (logits / temperature).softmax(-1)
    counts = out.ids[0, :, 0].bincount(minlength=len(expected)).double()
    assert (expected >= 5).all(), "too rare for a chi-squared test"
    assert scipy.stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3


def test_a_sample_depends_on_its_prompt_and_seed_alone(engine, policy):
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.3)  # samples that differ
    prompts, seeds = prompts_for(policy), seeds_for(6, 4)
    together = engine.generate(policy, prompts, seeds, sampling()).token_lists()
    assert engine.generate(policy, prompts, seeds, sampling()).token_lists() == together
    backwards = engine.generate(policy, prompts[::-1], seeds.flip(0).flip(1), sampling()).token_lists()
    assert [group[::-1] for group in backwards[::-1]] == together
    alone = engine.generate(policy, prompts[3:4], seeds[3:4, 2:3], sampling()).token_lists()
    assert alone[0][0] == together[3][2]
    other = engine.generate(policy, prompts, seeds_for(6, 4, run=8), sampling()).token_lists()
    pairs = [(a, b) for mine, theirs in zip(other, together, strict=True) for a, b in zip(mine, theirs, strict=True)]
    assert sum(a != b for a, b in pairs) > 20
    assert len({tuple(ids) for ids in together[0]}) > 1
    # vLLM takes the seed -1 for none.
    twice = engine.generate(policy, prompts[:1], torch.full((1, 2), -1), sampling()).token_lists()
    assert twice[0][0] == twice[0][1]


def test_more_tokens_than_vllm_reads_at_once(engine, policy):
    """Long prompts, in part from the prefix cache, and more of them than one batch of vLLM holds."""
    prompts = prompts_for(policy, lengths=[400, 430, 300, 290, 310, 420, 300, 300])
    out = engine.generate(policy, prompts, seeds_for(8, 8), sampling(max_new_tokens=12))
    assert gaps(policy, prompts, out).max() < 1e-4
    alone = engine.generate(policy, prompts[5:6], seeds_for(8, 8)[5:6, 6:7], sampling(max_new_tokens=12))
    assert alone.token_lists()[0][0] == out.token_lists()[5][6]


def test_no_prompts_and_too_long_ones(engine, policy):
    out = engine.generate(policy, [], torch.zeros(0, 3, dtype=torch.int64), sampling())
    assert out.ids.shape == (0, 3, 1)
    with pytest.raises(ValueError, match=r"500 tokens .* 40 exceed the engine's 512 tokens"):
        engine.generate(policy, prompts_for(policy, [500]), seeds_for(1, 1), sampling())


@pytest.mark.parametrize("fused", [False, True])
def test_it_follows_the_policy_through_ten_optimizer_steps(engine, policy, fused):
    prompts = prompts_for(policy, (20, 7, 300, 41, 1, 30))  # the long one is in the prefix cache
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=fused)
    engine.generate(policy, prompts, seeds_for(6, 2), sampling())
    before = engine.sync_version()
    for step in range(10):
        train_step(policy, optimizer, prompts)
        out = engine.generate(policy, prompts, seeds_for(6, 2, run=step), sampling())
        assert engine.sync_version() == before + step + 1
        assert gaps(policy, prompts, out).max() <= 1e-4
        engine.generate(policy, prompts[:1], seeds_for(1, 1), sampling())
        assert engine.sync_version() == before + step + 1, "nothing moved"
    # What a missed synchronisation would have looked like.
    train_step(policy, optimizer, prompts)
    assert gaps(policy, prompts, out).mean() > 1e-3


def test_a_checkpoint_that_is_loaded_is_sampled(engine, policy):
    prompts = prompts_for(policy)
    trained = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    train_step(trained, optimizer, prompts)
    seeds = seeds_for(6, 2)
    before = engine.generate(policy, prompts, seeds, sampling())
    policy.load_state_dict(trained.state_dict())
    while_running = engine.generate(policy, prompts, seeds, sampling())
    assert gaps(policy, prompts, while_running).max() <= 1e-4
    assert while_running.token_lists() != before.token_lists()
    # As in a resumed run: a new engine, whose first rollouts already come from the loaded weights.
    engine.close()
    resumed = engine.generate(policy, prompts, seeds, sampling())
    assert resumed.token_lists() == while_running.token_lists()
    assert gaps(policy, prompts, resumed).max() <= 1e-4


def test_starting_leaves_the_process_as_it_was(engine, policy):
    engine.close()
    assert not torch.distributed.is_initialized()

    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 - vLLM seeds the global one
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            {name: os.environ.get(name) for name in ("LD_PRELOAD", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS")},
        )

    torch.set_float32_matmul_precision("high")
    before = state()
    prompts = prompts_for(policy)
    engine.generate(policy, prompts, seeds_for(6, 2), sampling())
    assert state() == before
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2, "vLLM's CPU worker makes this call do nothing"
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


def test_it_computes_in_autocasts_dtype(engine, policy):
    engine.close()
    prompts = prompts_for(policy)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out = engine.generate(policy, prompts, seeds_for(6, 4), sampling())
            assert engine._llm.model_config.dtype == torch.bfloat16
            difference = gaps(policy, prompts, out)
    finally:
        engine.close()
    assert 1e-5 < difference.mean() < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_qwen2_tied_or_not(engine, tied):
    engine.close()
    policy = tiny(tied)
    prompts = prompts_for(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    other = VLLMEngine(kv_cache_gib=0.25, max_num_seqs=8)
    try:
        for step in range(3):
            greedy = other.generate(policy, prompts, seeds_for(6, 1), sampling(temperature=0.0))
            theirs = TransformersEngine().generate(policy, prompts, seeds_for(6, 1), sampling(temperature=0.0))
            assert greedy.token_lists() == theirs.token_lists()
            out = other.generate(policy, prompts, seeds_for(6, 3, run=step), sampling())
            assert gaps(policy, prompts, out).max() < 1e-4
            train_step(policy, optimizer, prompts)
    finally:
        other.close()


@pytest.fixture
def tied_lab(tmp_path):
    """The laboratory's tokenizer with a random policy whose embeddings are tied."""
    folder = tmp_path / "tied"
    shutil.copytree(resolve_path(LAB.path), folder)
    (folder / "model.safetensors").unlink()
    config = Qwen2Config.from_pretrained(folder)
    config.tie_word_embeddings, config.initializer_range = True, 0.2
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return str(folder)


class Gaps(Callback):
    """Keeps the largest difference in log-probability of each step."""

    def __init__(self):
        self.largest = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.largest.append(batch.measurements.means()["sampler/logprob_gap_max"])


class ParityVerifier(BoxedVerifier):
    """Rewards a property that a random policy has half of the time, so that there is a gradient."""

    def grade(self, completions, references, **columns):
        return [Grade(Outcome.CORRECT, 1.0) if len(c) % 2 else Grade(Outcome.WRONG, 0.0) for c in completions]


@pytest.mark.parametrize("untie", [True, False])
def test_the_tied_output_layer_is_cured_and_without_the_cure_caught(engine, tied_lab, tmp_path, untie):
    """On a CPU vLLM packs the output layer once; tied, it would answer with its first weights forever."""
    engine.close()
    checked = Gaps()
    run = trainer(tmp_path, checked, max_steps=2)
    arguments = {"tokenizer": tied_lab, "prompts_per_step": 2}
    other = VLLMEngine(untie_embeddings=untie)
    policy = PolicyConfig(path=tied_lab)
    hdpo = module(policy=policy, engine=other, verifier=ParityVerifier(), distillation_weight=0.0)
    try:
        if untie:
            run.fit(hdpo, datamodule(tmp_path, **arguments))
            assert run.global_step == 2
            assert other.sync_version() == 3, "before each step and before the last validation"
            assert len(checked.largest) == 2
            assert max(checked.largest) < 1e-4
        else:
            with pytest.raises(RuntimeError, match=r"nats per token on average; .* tied output layer"):
                run.fit(hdpo, datamodule(tmp_path, **arguments))
    finally:
        other.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_synchronisation_stops_the_run_in_its_step(engine, tmp_path, monkeypatch, dtype):
    engine.close()
    other = VLLMEngine(dtype=dtype)
    stream, asked = other._synchronise, []

    def skipping(policy, dtype):
        asked.append(1)
        if len(asked) != 4:
            stream(policy, dtype)

    monkeypatch.setattr(other, "_synchronise", skipping)
    run = trainer(tmp_path, max_steps=6, limit_val_batches=0)
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4), "distillation_weight": 0.0}
    try:
        with pytest.raises(StaleSamplerError, match=r"the sampler's \S+ is not the policy's: they differ by up to"):
            run.fit(module(engine=other, verifier=ParityVerifier(), **options), datamodule(tmp_path))
        assert run.global_step == 3
        held = other.held_weights()
        assert sum("norm" in name for name in held) == 7
        assert all(rows.dtype == getattr(torch, dtype) for rows in held.values())
    finally:
        other.close()


def test_weights_that_are_not_loaded_are_an_error(engine, policy, monkeypatch):
    """vLLM itself only warns, at a level that its own setting hides."""
    from hdpo.generation import vllm

    engine.generate(policy, prompts_for(policy), seeds_for(6, 1), sampling())
    stream = vllm.named_weights
    monkeypatch.setattr(
        vllm, "named_weights", lambda *a, **k: (item for item in stream(*a, **k) if item[0] != "model.norm.weight")
    )
    with torch.no_grad():
        policy.model.model.norm.weight += 0.1
    with pytest.raises(TrainingStopped, match=r"vLLM has not taken over all .*model.norm.weight"):
        engine.generate(policy, prompts_for(policy), seeds_for(6, 1), sampling())
    monkeypatch.undo()
    engine.generate(policy, prompts_for(policy), seeds_for(6, 1), sampling())
    assert torch.equal(engine.held_weights()["model.norm.weight"], policy.model.model.norm.weight)


def test_a_prefix_cache_that_cannot_be_dropped_is_an_error(engine, policy, monkeypatch):
    engine.generate(policy, prompts_for(policy), seeds_for(6, 1), sampling())
    with torch.no_grad():
        policy.model.model.norm.weight += 0.1
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(TrainingStopped, match="could not drop its prefix cache"):
        engine.generate(policy, prompts_for(policy), seeds_for(6, 1), sampling())


def test_a_resumed_run_samples_from_the_checkpoint(engine, tmp_path):
    engine.close()
    straight, resumed = VLLMEngine(), VLLMEngine()
    # Adam moves the weights in every step, also in one without a signal of its own.
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
    try:
        whole = trainer(tmp_path / "whole", max_steps=4)
        trained = module(engine=straight, **options)
        whole.fit(trained, datamodule(tmp_path))
        first = trainer(tmp_path / "parts", max_steps=2)
        first.fit(module(engine=resumed, **options), datamodule(tmp_path))
        first.save_checkpoint(tmp_path / "two.ckpt")
        checked = Gaps()
        second = trainer(tmp_path / "parts", checked, max_steps=4)
        again = module(engine=resumed, **options)
        syncs = resumed.sync_version()
        second.fit(again, datamodule(tmp_path), ckpt_path=tmp_path / "two.ckpt", weights_only=False)
        assert resumed.sync_version() == syncs + 3, "before each step and before the last validation"
        assert len(checked.largest) == 2
        assert max(checked.largest) < 1e-4
        for mine, theirs in zip(again.student.parameters(), trained.student.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    finally:
        straight.close()
        resumed.close()


def test_fit_of_the_laboratory_with_the_shipped_overlay(engine, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hdpo.cli import main

    engine.close()
    (tmp_path / "small.yaml").write_text(
        "model: {verifier: {class_path: tests.helpers.toy.BoxedVerifier}, update: {micro_batch_tokens: 2048}}\n"
        "data: {prompts_per_step: 6, selection: {num_train_problems: 60, num_val_problems: 12}, val_batch_size: 12}\n"
        "rollouts: {num_generations: 4, num_val_samples: 8}\n"
        f"trainer: {{max_steps: 3, val_check_interval: 3, logger: {{init_args: {{save_dir: {tmp_path / 'runs'}}}}}}}\n"
    )
    configs = ("configs/lab.yaml", "configs/engine/vllm.yaml", str(tmp_path / "small.yaml"))
    assert main(["fit", *(part for config in configs for part in ("--config", config))]) == 0
    (folder,) = (tmp_path / "runs" / "lab").glob("version_*")
    events = EventAccumulator(str(folder))
    events.Reload()
    gap = [event.value for event in events.Scalars("sampler/logprob_gap_max")]
    assert len(gap) == 3, "weights moved before each of three steps, and were checked"
    assert max(gap) <= 1e-4
    assert events.Scalars("val/pass@8")
