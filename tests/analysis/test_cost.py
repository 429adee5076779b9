"""The plan's formulas against what PyTorch and transformers really make: parameters, optimizer state, activations."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from hdpo.analysis.cost import (
    GIB,
    PHASES,
    SHAPES,
    Hardware,
    Lengths,
    Setup,
    Shape,
    Workload,
    cache_bytes,
    layer_bytes,
    memory,
    num_parameters,
    peak,
    step_cost,
    update_flops,
)
from hdpo.policy import Policy

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=48),
    "qwen3 bias": Qwen3Config(**SIZES, head_dim=48, attention_bias=True),
    "llama": LlamaConfig(**SIZES),
    "llama biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=64),
}


def qwen(shape):
    """The transformers configuration of a built-in shape."""
    return Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tied,
    )


def count(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_an_architecture_are_those_of_transformers(name):
    assert num_parameters(Shape.from_config(CONFIGS[name])) == count(CONFIGS[name])


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_a_built_in_shape_are_those_of_transformers(name):
    assert Shape.from_config(qwen(SHAPES[name])) == SHAPES[name]
    assert num_parameters(SHAPES[name]) == count(qwen(SHAPES[name]))


def test_an_unknown_architecture_is_refused():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"knows qwen2, qwen3, llama, mistral; .* 'gpt2'"):
        Shape.from_config(GPT2Config())


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_are_the_bytes_that_are_allocated(optimizer, states, dtype):
    model = Qwen2ForCausalLM(CONFIGS["qwen2 tied"]).to(dtype)
    chosen = optimizer(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    chosen.step()
    width = dtype.itemsize
    work = Workload(weight_bytes=width, compute_bytes=2, optimizer_states=states)
    parts = memory(Shape.from_config(CONFIGS["qwen2 tied"]), work, Setup())
    assert parts["weights"]["update"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"]["update"] == sum(p.grad.nbytes for p in model.parameters())
    held = sum(v.nbytes for s in chosen.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim)
    assert parts["optimizer"]["update"] == held


def saved_bytes(num_layers, tokens, *, autocast, checkpointing=False, dtype=torch.float32):
    """Bytes that the backbone's graph keeps for the backward pass, weights and their casts left out."""
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": num_layers})).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        hidden = model.model(input_ids=torch.randint(0, 1000, (3, tokens // 3)), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("autocast", "work"),
    [(True, Workload()), (False, Workload(compute_bytes=4))],
    ids=["bf16-mixed", "32-true"],
)
def test_a_layers_activations_are_what_autograd_keeps(autocast, work):
    shape, tokens = Shape.from_config(CONFIGS["qwen2"]), 3 * 111
    difference = saved_bytes(3, tokens, autocast=autocast) - saved_bytes(2, tokens, autocast=autocast)
    assert difference == layer_bytes(shape, work) * tokens


def test_checkpointing_keeps_each_layers_input_alone():
    shape, work = Shape.from_config(CONFIGS["qwen2"]), Workload(micro_batch_tokens=5000)
    tokens = 3 * 111
    options = {"autocast": True, "checkpointing": True}
    difference = saved_bytes(3, tokens, **options) - saved_bytes(2, tokens, **options)
    assert difference == shape.hidden_size * work.weight_bytes * tokens
    parts = [memory(replace(shape, num_layers=n), work, Setup())["activations"]["update"] for n in (3, 2)]
    assert parts[0] - parts[1] == difference / tokens * 5000


@pytest.mark.parametrize("autocast", [True, False])
def test_a_cached_token_is_as_large_as_the_engines(autocast):
    from hdpo.generation import SamplingConfig, TransformersEngine

    held = []

    class Watched(Policy):
        def forward(self, *args, **kwargs):
            raise AssertionError("the engine decodes below the output layer")

    policy = Watched(Qwen2ForCausalLM(CONFIGS["qwen2"]))
    run = policy.backbone.forward

    def watch(*args, past_key_values=None, **kwargs):
        out = run(*args, past_key_values=past_key_values, **kwargs)
        layers = past_key_values.layers
        slots = layers[0].keys.shape[0] * layers[0].keys.shape[1]
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / slots)
        return out

    policy.backbone.forward = watch
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        TransformersEngine().generate(
            policy, [[1, 2, 3]], torch.zeros(1, 2, dtype=torch.int64), SamplingConfig(4, 1.0, (0,))
        )
    work = Workload(compute_bytes=2 if autocast else 4)
    assert set(held) == {cache_bytes(Shape.from_config(CONFIGS["qwen2"]), work)}


