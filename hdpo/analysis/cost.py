"""What a step costs: memory of one GPU by part and phase, FLOPs and seconds. Pure arithmetic, no tensor is made.

The formulas follow what the code allocates, so that the plan says where memory goes and which key moves it. P is the
number of parameters, w the bytes of a master weight (``model.policy.dtype``) and c those of the computation
(``trainer.precision``); D is the number of GPUs, by which FSDP2 divides what is marked "/D".

=================== ===================================================== ==========================================
part                bytes                                                 when
=================== ===================================================== ==========================================
weights             P w /D                                                always
compute weights     P c, if c < w: autocast casts each weight once        always
gathered weights    FSDP2: P w (transformers engine), else root and two   rollouts; teacher, update
                    layers, w each
gradients           P w /D                                                teacher, update, optimizer
gradient copies     DDP: P w (buckets). FSDP2: P w (unsharded, until the  always; teacher, update
                    last micro-batch)
optimizer           P w times 2 for Adam /D                               always
optimizer step      P w /D: square roots of all second moments at once    optimizer
teacher, reference  P w /D each: frozen or ema teacher; ``kl_coef`` > 0   always
activations         T tokens, see :func:`layer_bytes`                     update; one layer's: teacher, rollouts
output layer        one chunk of logits, and V H (4 + 2 c)                update; the chunk: teacher
engine              KV cache, see :func:`cache_bytes`; vLLM: its share    rollouts; vLLM that stays awake: always
buffers             13 bytes a rollout token, 8 k a distilled token       all but rollouts
overhead            2 GiB: CUDA context, libraries, fragmentation         always
=================== ===================================================== ==========================================

Sizes are the limits of the configuration (longest prompt, longest completion), since a step that meets them must fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "GIB",
    "PHASES",
    "SHAPES",
    "Hardware",
    "Lengths",
    "Setup",
    "Shape",
    "StationCost",
    "Workload",
    "cache_bytes",
    "layer_bytes",
    "memory",
    "num_parameters",
    "peak",
    "step_cost",
    "update_flops",
]

GIB = 2**30
PHASES = ("rollouts", "teacher", "update", "optimizer")

_OVERHEAD = 2 * GIB
#: Elements of one block of the transformers engine's sampling, at 4 + 8 + 8 bytes.
_SAMPLING_BLOCK = (1 << 25) * 20

_KNOWN = ("qwen2", "qwen3", "llama", "mistral")


@dataclass(frozen=True)
class Shape:
    """A dense decoder-only transformer.

    Attributes:
        vocab_size: rows of embeddings and output layer, V.
        hidden_size: width, H.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate_size: width of the gated feed-forward layer.
        tied: whether the output layer is the input embedding.
        qkv_bias: whether queries, keys and values have a bias.
        output_bias: whether the attention's output has one.
        mlp_bias: whether the feed-forward layer has them.
        qk_norm: whether queries and keys are normalised.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Shape:
        """Read a transformers configuration.

        Raises:
            ValueError: an architecture whose parameters these formulas do not count.
        """
        if config.model_type not in _KNOWN:
            raise ValueError(f"the plan knows {', '.join(_KNOWN)}; model.policy.path is a {config.model_type!r}")
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bias,
            output_bias=bias and config.model_type != "qwen2",
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=config.model_type == "qwen3",
        )

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim


SHAPES: dict[str, Shape] = {
    "toy": Shape(512, 64, 2, 2, 1, 32, 128, tied=True),
    "qwen2.5-0.5b": Shape(151_936, 896, 24, 14, 2, 64, 4864, tied=True),
    "qwen2.5-1.5b": Shape(151_936, 1536, 28, 12, 2, 128, 8960, tied=True),
    "qwen2.5-7b": Shape(152_064, 3584, 28, 28, 4, 128, 18_944, tied=False),
}


def _layer_parameters(shape: Shape) -> int:
    width, query, kv, inner = shape.hidden_size, shape.query_width, shape.kv_width, shape.intermediate_size
    number = 2 * width * query + 2 * width * kv + 3 * width * inner + 2 * width
    number += (query + 2 * kv) * shape.qkv_bias + width * shape.output_bias
    return number + (2 * inner + width) * shape.mlp_bias + 2 * shape.head_dim * shape.qk_norm


