"""Memory of one GPU in each phase of a run: a formula; no tensor is made.

tests/commands/test_memory.py holds it against the bytes that the real code allocates at full size, counted without a
GPU. What only a GPU adds (CUDA's context, workspaces of kernels, fragmentation) is not in it: :data:`OVERHEAD`.

Prompts and completions have the lengths at which the configuration bounds them, since a step that meets them must fit.
A configuration is a complete one, as :func:`hdpo.commands.run.read_config` returns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hdpo.errors import ConfigError
from hdpo.functional.logprobs import CHUNK_ELEMENTS as _CHUNKS
from hdpo.generation.transformers import _SAMPLE_ELEMENTS
from hdpo.policy.lora import LoRAConfig, add_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = Mapping[str, Any]
GIB = 2**30
OVERHEAD = 2 * GIB
PHASES = ("rollouts", "privileged", "validation", "teacher", "update", "optimizer")


def lora_config(config: Config) -> LoRAConfig | None:
    """The adapter that a configuration asks for."""
    prefix = "model.policy.lora."
    options = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    return LoRAConfig(**options) if options else None


class Shape(NamedTuple):
    """A decoder-only transformer with gated feed-forward layers: numbers of parameters, and widths.

    ``layer`` is the number of a decoder layer. ``tied`` says that the output layer is the input embedding too.
    ``query`` and ``key`` are the widths of all query heads and of all key heads together. ``adapter`` is the number of
    an adapter's parameters, ``rank`` its rank, and ``adapted`` the names of the linear layers of a decoder layer that
    have one; 0 and empty without an adapter, where all parameters are trained.
    """

    num_parameters: int
    layer: int
    vocab_size: int
    tied: bool
    num_layers: int
    width: int
    query: int
    key: int
    feed_forward: int
    adapter: int = 0
    rank: int = 0
    adapted: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: PretrainedConfig, lora: LoRAConfig | None = None) -> Shape:
        """Read a transformers configuration; parameters are counted on the model without storage.

        Raises:
            ConfigError: another architecture, for which the formula does not hold.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        first = next((m[0] for m in model.modules() if isinstance(m, torch.nn.ModuleList)), model)
        total, layer = (sum(p.numel() for p in m.parameters()) for m in (model, first))
        text = config.get_text_config()
        width, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or width // heads
        query, key = heads * head_dim, (getattr(text, "num_key_value_heads", None) or heads) * head_dim
        feed_forward = getattr(text, "intermediate_size", None) or 0
        if abs(layer / (width * (2 * (query + key) + 3 * feed_forward)) - 1) > 0.01:
            raise ConfigError(
                "model.policy.path: the plan knows layers of attention and one gated feed-forward network (Qwen2, "
                f"Qwen3, Llama, Mistral), and those of {config.model_type} are others"
            )
        tied, depth = bool(text.tie_word_embeddings), text.num_hidden_layers
        shape = cls(total, layer, text.vocab_size, tied, depth, width, query, key, feed_forward)
        if lora is None:
            return shape
        with torch.device("meta"):
            add_adapter(model, lora)
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapted = frozenset(name.rpartition(".")[2] for name, m in first.named_modules() if hasattr(m, "base_layer"))
        return shape._replace(adapter=adapter, rank=lora.r, adapted=adapted)

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocab_size * self.width


class _Sampling(NamedTuple):
    """What one GPU samples in a phase: at most so many prompts, completions of each, and bounds on their tokens."""

    prompts: int
    samples: int
    prompt: int
    completion: int