def test_fsdp2_divides_what_it_shards_and_ddp_does_not():
    shape, work = SHAPES["qwen2.5-1.5b"], Workload()
    one, ddp, fsdp = (
        memory(shape, work, Setup(devices=d, strategy=s)) for d, s in ((1, "ddp"), (8, "ddp"), (8, "fsdp2"))
    )
    for part in ("weights", "gradients", "optimizer", "optimizer step"):
        assert one[part] == ddp[part]
        for phase in PHASES:
            assert 0 <= fsdp[part][phase] * 8 - one[part][phase] < 64
    assert sum(one["gradient copies"].values()) == 0
    assert ddp["gradient copies"]["rollouts"] == num_parameters(shape) * 4


def test_what_moves_the_peak():
    shape, work, setup = SHAPES["qwen2.5-1.5b"], Workload(), Setup()

    def total(phase, work=work, setup=setup):
        return sum(values[phase] for values in memory(shape, work, setup).values())

    assert total("update", replace(work, checkpointing=False)) > 2 * total("update")
    assert total("update", replace(work, micro_batch_tokens=8192)) < total("update")
    assert total("rollouts", setup=replace(setup, max_sequences=64)) < total("rollouts") / 2
    copies = total("update", replace(work, extra_copies=2)) - total("update")
    assert copies == 2 * memory(shape, work, setup)["weights"]["update"]
    awake = replace(setup, engine="vllm", sleeps=False)
    assert total("update", setup=awake) - total("update", setup=replace(awake, sleeps=True)) == int(0.3 * 80 * GIB)
    assert peak(memory(shape, work, setup)) == (max(total(phase) for phase in PHASES), "rollouts")


def test_flops_of_the_update_count_the_output_layer_where_it_is_applied():
    shape = Shape.from_config(CONFIGS["qwen2"])  # untied
    embeddings = 1000 * 128
    assert update_flops(shape, 10) == 60 * (num_parameters(shape) - embeddings)
    assert update_flops(shape, 10) - update_flops(shape, 10, completion_tokens=4) == 6 * 6 * embeddings


def test_seconds_follow_hardware_lengths_and_devices():
    shape, work = SHAPES["qwen2.5-1.5b"], Workload()
    base = step_cost(shape, work, Setup(engine="vllm"))
    assert base["update"].seconds == pytest.approx(base["update"].flops * 8 / 6 / (989e12 * 0.35))
    plain = step_cost(shape, replace(work, checkpointing=False), Setup(engine="vllm"))
    assert base["update"].seconds == pytest.approx(plain["update"].seconds * 8 / 6)
    assert step_cost(shape, work, Setup(devices=8))["update"].seconds == pytest.approx(base["update"].seconds / 8)
    slow = step_cost(shape, work, Setup(engine="vllm"), Hardware(bandwidth=3.35e11))
    assert slow["rollouts"].seconds > 5 * base["rollouts"].seconds
    longer = step_cost(shape, work, Setup(engine="vllm"), lengths=Lengths(fill=0.6))
    assert longer["rollouts"].tokens > 1.9 * base["rollouts"].tokens
    grpo = step_cost(shape, replace(work, num_privileged=0), Setup())
    assert grpo["privileged"].flops == grpo["teacher"].flops == 0
    # 16 of 32 prompts x 16 rollouts x (200 + .3 x 3072), and 8 cliffs x 2 kept x (200 + .3 x 2048)
    assert base["update"].tokens == pytest.approx(256 * 1121.6 + 16 * 814.4)
