"""The policy's weights, for sampling: cast once, or for an engine with weights of its own: moved?, and a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hdpo.policy import Policy

#: Bound on the elements that are summed at once, since a sum of 16-bit numbers in 64 bits needs a copy.
_FINGERPRINT_ELEMENTS = 1 << 24

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(policy: Policy) -> tuple[int, ...]:
    """A checksum of each parameter's bits (of this rank's shard, under FSDP2).

    The version counters of autograd would be cheaper, but not everything that writes weights moves them: PyTorch's own
    fused optimizers do not, nor do writes to ``.data`` and the kernels of third-party optimizers.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> size = dict(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> policy = Policy(Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **size)))
        >>> before = weights_fingerprint(policy)
        >>> policy.model.lm_head.weight.data[0, 0] += 1e-6
        >>> sum(a != b for a, b in zip(before, weights_fingerprint(policy)))
        1
    """
    sums = []
    for parameter in policy.own_parameters():
        to_local = getattr(parameter, "to_local", None)  # a DTensor under FSDP2
        values = (parameter if to_local is None else to_local()).detach().contiguous().flatten()
        parts = values.view(_INTEGERS[values.element_size()]).split(_FINGERPRINT_ELEMENTS)
        sums.append(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum())
    return tuple(torch.stack(sums).tolist())


@contextmanager
def cast_weights(policy: Policy) -> Iterator[None]:
    """Hold weights and biases of linear layers in autocast's dtype inside the block, where autocast is active.

    Autocast would cast each of them at every use, for decoding at every token; the values are the same. Norms and the
    embedding stay, so that the residual stream has the dtype that it has in training; an output layer that is tied to
    the embedding gets a copy of its own.
    """
    dtype, kept, active = policy.compute_dtype, [], torch.is_autocast_enabled(policy.device.type)
    try:
        for module in [m for m in policy.model.modules() if active and isinstance(m, nn.Linear)]:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype == torch.float32:
                    kept.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter)


@torch.no_grad()
def named_weights(
    policy: Policy, dtype: torch.dtype, *, untie_embeddings: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Stream the policy's weights under their checkpoint names, one unsharded tensor at a time; an adapter is merged.

    Args:
        policy: whose weights; under FSDP2 this is a collective, to be exhausted on all ranks.
        dtype: what each tensor is cast to.
        untie_embeddings: name the output layer too where it is tied to the input embeddings.

    Yields:
        Name and tensor, on the policy's device; without sharding and cast it shares the policy's memory.
    """
    seen = set()
    for name, parameter in policy.named_weights():
        seen.add(name)
        yield name, _whole(parameter.detach().to(dtype))
    if untie_embeddings:
        head = policy.model.get_output_embeddings()
        name = next(n for n, module in policy.model.named_modules() if module is head) + ".weight"
        if name not in seen:
            yield name, _whole(head.weight.detach().to(dtype))


@torch.no_grad()
def weight_rows(policy: Policy, name: str, num_rows: int) -> Tensor:
    """Return the first rows of one of the policy's parameters; under FSDP2 a collective."""
    return _whole(policy.weight(name).detach())[:num_rows]


def _whole(tensor: Tensor) -> Tensor:
    """Gather what FSDP2 has sharded; whoever casts first gathers fewer bytes."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor
    whole: Tensor = tensor if full_tensor is None else full_tensor()
    return whole
