"""The plan's formula against the bytes that the real code allocates at full size (tests/helpers/counting.py).

Weights, gradients, optimizer state and DDP's buckets must agree exactly: within 0.1 %, since the step's own token ids
and a teacher's top 64, a few MiB, are not in the formula. What is held beyond them for a while must agree within 3 %.
The formula leaves out what is no multiple of tokens x width or of the vocabulary: position tables, the attention's
normaliser, biases (under 1 % of a layer's bytes). And it counts a layer's 16-bit copy of its weights whole, of which up
to two thirds are freed at the peak (0.3 of 11.6 GiB at 7B). Under FSDP2 it counts two layers as gathered, where at some
peaks there is one: at 7B and small micro-batches 0.9 of 10.7 GiB, hence 10 %.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hdpo.commands.memory import GIB, Shape, is_sharded, lora_config, memory
from hdpo.commands.run import read_config
from hdpo.distributed import shard_policy
from hdpo.errors import ConfigError
from hdpo.experience import DistillationBatch, Experience, Prompts, Rollouts, Sequences
from hdpo.functional.logprobs import CHUNK_ELEMENTS
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.generation.transformers import _SAMPLE_ELEMENTS
from hdpo.losses import JSD, ClippedPolicyLoss, UpdateConfig
from hdpo.losses.update import update_policy
from hdpo.policy import Policy
from hdpo.policy.architecture import policy_config
from hdpo.policy.lora import add_adapter
from hdpo.teacher import teacher_topk
from tests.helpers.counting import counted

EXACT, PASSING, SHARDED = 1e-3, 0.03, 0.1
FSDP2 = ("--config", "strategy/fsdp2")


@pytest.fixture(autouse=True)
def blocks_of_a_gpu(monkeypatch):
    for bounds in (_SAMPLE_ELEMENTS, CHUNK_ELEMENTS):
        monkeypatch.setitem(bounds, "cpu", bounds["cuda"])


@pytest.fixture
def ranks():
    """Eight ranks, of which this is the first and the others say nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield 8
    dist.destroy_process_group()


def complete(*arguments):
    return read_config(["--config", "hdpo", *arguments])