def _root_parameters(shape: Shape) -> int:
    """Embeddings, output layer and the last norm: what FSDP2 holds in its root."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) + shape.hidden_size


def num_parameters(shape: Shape) -> int:
    """Number of parameters; a tied output layer counts once.

    Example:
        >>> num_parameters(SHAPES["qwen2.5-1.5b"])
        1543714304
    """
    return shape.num_layers * _layer_parameters(shape) + _root_parameters(shape)


@dataclass(frozen=True)
class Workload:
    """What a configuration asks for, in the words of its keys.

    Attributes:
        prompts: prompts a step, over all GPUs.
        num_generations: rollouts a prompt, K.
        max_prompt_tokens: bound on a prompt.
        max_new_tokens: bound on a rollout.
        max_privileged_tokens: bound on a privileged prompt.
        num_privileged: privileged rollouts a cliff, J; 0 without distillation.
        max_cliffs: cliffs a step, over all GPUs.
        privileged_new_tokens: bound on a privileged rollout.
        topk: the teacher's logits.
        val_batch_size: problems of one validation batch on each GPU.
        num_val_samples: completions of each of them.
        val_new_tokens: bound on a validation completion.
        micro_batch_tokens: tokens of one forward and backward pass, T.
        checkpointing: whether activations are recomputed.
        weight_bytes: bytes of a master weight, w.
        compute_bytes: bytes of a number in the computation, c.
        optimizer_states: numbers that the optimizer keeps of each weight: 2 for Adam.
        extra_copies: further copies of the policy: a frozen or EMA teacher, a reference.
    """

    prompts: int = 32
    num_generations: int = 16
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 3072
    max_privileged_tokens: int = 2048
    num_privileged: int = 4
    max_cliffs: int = 32
    privileged_new_tokens: int = 2048
    topk: int = 64
    val_batch_size: int = 64
    num_val_samples: int = 8
    val_new_tokens: int = 3072
    micro_batch_tokens: int = 16_384
    checkpointing: bool = True
    weight_bytes: int = 4
    compute_bytes: int = 2
    optimizer_states: int = 2
    extra_copies: int = 0

    @property
    def mixed(self) -> bool:
        """Whether autocast computes in fewer bytes than the weights have."""
        return self.compute_bytes < self.weight_bytes


@dataclass(frozen=True)
class Setup:
    """How the work is spread.

    Attributes:
        devices: number of GPUs, D.
        memory: bytes of one of them.
        strategy: ``ddp`` (on one GPU: no strategy) or ``fsdp2``.
        engine: ``transformers`` or ``vllm``.
        max_sequences: the transformers engine's bound on completions that decode together.
        share: vLLM's ``gpu_memory_utilization``.
        sleeps: vLLM's ``free_memory_during_update``.
    """

    devices: int = 1
    memory: int = 80 * GIB
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    engine: Literal["transformers", "vllm"] = "transformers"
    max_sequences: int = 512
    share: float = 0.3
    sleeps: bool = True


def layer_bytes(shape: Shape, work: Workload) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass (without those of its weights).

    Two norms keep their float32 input and normalised output; every linear layer keeps its input, a cast copy of its own
    under autocast; attention keeps queries, keys, values, output and a float32 normaliser a head; the gated
    feed-forward layer keeps gate, its activation, the other factor and their product.

    Example:
        >>> layer_bytes(SHAPES["qwen2.5-1.5b"], Workload())
        118840
    """
    c, w = work.compute_bytes, work.weight_bytes
    # Under autocast each of q, k, v, gate and up casts the norm's output anew; else they share it.
    norms = 2 * (w + max(w, 4)) + (5 * c if work.mixed else 2 * w)
    attention = c * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.num_heads
    return norms * shape.hidden_size + attention + 4 * c * shape.intermediate_size + 8


def cache_bytes(shape: Shape, work: Workload) -> int:
    """Bytes a token of the transformers engine's KV cache: keys have the weights' dtype (so have the rotations)."""
    return shape.num_layers * shape.kv_width * (work.weight_bytes + work.compute_bytes)


