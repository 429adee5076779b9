"""Sampling with vLLM, in the training process: an engine with weights of its own that follow the policy's.

The engine starts at the first ``generate``, with the policy's architecture and random weights; each ``generate`` then
compares the policy's weights with those that were streamed last and streams them again if they moved. A sampler that
silently keeps old weights is the best-known failure of this arrangement: here synchronising cannot be forgotten, and
:class:`~hdpo.callbacks.RolloutGeneration` compares log-probabilities after every synchronisation.

vLLM is an extra (``pip install hdpo[vllm]``) and is imported when the engine starts, never before.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hdpo.distributed import all_max, gather_objects, reshard, world_size
from hdpo.errors import ConfigError, TrainingStopped, check_at_least, check_positive
from hdpo.experience import Completions
from hdpo.generation.engine import GenerationEngine, SamplingConfig
from hdpo.generation.isolation import apart_from_training, process_state_kept
from hdpo.generation.vllm_requests import check_lengths, completions_of, requests_of
from hdpo.generation.vllm_start import cache_root, check_expandable_segments, config_folder
from hdpo.generation.vllm_weights import first_rows, weights_all_loaded
from hdpo.generation.weights import named_weights, weights_fingerprint
from hdpo.policy import Policy

if TYPE_CHECKING:
    from vllm import LLM

#: vLLM takes temperatures below 0.01 for 0.01, or for greedy decoding, and refuses those above 2.
_TEMPERATURES = (0.01, 2.0)

#: What vLLM reads from the environment; a value that the user has set stays.
_ENVIRONMENT = {
    # In this process: weights are handed over as tensors, not through a socket.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The trainer's threads share this process; vLLM's own binding would pin them to its cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine(GenerationEngine):
    """Samples with vLLM, colocated with the trainer: one engine per rank.

    A sample depends on its own prompt, seed and the weights. In float32 that holds token for token; in 16 bits vLLM's
    kernels round differently for different batches, unless ``VLLM_BATCH_INVARIANT=1`` is set.

    Args:
        tensor_parallel_size: neighbouring ranks that share one engine; 1 gives each rank its own.
        gpu_memory_utilization: share of the GPU's memory that the engine may take, weights and KV cache together. On a
            CPU it has no meaning.
        kv_cache_gib: size of the KV cache in GiB; null for what ``gpu_memory_utilization`` leaves (on a CPU 1 GiB,
            unless ``VLLM_CPU_KVCACHE_SPACE`` is set).
        dtype: dtype of the engine's weights; ``auto`` is the dtype that the policy computes in (``trainer.precision``).
        enforce_eager: skip compilation and CUDA graphs: a faster start, slower sampling; null for true on a CPU only.
        max_model_len: bound on prompt and completion together, in tokens; null for the policy's own bound.
        max_num_seqs: bound on the completions that are decoded at the same time; fewer than a step has take longer.
        free_memory_during_update: drop weights and KV cache between rollouts and update (vLLM's sleep level 2), and
            stream the weights anew afterwards. Nothing to do on a CPU.
        untie_embeddings: hold the output layer apart from a tied input embedding. vLLM packs the output layer on a
            CPU and keeps the packed OLD weights when it is tied; apart from each other both are updated. Costs
            (vocabulary x width) elements.
        engine_args: further keyword arguments of ``vllm.LLM``, as they are.

    Raises:
        ConfigError: a value outside its range, a combination that cannot work, or vLLM is not installed; the message
            names the key.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        enforce_eager: bool | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 1024,
        free_memory_during_update: bool = True,
        untie_embeddings: bool = True,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        check_at_least(
            1,
            model__engine__tensor_parallel_size=tensor_parallel_size,
            model__engine__max_model_len=max_model_len,
            model__engine__max_num_seqs=max_num_seqs,
        )
        check_positive(model__engine__kv_cache_gib=kv_cache_gib)
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"model.engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        if free_memory_during_update:
            check_expandable_segments(os.environ)
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING is set, but the engine must run in the training process: unset it"
            )
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("hdpo.generation.VLLMEngine needs vLLM: pip install hdpo[vllm]")
        self.tensor_parallel_size = tensor_parallel_size
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.free_memory_during_update = free_memory_during_update
        self.untie_embeddings = untie_embeddings
        self.engine_args = engine_args or {}
        self._llm: LLM | None = None
        self._asleep = False
        self._fingerprint: tuple[int, ...] | None = None
        self._num_syncs = 0

    # ------------------------------------------------------------------ the interface

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        seeds: Tensor,
        sampling: SamplingConfig,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Completions:
        """See :meth:`GenerationEngine.generate`; drafts are ignored.

        Under FSDP2 and tensor parallelism all ranks must call it together.

        Raises:
            ConfigError: a temperature or a length that vLLM would silently change.
        """
        lowest, highest = _TEMPERATURES
        if sampling.temperature != 0 and not lowest <= sampling.temperature <= highest:
            raise ConfigError(
                f"vLLM samples at temperatures from {lowest} to {highest}; the temperature of rollouts or distillation "
                f"is {sampling.temperature}"
            )
        dtype = self._compute_dtype(policy)
        with apart_from_training(policy.device.type):
            llm = self._ready(policy, dtype)
            own = slice(0, len(prompts))
            if self.tensor_parallel_size > 1:
                prompts, seeds, own = self._of_all_sharing_ranks(prompts, seeds)
            check_lengths(prompts, sampling, llm.model_config.max_model_len)
            outputs = llm.generate(*requests_of(prompts, seeds, sampling), use_tqdm=False) if seeds.numel() else []
        num_samples = seeds.shape[1]
        return completions_of(
            outputs[own.start * num_samples : own.stop * num_samples],
            (own.stop - own.start, num_samples),
        )

    def sync_version(self) -> int:
        """Number of times the policy's weights were streamed into the engine."""
        return self._num_syncs

    def held_weights(self) -> dict[str, Tensor]:
        """See :meth:`GenerationEngine.held_weights`; empty where several ranks share the engine."""
        if self._llm is None or self._asleep or self.tensor_parallel_size > 1:
            return {}
        (held,) = self._llm.collective_rpc(first_rows)
        return held

    def release_memory(self) -> None:
        """Give the GPU memory back for the update, if ``free_memory_during_update``."""
        if self._llm is not None and not self._asleep and self._can_sleep():
            self._llm.sleep(level=2)
            # Level 1 would copy weights to the host that are overwritten next; now there are none.
            self._asleep, self._fingerprint = True, None

    def close(self) -> None:
        """Shut the engine down; a later ``generate`` starts it again."""
        if self._llm is None:
            return
        if self._asleep:  # its allocator must own its memory again to free it
            self._llm.wake_up()
        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._asleep, self._fingerprint = None, False, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ weights

    def _ready(self, policy: Policy, dtype: torch.dtype) -> LLM:
        """Return the engine: started, awake, and with the policy's weights."""
        if policy.device.type == "cuda" and (self._llm is None or self._asleep):
            torch.cuda.empty_cache()  # what the update left in torch's cache is not free for the engine
        if self._llm is None:
            self._llm = self._start(policy, dtype)
        if self._asleep:
            # The KV cache last: while weights are streamed, its memory is still free for the gathered parameters.
            self._llm.wake_up(tags=["weights"])
        self._synchronise(policy, dtype)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        return self._llm

    def _synchronise(self, policy: Policy, dtype: torch.dtype) -> None:
        """Stream the policy's weights, unless the engine has them already."""
        assert self._llm is not None, "_start() comes first"
        sharded = reshard(policy)
        fingerprint = weights_fingerprint(policy)
        moved = fingerprint != self._fingerprint
        if sharded or self.tensor_parallel_size > 1:
            # Streaming is then a collective: ranks must agree on it.
            moved = bool(all_max([moved], policy.device)[0])
        if not moved:
            return
        self._fingerprint = None  # until all of the weights have arrived
        weights = named_weights(policy, dtype, untie_embeddings=self.untie_embeddings)
        with weights_all_loaded():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self._llm.reset_prefix_cache():
            raise TrainingStopped(
                "vLLM could not drop its prefix cache after taking over new weights: completions would continue "
                "prompts that the old weights have read"
            )
        self._fingerprint = fingerprint
        self._num_syncs += 1

    def _compute_dtype(self, policy: Policy) -> torch.dtype:
        """The dtype that the policy computes in: autocast's, if active."""
        if self.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype))
        dtype = policy.compute_dtype
        return torch.float32 if dtype == torch.float64 else dtype

    # ------------------------------------------------------------------ start

    def _can_sleep(self) -> bool:
        return self.free_memory_during_update and torch.cuda.is_available()

    def _arguments(self, policy: Policy, dtype: torch.dtype, folder: str) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        on_cpu = policy.device.type == "cpu"
        arguments: dict[str, Any] = {
            "model": folder,
            # The weights come from the policy, before the first token.
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            # A model's generation_config.json may hold top_p and top_k, which would truncate the distribution.
            "generation_config": "vllm",
            # Log-probabilities of the distribution that was sampled, temperature included.
            "logprobs_mode": "processed_logprobs",
            "dtype": str(dtype).removeprefix("torch."),
            "seed": 0,
            "enable_prefix_caching": True,
            # vLLM rewinds a sample's generator after a part of its prompt, which a CPU's generator cannot do.
            "enable_chunked_prefill": not on_cpu,
            "enable_sleep_mode": self._can_sleep(),
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            # With a process group of the trainer's, vLLM forms its groups inside it.
            "distributed_executor_backend": "external_launcher" if dist.is_initialized() else "uni",
        }
        cache = 1.0 if self.kv_cache_gib is None and on_cpu else self.kv_cache_gib
        if cache is not None:
            arguments["kv_cache_memory_bytes"] = int(cache * 2**30)
        taken = sorted(self.engine_args.keys() & arguments.keys())
        if taken:
            raise ConfigError(f"model.engine.engine_args must not hold {', '.join(taken)}: the engine sets them itself")
        return {**arguments, **self.engine_args}

    def _start(self, policy: Policy, dtype: torch.dtype) -> LLM:
        """Start vLLM with the policy's architecture and random weights."""
        if world_size() % self.tensor_parallel_size:
            raise ConfigError(
                f"model.engine.tensor_parallel_size is {self.tensor_parallel_size}, which does not divide the "
                f"{world_size()} processes of this run: neighbouring ranks share an engine"
            )
        if policy.device.type == "cuda" and policy.device.index and not dist.is_initialized():
            raise ConfigError(
                f"vLLM in a single process uses the first visible GPU, but the policy is on {policy.device}: set "
                f"CUDA_VISIBLE_DEVICES={policy.device.index} and trainer.devices to 1"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with process_state_kept():
            from vllm import LLM

            _keep_process_group()
            folder = config_folder(policy.model, untie_embeddings=self.untie_embeddings)
            arguments = self._arguments(policy, dtype, str(folder))
            if dist.is_initialized():
                os.environ["VLLM_CACHE_ROOT"] = str(cache_root() / f"rank-{dist.get_rank()}")
                os.environ["RANK"] = str(dist.get_rank())
                # The launcher's local rank is not the device's index where trainer.devices names devices.
                os.environ["LOCAL_RANK"] = str(policy.device.index or 0)
            return LLM(**arguments)

    def _of_all_sharing_ranks(
        self, prompts: Sequence[Sequence[int]], seeds: Tensor
    ) -> tuple[list[list[int]], Tensor, slice]:
        """Prompts and seeds of all ranks that share this engine, in rank order, and which of them are this rank's."""
        everywhere = gather_objects(([list(p) for p in prompts], seeds))
        place = dist.get_rank() % self.tensor_parallel_size
        first = dist.get_rank() - place
        parts = everywhere[first : first + self.tensor_parallel_size]
        start = sum(len(p) for p, _ in parts[:place])
        all_prompts = [prompt for part, _ in parts for prompt in part]
        return all_prompts, torch.cat([s for _, s in parts]), slice(start, start + len(prompts))


# ---------------------------------------------------------------------- start


def _keep_process_group() -> None:
    """Let vLLM's shutdown end torch.distributed only where vLLM initialised it.

    Its shutdown, which also runs when the engine is garbage collected, destroys the default process group whoever made
    it. The groups that vLLM formed inside the trainer's stay for the next start.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = (lambda: None) if dist.is_initialized() else cleanup_dist_env_and_memory
