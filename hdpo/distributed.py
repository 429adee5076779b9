"""Everything that knows of more than one process: sums over ranks, gathered objects, FSDP2 sharding.

All functions work without a process group too (they are then the identity), so that callers need no special case.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from hdpo.errors import ConfigError
from hdpo.measurements import Measurements

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hdpo.policy import Policy

SHARDED_ADAPTER = "model.policy.lora cannot be sharded by FSDP2: take --config strategy/ddp, or set it to null"
"""Said where a configuration asks for both."""


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if _active() else 0


def _reduce(values: Sequence[float], device: torch.device, op: Any) -> list[float]:
    if not _active():
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=op)
    return [float(v) for v in tensor.tolist()]


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64 (token counts stay exact)."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def all_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Maximum of each value over all ranks."""
    return _reduce(values, device, dist.ReduceOp.MAX)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on every rank."""
    if not _active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def in_turns() -> Iterator[None]:
    """Let the processes of one machine run the block one after another; all processes must come here.

    What takes much of the machine's memory for a while, and little after it, is then taken once, not once per process.
    """
    machines = gather_objects(platform.node())
    turn, num_turns = machines[: rank()].count(platform.node()), max(map(machines.count, machines))
    for _ in range(turn):
        dist.barrier()
    try:
        yield
    finally:
        for _ in range(num_turns - turn if _active() else 0):
            dist.barrier()


def merged_means(measurements: Measurements) -> dict[str, float]:
    """Means, totals and maxima over the observations of all ranks; the names may differ from rank to rank."""
    merged = Measurements()
    for items in gather_objects(measurements.items()):
        merged.merge(items)
    return merged.means()


def decoder_layers(backbone: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers of a model; empty where it has no list of modules."""
    lists = (m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0)
    return next(lists, torch.nn.ModuleList())


def shard_policy(policy: Policy, mesh: DeviceMesh | None, gather_dtype: str | None = None) -> None:
    """Shard a policy with FSDP2: each decoder layer is a unit, embeddings and output layer belong to the root.

    The root must be the :class:`~hdpo.policy.Policy` itself, since its ``forward`` applies the output layer.

    Args:
        policy: on any device.
        mesh: of one dimension; None to leave the policy whole.
        gather_dtype: of :class:`~hdpo.policy.PolicyConfig`.

    Raises:
        ConfigError: the policy has an adapter, or it stays whole and has a dtype to be gathered in.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh is None:
        if gather_dtype is not None:
            raise ConfigError("model.policy.gather_dtype is for FSDP2: set it to null, or take --config strategy/fsdp2")
        return
    if policy.has_adapter:
        raise ConfigError(SHARDED_ADAPTER)

    precision = MixedPrecisionPolicy()
    if gather_dtype is not None:
        precision = MixedPrecisionPolicy(param_dtype=getattr(torch, gather_dtype), reduce_dtype=torch.float32)
    layers = decoder_layers(policy.backbone)
    units: list[Any] = [fully_shard(module, mesh=mesh, mp_policy=precision) for module in (*layers, policy)]
    # By default a backward pass gathers weights ahead in the reverse order of all forward passes since the last one,
    # those without gradient included. Their number differs from rank to rank (a rank without cliffs decodes no
    # privileged rollouts), so that ranks would wait for different weights. With a fixed order it depends on nothing;
    # what comes before the first layer is the root, which is gathered then and costs nothing.
    for unit, before in zip(units, [units[-1], *units[:-1]], strict=True):
        unit.set_modules_to_backward_prefetch([before])


def _sharded_units(policy: torch.nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in policy.modules() if isinstance(m, FSDPModule)]


def reshard(policy: torch.nn.Module) -> bool:
    """Forget the forward passes without gradient of an FSDP2 policy; without FSDP2 this does nothing.

    The root keeps its unsharded parameters after a forward pass, for the backward pass. After one without gradient they
    would stay: a full copy of embeddings and output layer, and changes made to it would be lost.

    Returns:
        Whether the policy is sharded at all.
    """
    units = _sharded_units(policy)
    for unit in units:
        unit.reshard()
    # It also keeps a note of every forward pass (in decoding: every token) until the next backward pass. Versions of
    # torch before 2.13 cannot be told to drop them; they take memory, and no more.
    if units and (reset := getattr(policy, "reset_iter_state", None)) is not None:
        with suppress(AttributeError):  # before the first forward pass FSDP2 has no state, and nothing to forget
            reset()
    return bool(units)


@contextmanager
def no_gradient_sync(strategy: Any, policy: torch.nn.Module) -> Iterator[None]:
    """Let backward passes accumulate gradients on this rank only, until one outside of this block averages them.

    Args:
        strategy: Lightning's; DDP brings a block of its own.
        policy: where it is sharded with FSDP2, gradients stay unsharded inside the block.
    """
    units = _sharded_units(policy)
    block = getattr(strategy, "block_backward_sync", None)
    if not units:
        with block() if block is not None else nullcontext():
            yield
        return
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return unsharded weights on the CPU; under FSDP2 a collective that leaves them on the first rank only."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


@contextmanager
def gathered_parameters(policy: Policy) -> Iterator[None]:
    """Hold all parameters of an FSDP2 policy unsharded; without FSDP2 this does nothing.

    Ranks decode different numbers of tokens. If every forward pass gathered its weights, the rank that finishes first
    would leave the others waiting for a collective that never comes.
    """
    units = _sharded_units(policy)
    if units:
        # Decoding enters below the root. The first module that runs declares itself the root of all, and FSDP2 has no
        # public way to say beforehand which one it is.
        cast(Any, policy)._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # FSDP2 never reshards the root after its forward pass: the backward pass needs it first.
            unit.set_reshard_after_forward(unit is not policy, recurse=False)
        reshard(policy)