class _Work(NamedTuple):
    """What a run does: sampling by phase, and the tokens of the longest sequence that is trained or that is read.

    A phase that it does not have is missing, and 0 where no teacher reads. Beside the policy that is trained there may
    be the initial one, and a teacher with weights of its own.
    """

    sampling: dict[str, _Sampling]
    trained: int
    read: int
    initial: bool
    average: bool

    @classmethod
    def of(cls, config: Config, devices: int) -> _Work:
        prompts = -(-config["data.prompts_per_step"] // devices)
        cliffs = min(prompts, config["distillation.max_cliffs_per_step"])
        prompt, rollout = config["data.selection.max_prompt_tokens"], config["rollouts.max_new_tokens"]
        context, limit = config["data.selection.max_privileged_tokens"], config["distillation.max_new_tokens"]
        distils, whose = config["model.distillation_weight"] > 0 and cliffs > 0, config["distillation.completions"]
        reads = distils and config["distillation.target"] == "distribution"
        distilled, lengths = rollout if whose == "failures" else limit, [prompt + rollout]
        sampling = {"rollouts": _Sampling(prompts, config["rollouts.num_generations"], prompt, rollout)}
        if distils:
            lengths.append(prompt + distilled)
        if trains_context := config["model.privileged_policy_weight"] > 0 and cliffs > 0:
            lengths.append(context + limit)
        if config["cliffs.reference_in_group"]:
            lengths.append(prompt + config["cliffs.max_reference_tokens"])
        if trains_context or (distils and whose == "privileged"):
            sampling["privileged"] = _Sampling(cliffs, config["distillation.num_privileged"], context, limit)
        if config.get("trainer.limit_val_batches") != 0:
            named = [(k.rpartition(".")[2], v) for k, v in config.items() if k.startswith("data.val_sources.")]
            samples = max([config["rollouts.num_val_samples"], *(v for key, v in named if key == "num_samples")])
            longest = config.get("rollouts.val_max_new_tokens", rollout)
            longest = max([longest, *(v for key, v in named if key == "max_new_tokens")])
            sampling["validation"] = _Sampling(config["data.val_batch_size"], samples, prompt, longest)
        writer = config["distillation.sampled_by"] if distils and whose == "privileged" else "current"
        teacher = config["model.teacher"].rpartition(".")[2] if reads or writer == "ema" else "DriftingTeacher"
        has_initial = teacher == "FrozenTeacher" or config.get("model.policy_loss.kl_coef", 0) > 0
        has_initial |= writer == "initial"
        average = teacher not in ("DriftingTeacher", "FrozenTeacher")
        return cls(sampling, max(lengths), context + distilled if reads else 0, has_initial, average)


def _bytes(config: Config) -> tuple[int, int, int]:
    """Of a weight, of a number in the computation, and of the copy of a weight that autocast makes at each use."""
    weight = {"float64": 8, "float32": 4, "bfloat16": 2}[config["model.policy.dtype"]]
    compute = min(weight, 2) if "16" in str(config.get("trainer.precision")) else weight
    return weight, compute, compute if compute < weight else 0


def vllm_bytes(shape: Shape, config: Config) -> int:
    """What vLLM needs at least: its weights, the output layer apart from the embedding, and a completion's cache.

    GPUs that share an engine have a part each.
    """
    longest = max(s.prompt + s.completion for s in _Work.of(config, 1).sampling.values())
    cache = 2 * shape.num_layers * shape.key * longest
    whole = _bytes(config)[1] * (shape.num_parameters + (shape.head if shape.tied else 0) + cache)
    return -(-whole // config.get("model.engine.tensor_parallel_size", 1))


def is_sharded(config: Config) -> bool:
    """Whether FSDP2 shards weights, gradients and optimizer state; else each GPU has all of them."""
    return "ModelParallel" in str(config["trainer.strategy"])


def _forward(shape: Shape, config: Config, tokens: int) -> int:
    """Without gradient: a layer, or a chunk of logits."""
    w, c, cast = _bytes(config)
    chunk = min(_CHUNKS["cuda"], tokens * shape.vocab_size) * (max(w, 4) + (c if c < 4 else 0))
    return max(_layer(shape, config, tokens), shape.head * cast + chunk)


def _layer(shape: Shape, config: Config, tokens: int) -> int:
    """Without gradient: the three products of a feed-forward network, and four hidden states."""
    w, c, _ = _bytes(config)
    plain = 3 * c * shape.feed_forward + 4 * w * shape.width
    if "down_proj" in shape.adapted and (a := _adapter_bytes(config)) < 4:  # which reads its input in float32, too
        plain = max(plain, (c + 4 + a) * shape.feed_forward + (4 * w + 2 * c) * shape.width)
    return plain * tokens


def _update(shape: Shape, config: Config, tokens: int) -> int:
    """Forward and backward pass, without weights and their gradients: the largest of three moments."""
    (w, c, cast), recomputes = _bytes(config), config["model.policy.gradient_checkpointing"]
    # For its backward pass a layer keeps of each token: input and output of two norms, at least in float32; of each
    # linear layer's input a copy of its own under autocast; queries, keys, values and output of the attention; of the
    # feed-forward network gate, activation, factor and product. Without recomputation prompts may be read apart from
    # completions (hdpo.policy.packing): weights are then cast twice, and keys and values copied to every query head.
    norms = 2 * (w + max(w, 4)) + (5 * c if cast else 2 * w)
    attention = 2 * (shape.query + (shape.key if recomputes else shape.query))
    layer = (norms * shape.width + c * (attention + 4 * shape.feed_forward)) * tokens
    if shape.adapter:
        layer = _kept_for_adapter(shape, config, attention) * tokens
    layer += (1 if recomputes else 2) * cast * shape.layer
    stream = w * shape.width * tokens
    kept = shape.num_layers * (stream if recomputes else layer)
    # 1. The output layer's gradient, in float32; in 16 bits beside it the weight's cast and a chunk's gradient, with
    # another product's or with that chunk in float32. The last norm keeps its input in float32.
    chunk = min(_CHUNKS["cuda"], tokens * shape.vocab_size)
    beside = shape.head * cast + max(shape.head * c, 4 * chunk) if c < 4 else 0
    output = kept + shape.head * max(4, c) + beside + chunk * c + 2 * stream
    if shape.adapter:
        output = kept + shape.head * cast + chunk * (4 + c if c < 4 else c) + 2 * stream
    output += 4 * shape.width * tokens if w < 4 else 0
    # 2. The last layer. If the output layer is tied, its gradient waits for the embedding's.
    last = kept + (layer if recomputes else 0) + 2 * c * shape.feed_forward * tokens + stream
    if shape.adapter:  # neither the output layer nor the embedding has a gradient
        # Through an adapter in 16 bits the gradient of its input comes in float32.
        widened = "down_proj" in shape.adapted and _adapter_bytes(config) < 4
        last += (4 * shape.feed_forward * widened + 4 * shape.width * (w < 4)) * tokens
        return max(output, last)
    # 3. The embedding's gradient, and its sum with the other one.
    return max(output, last + (shape.head * w if shape.tied else 0), shape.head * w * (3 if shape.tied else 1))


def _kept_for_adapter(shape: Shape, config: Config, attention: int) -> int:
    """Bytes that a layer keeps of each token for its backward pass where an adapter alone is trained.

    Frozen linear layers and norms need no input of theirs. An adapted layer keeps a copy of its input in the dtype of
    the adapter's computation, shared where that is the input's own, and the narrow output of the first matrix.
    """
    (w, c, _), names = _bytes(config), shape.adapted
    a = _adapter_bytes(config)
    first, gated = (len(names & group) for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}))
    shared = a == w
    copies = a * (min(first, 1) + min(gated, 1) if shared else first + gated) * shape.width
    copies += a * shape.query * ("o_proj" in names and not shared) + a * shape.feed_forward * ("down_proj" in names)
    return 2 * max(w, 4) * shape.width + c * (attention + 3 * shape.feed_forward) + copies + a * shape.rank * len(names)