def built(config, architecture):
    """The policy as a step begins with it, its AdamW, and the precision in which it computes."""
    architecture._attn_implementation = config["model.policy.attn_implementation"]
    model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config["model.policy.dtype"]))
    if config["model.policy.gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    if (lora := lora_config(config)) is not None:
        # Fake tensors cannot be moved, and are where they should be.
        with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            add_adapter(model, lora)
    policy = Policy(model).train()
    if is_sharded(config):
        shard_policy(policy, dist.device_mesh.init_device_mesh("cpu", (8,)), config.get("model.policy.gather_dtype"))
    # What hdpo.optim.prefer_fused chooses on a GPU.
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    mixed = "16" in config["trainer.precision"]
    return policy, optimizer, MixedPrecision("bf16-mixed", "cpu").forward_context() if mixed else nullcontext()


def experience(config):
    """Rollouts for two micro-batches, four per prompt, and distilled ones for another; of the largest lengths."""
    count = max(1, config["model.update.micro_batch_tokens"] // 4096)
    num_prompts, samples = -(-count // 2), min(4, 2 * count)
    prompt, privileged = config["data.selection.max_prompt_tokens"], config["data.selection.max_privileged_tokens"]
    index, none = torch.arange(num_prompts), [""] * num_prompts
    batch = Experience(
        Prompts(index, index, none, none, none, none, [[i] * prompt for i in range(num_prompts)], [], index >= 0)
    )
    shape = num_prompts, samples, config["rollouts.max_new_tokens"]
    ids = torch.arange(num_prompts * samples * shape[-1]).view(shape)
    rewards = torch.tensor([1.0, 0.0]).repeat(num_prompts, samples // 2)
    outcomes = [["correct", "wrong"] * (samples // 2)] * num_prompts
    batch.rollouts = Rollouts(ids, ids >= 0, torch.zeros(shape), rewards > 1, rewards, outcomes, outcomes)
    completions = [[i] * config["distillation.max_new_tokens"] for i in range(count)]
    batch.distillation = DistillationBatch(
        Sequences([[i] * prompt for i in range(count)], completions),
        Sequences([[i] * privileged for i in range(count)], completions),
        [1] * count,
        [0] * count,
    )
    return batch


def step(config, name):
    """Peak bytes of teacher, update and optimizer, and what lasts from step to step."""
    budget, peaks = config["model.update.micro_batch_tokens"], {}
    batch = experience(config)
    distilled = batch.distillation
    with counted() as counts:
        policy, optimizer, precision = built(config, policy_config(name))
        lasting = counts.held
        module = SimpleNamespace(
            student=policy, reference_policy=None,
            update=UpdateConfig(
                micro_batch_tokens=budget, log_gradient_norms=config["model.update.log_gradient_norms"],
                sync_every_micro_batch=config["model.update.sync_every_micro_batch"],
            ),
            policy_loss=ClippedPolicyLoss(), divergence=JSD(), distillation_weight=0.1, temperature=1.0,
            privileged_policy_weight=0.0, privileged_temperature=1.0,
            device=torch.device("cpu"), trainer=SimpleNamespace(strategy=None), optimizers=lambda: optimizer,
            manual_backward=lambda loss: loss.backward(),
        )  # fmt: skip

        def note(phase):
            peaks[phase] = counts.peak
            counts.start_peak()

        optimizer.register_step_pre_hook(lambda *_: note("update"))
        counts.start_peak()
        with precision:
            distilled.topk_ids, distilled.topk_logits = teacher_topk(
                policy, distilled.privileged, config["distillation.topk"], token_budget=budget
            )
            note("teacher")
            assert update_policy(module, batch)
        note("optimizer")
    return peaks, lasting


BF16 = ("--model.policy.dtype", "bfloat16", "--trainer.precision", "32-true")
FLOAT32 = ("--trainer.precision", "32-true")
# Completions of a length that fills a micro-batch with four of them and their prompt.
KEPT = ("--model.policy.gradient_checkpointing", "false", "--rollouts.max_new_tokens", "3841")
ALWAYS = ("--model.update.sync_every_micro_batch", "true")
GATHERED = ("--model.policy.gather_dtype", "bfloat16")
TOKENS = "--model.update.micro_batch_tokens"
LORA = ("--model.policy.lora", "{r: 16}")
LORA16 = (*LORA, "--model.policy.dtype", "bfloat16")
# Distilled sequences of a length that fills a micro-batch too.
NORMS = (
    *("--model.update.log_gradient_norms", "true", "--distillation.max_new_tokens", "3072"),
    *("--data.selection.max_privileged_tokens", "1024"),
)


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        ("1.5", ()),
        *(
            pytest.param(size, arguments, marks=pytest.mark.slow)
            for size, arguments in [
                ("1.5", LORA16),
                ("1.5", FLOAT32),
                ("1.5", BF16),
                ("1.5", KEPT),
                ("1.5", (TOKENS, "4096")),
                ("1.5", NORMS),
                ("7", ()),
                ("7", (TOKENS, "2048")),
                ("1.5", LORA),
                ("7", LORA16),
                # First: after another sharded policy its peak is counted 8 GB lower, for a reason that was not found.
                ("7", (*FSDP2, *ALWAYS)),
                ("7", FSDP2),
                ("7", (*FSDP2, TOKENS, "4096")),
                ("7", (*FSDP2, *GATHERED)),
            ]
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_step_allocates_what_the_formula_says(size, arguments, ranks):
    name, config = f"Qwen/Qwen2.5-{size}B", complete(*arguments)
    sharded = is_sharded(config)
    peaks, lasting = step(config, name)
    shape = Shape.of(policy_config(name), lora_config(config))
    planned = memory(shape, config, ranks if sharded else 1, 80 * GIB)
    weight = shape.num_parameters * (2 if config["model.policy.dtype"] == "bfloat16" else 4)
    frozen, trained = (weight, 4 * shape.adapter) if shape.adapter else (0, weight)
    ours = trained / ranks if sharded else trained
    assert lasting == pytest.approx(frozen + 3 * ours, rel=EXACT)
    assert planned["optimizer"] == pytest.approx(frozen + 4 * ours, rel=EXACT)
    assert peaks["optimizer"] == pytest.approx(planned["optimizer"], rel=EXACT, abs=8 * 2**20)
    gradients = (ours if ALWAYS[0] in arguments else trained) + (ours if arguments is NORMS else 0)
    for phase, known in (("teacher", lasting), ("update", lasting + gradients)):
        passing, expected = peaks[phase] - known, planned[phase] - known
        assert expected == pytest.approx(passing, rel=SHARDED if sharded else PASSING), phase


@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_a_fused_optimizer_copies_nothing(option):
    config = complete(f"--model.optimizer.{option}", "true")
    with counted() as counts:
        parameters = [torch.zeros(1000, 1000, requires_grad=True) for _ in range(10)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(parameters, **{option: True}).step()
    shape = Shape.of(policy_config("Qwen/Qwen2.5-0.5B"))._replace(num_parameters=10**7)
    assert counts.peak == pytest.approx(memory(shape, config, 1, 80 * GIB)["optimizer"], rel=EXACT)


def test_ddp_holds_the_gradients_once_more(ranks):
    config, name = complete(), "Qwen/Qwen2.5-0.5B"
    with counted() as counts:
        policy, _, _ = built(config, policy_config(name))
        before = counts.held
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
        held = counts.held - before
    assert isinstance(wrapped.module, Policy)
    shape = Shape.of(policy_config(name))
    one, eight = (memory(shape, config, devices, 80 * GIB) for devices in (1, ranks))
    assert {phase: eight[phase] - one[phase] for phase in ("validation", "teacher", "update", "optimizer")} == (
        dict.fromkeys(("validation", "teacher", "update", "optimizer"), pytest.approx(held, rel=EXACT))
    )


def decode(config, architecture, num_prompts):
    """Peak bytes of the engine's two waves, and what lasts.

    Few tokens are decoded: the prompts are nearly as long as prompt and completion may be together.
    """
    prompts = [[1] * config["data.selection.max_prompt_tokens"]] * num_prompts
    seeds = torch.zeros(num_prompts, config["rollouts.num_generations"], dtype=torch.int64)
    engine = TransformersEngine(config["model.engine.max_sequences"])
    with counted() as counts:
        policy, _, precision = built(config, architecture)
        counts.start_peak()
        lasting = counts.held
        with precision:
            engine.generate(policy, prompts, seeds, SamplingConfig(config["rollouts.max_new_tokens"], 1.0, (0,)))
    return counts.peak, lasting


@pytest.mark.parametrize(
    ("arguments", "prompt", "new", "num_layers"),
    [
        ((), 100, 6, 28),
        # The cache grows after 24 tokens.
        pytest.param(FLOAT32, 4070, 26, 2, marks=pytest.mark.slow),
        pytest.param((), 4090, 6, 28, marks=pytest.mark.slow),
        pytest.param(FLOAT32, 4090, 6, 28, marks=pytest.mark.slow),
        pytest.param(FSDP2, 4090, 6, 28, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_decoding_allocates_what_the_formula_says(arguments, prompt, new, num_layers, ranks):
    sizes = "--data.selection.max_prompt_tokens", str(prompt), "--rollouts.max_new_tokens", str(new)
    config = complete(*arguments, *sizes)
    architecture = policy_config("Qwen/Qwen2.5-1.5B")
    architecture.num_hidden_layers, architecture.layer_types = num_layers, architecture.layer_types[:num_layers]
    shape, devices = Shape.of(architecture), ranks if is_sharded(config) else 1
    peak, lasting = decode(config, architecture, config["data.prompts_per_step"] // devices)
    weights = shape.num_parameters * 4
    assert lasting == pytest.approx(3 * weights / devices, rel=EXACT)
    known = lasting + (weights if devices > 1 else 0)
    planned = memory(shape, config, devices, 80 * GIB)["rollouts"]
    assert planned - known == pytest.approx(peak - known, rel=PASSING)


SMALL = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "query", "key", "tied"),
    [
        (Qwen2Config(**SMALL), 128, 64, False),
        (Qwen2Config(**SMALL, tie_word_embeddings=True), 128, 64, True),
        (Qwen3Config(**SMALL, head_dim=48), 192, 96, False),
        (LlamaConfig(**SMALL, attention_bias=True), 128, 64, False),
        (MistralConfig(**SMALL, head_dim=64), 256, 128, False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_shape_is_that_of_the_model(architecture, query, key, tied):
    model = AutoModelForCausalLM.from_config(architecture)
    layer = model.model.layers[0]
    assert Shape.of(architecture) == Shape(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in layer.parameters()),
        1000,
        tied,
        3,
        128,
        query,
        key,
        512,
    )
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (query, key)


@pytest.mark.parametrize(
    ("size", "num_parameters"), [("0.5", 494_032_768), ("1.5", 1_543_714_304), ("7", 7_615_616_512)]
)
def test_the_sizes_of_qwen_are_those_of_the_published_weights(size, num_parameters):
    assert Shape.of(policy_config(f"Qwen/Qwen2.5-Math-{size}B-Instruct")).num_parameters == num_parameters


@pytest.mark.parametrize("architecture", [GPT2Config(), Qwen3MoeConfig(**SMALL, num_experts=4)])
def test_another_architecture_is_refused(architecture):
    with pytest.raises(ConfigError, match=f"Llama, Mistral.*, and those of {architecture.model_type} are others"):
        Shape.of(architecture)