def _decode_bytes(shape: Shape, work: Workload, setup: Setup) -> int:
    """The transformers engine's largest wave, if all of its completions reach their limit together."""
    local = -(-work.prompts // setup.devices)
    uses = [
        (local, work.num_generations, work.max_prompt_tokens, work.max_new_tokens),
        (min(local, work.max_cliffs), work.num_privileged, work.max_privileged_tokens, work.privileged_new_tokens),
        (work.val_batch_size, work.num_val_samples, work.max_prompt_tokens, work.val_new_tokens),
    ]
    c, w = work.compute_bytes, work.weight_bytes
    largest = 0
    for prompts, samples, prompt_tokens, new_tokens in uses:
        if prompts == 0 or samples == 0:
            continue
        wave = min(prompts, max(1, setup.max_sequences // samples))
        rows, slots = wave * samples, wave * samples * (prompt_tokens + new_tokens)
        # Logits, a block of probabilities, and one layer's keys and values while they are moved or cast.
        decode = rows * shape.vocab_size * (c + 4) + _SAMPLING_BLOCK + slots * shape.kv_width * (w + c)
        prefill = wave * prompt_tokens * layer_bytes(shape, work)
        largest = max(largest, slots * cache_bytes(shape, work) + max(decode, prefill))
    return largest


def memory(shape: Shape, work: Workload, setup: Setup) -> dict[str, dict[str, int]]:
    """Bytes of one GPU: part -> phase -> bytes. A phase's sum is its peak; the largest of them must fit.

    Example:
        >>> parts = memory(SHAPES["qwen2.5-1.5b"], Workload(), Setup())
        >>> round(parts["weights"]["update"] / GIB, 2), round(parts["optimizer"]["rollouts"] / GIB, 2)
        (5.75, 11.5)
    """
    p, w, c = num_parameters(shape), work.weight_bytes, work.compute_bytes
    sharded = setup.strategy == "fsdp2"
    ours = -(-p // setup.devices) if sharded else p
    vllm = setup.engine == "vllm"
    root_and_layers = (_root_parameters(shape) + 2 * _layer_parameters(shape)) * w
    head = shape.vocab_size * shape.hidden_size

    from hdpo.functional.logprobs import CHUNK_ELEMENTS  # torch only when a plan is made

    tokens = max(work.micro_batch_tokens, work.max_prompt_tokens + work.max_new_tokens)
    chunk = min(CHUNK_ELEMENTS, tokens * shape.vocab_size) * (8 + c)
    working = layer_bytes(shape, work) * tokens
    kept = working * (1 if work.checkpointing else shape.num_layers)
    if work.checkpointing:
        kept += shape.num_layers * shape.hidden_size * w * tokens
    rollout_tokens = -(-work.prompts // setup.devices) * work.num_generations * work.max_new_tokens
    cliffs = min(-(-work.prompts // setup.devices), work.max_cliffs)
    distilled = cliffs * work.num_privileged * work.privileged_new_tokens
    engine = int(setup.share * setup.memory) if vllm else _decode_bytes(shape, work, setup)
    copies = {"teacher": p * w, "update": p * w} if sharded else dict.fromkeys(PHASES, p * w)
    parts = {
        "weights": dict.fromkeys(PHASES, ours * w),
        "compute weights": dict.fromkeys(PHASES, p * c if work.mixed else 0),
        "gathered weights": {
            "rollouts": (root_and_layers if vllm else p * w) if sharded else 0,
            "teacher": root_and_layers if sharded else 0,
            "update": root_and_layers if sharded else 0,
        },
        # The teacher reads between the policy loss and the distillation loss.
        "gradients": {"teacher": ours * w, "update": ours * w, "optimizer": ours * w},
        "gradient copies": copies if setup.devices > 1 else {},
        "optimizer": dict.fromkeys(PHASES, ours * w * work.optimizer_states),
        "optimizer step": {"optimizer": ours * w if work.optimizer_states > 1 else 0},
        "teacher, reference": dict.fromkeys(PHASES, ours * w * work.extra_copies),
        # The backward pass of a layer needs about as much again as it kept.
        "activations": {"teacher": working, "update": kept + working},
        "output layer": {"teacher": chunk + head * c, "update": chunk + head * (4 + 2 * c)},
        "engine": {
            "rollouts": engine,
            "teacher": engine if vllm and not setup.sleeps else 0,
            "update": engine if vllm and not setup.sleeps else 0,
            "optimizer": engine if vllm and not setup.sleeps else 0,
        },
        "buffers": {
            "teacher": 13 * rollout_tokens + 8 * work.topk * distilled,
            "update": 13 * rollout_tokens + 8 * work.topk * distilled,
            "optimizer": 13 * rollout_tokens + 8 * work.topk * distilled,
        },
        "overhead": dict.fromkeys(PHASES, _OVERHEAD),
    }
    return {name: {phase: values.get(phase, 0) for phase in PHASES} for name, values in parts.items()}


# ---------------------------------------------------------------------- time


@dataclass(frozen=True)
class Hardware:
    """What the estimate of seconds assumes of one GPU; the defaults are an H100's data sheet.

    Attributes:
        peak_flops: dense floating-point operations a second in the computation's dtype.
        bandwidth: bytes a second of its memory.
        mfu: share of ``peak_flops`` that prefill, teacher and update reach.
        bandwidth_share: share of ``bandwidth`` that decoding reaches.
        layer_launch: seconds that the transformers engine needs to start one layer's kernels for one token.
    """

    peak_flops: float = 989e12
    bandwidth: float = 3.35e12
    mfu: float = 0.35
    bandwidth_share: float = 0.6
    layer_launch: float = 0.7e-3


@dataclass(frozen=True)
class Lengths:
    """What the estimate of seconds assumes of the data; limits say nothing about means.

    Attributes:
        prompt: mean tokens of a prompt.
        privileged: mean tokens of a privileged prompt.
        fill: mean completion as a share of its limit.
        cliffs: share of prompts that are cliffs.
        mixed: share of prompts whose rollouts differ: only these go through the policy.
        kept: share of privileged rollouts that are correct.
    """

    prompt: float = 200.0
    privileged: float = 700.0
    fill: float = 0.3
    cliffs: float = 0.25
    mixed: float = 0.5
    kept: float = 0.5


@dataclass(frozen=True)
class StationCost:
    """One station of a step.

    Attributes:
        tokens: tokens over all GPUs.
        flops: model FLOPs over all GPUs; recomputation does not count.
        seconds: estimated duration.
    """

    tokens: float
    flops: float
    seconds: float


def _matrix_parameters(shape: Shape) -> int:
    """Parameters that multiply every token: an input embedding that is not the output layer too does not."""
    return num_parameters(shape) - (0 if shape.tied else shape.vocab_size * shape.hidden_size)


def update_flops(shape: Shape, tokens: float, *, completion_tokens: float | None = None) -> float:
    """Model FLOPs of a forward and backward pass, 6 a parameter and token; attention's quadratic part is left out.

    Args:
        shape: the policy.
        tokens: tokens that go through the layers.
        completion_tokens: tokens that meet the output layer; default all.

    Example:
        >>> update_flops(SHAPES["qwen2.5-1.5b"], 1) == 6 * num_parameters(SHAPES["qwen2.5-1.5b"])
        True
    """
    head = shape.vocab_size * shape.hidden_size
    outputs = tokens if completion_tokens is None else completion_tokens
    return 6.0 * ((_matrix_parameters(shape) - head) * tokens + head * outputs)


def step_cost(
    shape: Shape, work: Workload, setup: Setup, hardware: Hardware | None = None, lengths: Lengths | None = None
) -> dict[str, StationCost]:
    """FLOPs and seconds of a step by station, on these assumptions; grading is left out.

    Forward passes cost 2 P FLOPs a token, the update 6 P (8 P of work where activations are recomputed). Decoding a
    token takes the larger of its FLOPs and the bytes it reads (weights once, and the cache of all rows).
    """
    hardware, lengths = hardware or Hardware(), lengths or Lengths()
    matrices = _matrix_parameters(shape)
    flops = hardware.peak_flops * hardware.mfu * setup.devices

    def forward(tokens: float) -> StationCost:
        return StationCost(tokens, 2.0 * matrices * tokens, 2.0 * matrices * tokens / flops)

    def sample(prompts: float, samples: int, prompt: float, limit: int) -> StationCost:
        if prompts == 0 or samples == 0:
            return StationCost(0.0, 0.0, 0.0)
        mean = lengths.fill * limit
        local = prompts / setup.devices
        waves = 1.0
        if setup.engine == "transformers":
            waves = max(1.0, local / max(1, setup.max_sequences // samples))
        rows = local * samples / waves * lengths.fill  # finished rows leave the batch
        kv = cache_bytes(shape, work)
        if setup.engine == "vllm":
            kv = shape.num_layers * shape.kv_width * 2 * work.compute_bytes
        read = matrices * work.compute_bytes + rows * (prompt + mean / 2) * kv
        token = max(
            read / (hardware.bandwidth * hardware.bandwidth_share), 2.0 * matrices * rows * setup.devices / flops
        )
        if setup.engine == "transformers":
            token = max(token, shape.num_layers * hardware.layer_launch)
        prefill, tokens = forward(prompts * prompt), prompts * samples * mean
        return StationCost(
            tokens + prefill.tokens, 2.0 * matrices * tokens + prefill.flops, waves * limit * token + prefill.seconds
        )

    cliffs = min(lengths.cliffs * work.prompts, work.max_cliffs) if work.num_privileged else 0.0
    kept = cliffs * work.num_privileged * lengths.kept
    privileged_mean = lengths.fill * work.privileged_new_tokens
    trained = (
        lengths.mixed * work.prompts * work.num_generations * (lengths.prompt + lengths.fill * work.max_new_tokens)
    )
    trained += kept * (lengths.prompt + privileged_mean)
    recomputed = 8 / 6 if work.checkpointing else 1.0
    update = 6.0 * matrices * trained
    return {
        "rollouts": sample(work.prompts, work.num_generations, lengths.prompt, work.max_new_tokens),
        "privileged": sample(cliffs, work.num_privileged, lengths.privileged, work.privileged_new_tokens),
        "teacher": forward(kept * (lengths.privileged + privileged_mean)),
        "update": StationCost(trained, update, update * recomputed / flops),
    }


def peak(parts: Mapping[str, Mapping[str, int]]) -> tuple[int, str]:
    """The largest phase: its bytes and name."""
    totals = {phase: sum(values[phase] for values in parts.values()) for phase in PHASES}
    phase = max(totals, key=lambda name: totals[name])
    return totals[phase], phase