def _adapter_bytes(config: Config) -> int:
    """Of a number in an adapter's computation; it is held in float32, at least."""
    w, c, _ = _bytes(config)
    return c if "16" in str(config.get("trainer.precision")) else max(w, 4)


def _decoding(shape: Shape, config: Config, sampling: _Sampling) -> int:
    """The transformers engine's largest wave, if all of its completions reach their limit together."""
    (_, c, cast), (prompts, samples, prompt, completion) = _bytes(config), sampling
    wave = min(prompts, max(1, config["model.engine.max_sequences"] // samples))
    slots, read = wave * samples * (prompt + completion), wave * prompt
    # Linear layers and their output layer are cast once. One layer's keys are held twice while the cache grows or rows
    # leave it.
    weights = cast * (shape.num_layers * shape.layer + shape.head)
    weights += shape.adapter * (_adapter_bytes(config) % 4)  # a copy in 16 bits
    cache, growing = 2 * shape.num_layers * shape.key * c, slots * shape.key * c
    # A block of logits is held in float32, as log-probabilities, and as a distribution in float64.
    block = 16 * min(_SAMPLE_ELEMENTS["cuda"], wave * samples * shape.vocab_size)
    return weights + max(slots * cache + max(growing, block), read * cache + _layer(shape, config, read))


def memory(shape: Shape, config: Config, devices: int, gpu_bytes: int) -> dict[str, int]:
    """Peak bytes of one GPU in each phase that the run has, without :data:`OVERHEAD`.

    Args:
        shape: of the policy.
        config: of the run.
        devices: number of GPUs.
        gpu_bytes: of one GPU, of which vLLM takes a share.
    """
    (w, c, _), work, sharded = _bytes(config), _Work.of(config, devices), is_sharded(config)
    weights = shape.num_parameters * w
    policy = shape.adapter * max(w, 4) or weights  # what is trained
    ours = -(-policy // devices) if sharded else policy
    states = 2 + config.get("model.optimizer.amsgrad", False)
    if str(config["model.optimizer"]).endswith("SGD"):
        states = config["model.optimizer.momentum"] != 0
    # With an adapter the initial policy is the same weights, and an average another adapter on them.
    always = ours * (1 + states + work.average) + (weights if shape.adapter else ours * work.initial)
    gradients, optimized = policy, ours
    if devices > 1 and not sharded:
        always += policy  # DDP's buckets, in which the gradients may lie
        if config.get("trainer.strategy.gradient_as_bucket_view"):
            gradients = optimized = 0
    # FSDP2 gathers the root (embedding and output layer), which it holds twice meanwhile, and two layers; it computes
    # in the dtype in which it gathers.
    computed, root, gathered = config, 0, 0
    if sharded:
        computed = {
            **config,
            "model.policy.dtype": config.get("model.policy.gather_dtype") or config["model.policy.dtype"],
        }
        g = _bytes(computed)[0]
        root = shape.head * (1 if shape.tied else 2) * g
        gathered = root + 2 * shape.layer * g
        if config["model.update.sync_every_micro_batch"]:  # whole, and once more to be summed, are those of the root
            gradients = ours + 2 * 4 * (shape.head * (1 if shape.tied else 2) + shape.layer)
    if "VLLM" in config["model.engine"]:
        share, kv_cache = config["model.engine.gpu_memory_utilization"], config.get("model.engine.kv_cache_gib")
        share = int(share * gpu_bytes) if kv_cache is None else vllm_bytes(shape, config) + int(kv_cache * GIB)
        # One weight is on its way to it.
        found = dict.fromkeys(work.sampling, always + share + shape.head * (c + (w if sharded else 0)))
        always += 0 if config["model.engine.free_memory_during_update"] else share
    else:
        whole = always + (policy if sharded else 0)
        found = {phase: whole + _decoding(shape, config, sampling) for phase, sampling in work.sampling.items()}
    # A micro-batch holds its bound of tokens, or one sequence that is longer.
    budget = config["model.update.micro_batch_tokens"]
    if work.read:
        found["teacher"] = always + gathered + max(root, _forward(shape, computed, max(budget, work.read)))
    # Gradients are whole on each GPU until the last micro-batch, under FSDP2 too unless they are averaged in each.
    update = _update(shape, computed, max(budget, work.trained))
    found["update"] = always + gradients + gathered + max(root, update)
    if config["model.update.log_gradient_norms"]:  # of the policy losses, and then of what was added to it
        found["update"] = max(found["update"] + ours, always + 3 * ours)
    # Gradients, and unless it is fused (our choice on a GPU) the square roots of all second moments.
    fused, foreach = (config.get(f"model.optimizer.{option}") for option in ("fused", "foreach"))
    found["optimizer"] = always + optimized + (ours if foreach or (fused is False and foreach is None) else 0)
    return found
