"""The update of one step: select, pack, loss, backward, clip, step (paper, Algorithm 1, lines 4-5 and 15-17).

Losses are sums over tokens divided by denominators that are global over micro-batches and ranks, so that the update
does not depend on how the work is split. Gradients are averaged over ranks in the last backward pass of an update,
unless ``sync_every_micro_batch`` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hdpo.distributed import all_max, all_sum, no_gradient_sync, reshard, world_size
from hdpo.errors import check_at_least, check_positive
from hdpo.experience import DistillationBatch, Experience
from hdpo.losses.divergence import Divergence, distillation_loss
from hdpo.losses.policy_loss import PolicyLoss
from hdpo.losses.selection import PolicyBatch, select_rollouts
from hdpo.measurements import Measurements
from hdpo.policy import Policy, TokenBatch


@dataclass(frozen=True)
class UpdateConfig:
    """How often and in which portions a batch of rollouts updates the policy.

    Attributes:
        num_epochs: passes over one batch of rollouts, each with updates of its own; the paper makes one.
        num_minibatches: updates per pass, each on an equal share of the prompts; the paper makes one. Whatever the
            number of updates, one batch is one step: of the trainer, the learning rate's schedule and the teacher.
        max_grad_norm: gradients are clipped to this norm; null for no clipping.
        micro_batch_tokens: tokens (padding included) of one forward and backward pass on one rank. It changes memory
            and speed, not the result.
        sync_every_micro_batch: average gradients over ranks in every micro-batch, not once per update. Under FSDP2 a
            rank then keeps its share of them instead of all, at the price of more traffic.
        max_skipped_steps: training stops itself after this many steps in a row whose loss or gradient norm was not
            finite. Such a step is skipped: weights, optimizer state, teacher and schedule stay as they are (of several
            updates per batch, those before it stand).
        log_gradient_norms: log the gradient norms of the policy losses and of the distillation separately, before
            clipping. It takes a copy of the gradient, and one more average over ranks.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    num_epochs: int = 1
    num_minibatches: int = 1
    max_grad_norm: float | None = 1.0
    micro_batch_tokens: int = 16384
    sync_every_micro_batch: bool = False
    max_skipped_steps: int = 3
    log_gradient_norms: bool = False

    def __post_init__(self) -> None:
        check_at_least(
            1,
            model__update__num_epochs=self.num_epochs,
            model__update__num_minibatches=self.num_minibatches,
            model__update__micro_batch_tokens=self.micro_batch_tokens,
            model__update__max_skipped_steps=self.max_skipped_steps,
        )
        check_positive(model__update__max_grad_norm=self.max_grad_norm)


class UpdatedModule(Protocol):
    """What the update needs of the LightningModule."""

    update: UpdateConfig
    policy_loss: PolicyLoss
    divergence: Divergence
    distillation_weight: float
    privileged_policy_weight: float
    temperature: float
    privileged_temperature: float
    trainer: Any
    device: torch.device
    student: Policy
    reference_policy: Policy | None
    optimizers: Callable[[], Any]
    manual_backward: Callable[[Tensor], None]


class _Minibatch(NamedTuple):
    """What one update is on.

    Attributes:
        plain: the rollouts of the plain prompts.
        privileged: the privileged rollouts, in their own context; None where that is not trained.
        distilled: what is distilled.
    """

    plain: PolicyBatch
    privileged: PolicyBatch | None
    distilled: DistillationBatch

    @property
    def num_tokens(self) -> int:
        """Completion tokens that are put through the policy."""
        batches = [self.plain] if self.privileged is None else [self.plain, self.privileged]
        parts = [self.distilled.student, *(items.sequences for items in batches)]
        return sum(len(ids) for part in parts for ids in part.completion_ids)


class _MicroBatch(NamedTuple):
    """One forward and backward pass: a function that returns a sum over tokens, and what the sum is multiplied by."""

    total: Callable[[], Tensor]
    scale: float


def update_policy(module: UpdatedModule, batch: Experience) -> bool:
    """Update the policy on a completed experience.

    An update whose loss or gradient norm is not finite on any rank is not made, nor are those after it in this step.
    All ranks decide alike without asking each other: what is not finite on one of them is in the gradient of all.

    Returns:
        Whether every update was made.
    """
    config, measured, optimizer = module.update, batch.measurements, module.optimizers()
    minibatches = [_minibatch(module, batch, part) for part in range(config.num_minibatches)]
    num_updates = config.num_epochs * config.num_minibatches
    if num_updates > 1:
        for minibatch in minibatches:
            minibatch.plain.old_logps = _current_logps(module, minibatch.plain, module.temperature)
            if minibatch.privileged is not None:
                minibatch.privileged.old_logps = _current_logps(
                    module, minibatch.privileged, module.privileged_temperature
                )
    finite = True
    for number in range(num_updates):
        optimizer.zero_grad()
        minibatch = minibatches[number % config.num_minibatches]
        measured.add("speed/update", minibatch.num_tokens, 0.0)
        policy_losses = _policy_losses(module, minibatch, measured)
        _backward(module, policy_losses, _distillation_losses(module, minibatch.distilled, measured), measured)
        norm = _clip(module.student, config.max_grad_norm)
        measured.add("optim/grad_norm", norm)
        finite = bool(norm.isfinite())
        if not finite:
            optimizer.zero_grad()  # an optimizer leaves parameters without gradient, and their state, as they are
        if not finite or number + 1 == num_updates:
            optimizer.step()  # the one that the trainer counts
            break
        module.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        # Autocast may hold copies of the weights from before, and the next update is in the same autocast block.
        torch.clear_autocast_cache()
    torch.clear_autocast_cache()
    if module.reference_policy is not None:
        reshard(module.reference_policy)
    measured.add("optim/skipped", float(not finite))
    return finite


def _minibatch(module: UpdatedModule, batch: Experience, part: int) -> _Minibatch:
    """What one update is on: of the prompts, and of the distilled rollouts' prompts, every num_minibatches-th.

    They are counted in the GLOBAL batch. So minibatches hold the same prompts on any number of ranks, and about equally
    many of each rank.
    """

    def members(index: Sequence[int]) -> list[int]:
        return [position for position, i in enumerate(index) if i % module.update.num_minibatches == part]

    prompts, rollouts, off_policy = batch.prompts, batch.rollouts, batch.off_policy
    assert rollouts is not None, "RolloutGeneration completes the experience first"
    index = prompts.index.tolist()
    chosen = members(index)
    plain = select_rollouts(
        rollouts.select(chosen),
        [prompts.prompt_ids[i] for i in chosen],
        module.policy_loss,
        None if off_policy is None else off_policy.select(chosen),
    )
    privileged = None
    if module.privileged_policy_weight > 0 and batch.privileged is not None:
        positions = batch.privileged.positions
        own = members([index[i] for i in positions])
        contexts = [prompts.privileged_ids[positions[i]] for i in own]
        privileged = select_rollouts(batch.privileged.rollouts.select(own), contexts, module.policy_loss, with_kl=False)
    distilled = batch.distillation or DistillationBatch.empty()
    return _Minibatch(plain, privileged, distilled.select(members(distilled.index)))


def _current_logps(module: UpdatedModule, items: PolicyBatch, temperature: float) -> list[Tensor]:
    """Log-probabilities of the selected rollouts under the current weights, without gradient."""
    budget = module.update.micro_batch_tokens
    (num_passes,) = all_max([len(module.student.pack(items.sequences, budget).groups)], module.device)
    return module.student.completion_logps(
        items.sequences, token_budget=budget, temperature=temperature, num_passes=int(num_passes)
    )


def _policy_losses(module: UpdatedModule, minibatch: _Minibatch, measured: Measurements) -> list[_MicroBatch]:
    """The micro-batches of the policy loss, on plain prompts and where it is wanted on privileged ones.

    A token of a privileged rollout weighs ``privileged_policy_weight`` times as much as one of a plain rollout: both
    sums are divided by the plain rollouts' denominator, or where none of their tokens counts by the privileged ones'.
    """
    plain, privileged = minibatch.plain, minibatch.privileged
    own = 0.0 if privileged is None else privileged.denominator
    denominator, own = all_sum([plain.denominator, own], module.device)
    scale = 1.0 / max(denominator or own, 1.0)
    # Every rank adds its own counts: the merged mean is then (global sum) / (global count).
    measured.add("loss/policy", 0.0, plain.denominator)
    losses = _of_one_kind(module, plain, "policy", module.temperature, module.reference_policy, scale, measured)
    if privileged is not None:
        measured.add("loss/privileged_policy", 0.0, plain.denominator if denominator else privileged.denominator)
        scale *= module.privileged_policy_weight
        temperature = module.privileged_temperature
        losses += _of_one_kind(module, privileged, "privileged_policy", temperature, None, scale, measured)
    return losses


def _of_one_kind(
    module: UpdatedModule,
    items: PolicyBatch,
    name: str,
    temperature: float,
    reference: Policy | None,
    scale: float,
    measured: Measurements,
) -> list[_MicroBatch]:
    """The micro-batches of one policy loss, not computed yet."""
    student = module.student
    packing = student.pack(items.sequences, module.update.micro_batch_tokens)
    loss = partial(
        module.policy_loss,
        student,
        reference,
        items,
        layout=packing.layout,
        temperature=temperature,
        measured=measured,
        name=name,
    )
    losses = [_MicroBatch(partial(loss, group=group), scale) for group in packing.groups]
    return _even(module, losses, partial(_empty_loss, student, reference))


def _distillation_losses(
    module: UpdatedModule, distilled: DistillationBatch, measured: Measurements
) -> list[_MicroBatch]:
    """The micro-batches of the distillation loss, not computed yet."""
    student = module.student
    packing = student.pack(distilled.student, module.update.micro_batch_tokens)
    (num_tokens,) = all_sum([distilled.num_tokens], module.device)
    if num_tokens:
        measured.add("loss/distillation", 0.0, distilled.num_tokens)
    losses = [
        _MicroBatch(
            partial(distillation_loss, module.divergence, student, distilled, group, packing.layout, measured),
            module.distillation_weight / max(num_tokens, 1.0),
        )
        for group in packing.groups
    ]
    return _even(module, losses, partial(_empty_loss, student))


def _even(module: UpdatedModule, losses: list[_MicroBatch], empty: Callable[[], Tensor]) -> list[_MicroBatch]:
    """As many micro-batches on all ranks: a forward pass of a sharded policy or reference is a collective."""
    (most,) = all_max([len(losses)], module.device)
    return losses + [_MicroBatch(empty, 1.0)] * (int(most) - len(losses))


def _empty_loss(student: Policy, reference: Policy | None = None) -> Tensor:
    """A zero that is connected to every parameter, after the forward passes that the other ranks make."""
    tokens = TokenBatch.placeholder(student.device)
    loss: Tensor = student(tokens).sum() * 0.0
    if reference is not None:
        with torch.no_grad():
            reference(tokens)
    return loss


def _backward(
    module: UpdatedModule, policy: list[_MicroBatch], distillation: list[_MicroBatch], measured: Measurements
) -> None:
    """Add up the gradients of all micro-batches; the last one averages them over ranks."""
    if not policy and not distillation:
        # Parameters without any gradient would be left out of momentum and weight decay.
        policy = [_MicroBatch(partial(_empty_loss, module.student), 1.0)]
    apart = module.update.log_gradient_norms and bool(policy and distillation)
    losses = policy + distillation
    for i, item in enumerate(losses):
        loss = item.total() * item.scale
        # A factor of 1, or NaN: a loss that is not finite may have a finite gradient, and only gradients are shared.
        loss = loss * (loss.detach() * 0 + 1)
        averaged = module.update.sync_every_micro_batch or i == len(losses) - 1 or (apart and i == len(policy) - 1)
        with nullcontext() if averaged else no_gradient_sync(module.trainer.strategy, module.student):
            # DDP and FSDP2 average gradients over ranks; the denominators are global already.
            module.manual_backward(loss * world_size())
        if apart and i == len(policy) - 1:
            first = [None if p.grad is None else p.grad.detach().clone() for p in module.student.parameters()]
    if module.update.log_gradient_norms:
        total = [p.grad for p in module.student.parameters() if p.grad is not None]
        if apart:
            kept = [g for g in first if g is not None]
            measured.add("optim/grad_norm_policy", _norm(kept))
            measured.add("optim/grad_norm_distillation", _norm([t - f for t, f in zip(total, kept, strict=True)]))
        else:
            measured.add(f"optim/grad_norm_{'distillation' if distillation else 'policy'}", _norm(total))


def _norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, over all ranks that share them."""
    return _whole(nn.utils.get_total_norm(gradients))


def _whole(norm: Tensor) -> Tensor:
    full = getattr(norm, "full_tensor", None)  # a DTensor under FSDP2
    whole: Tensor = norm if full is None else full()
    return whole


def _clip(policy: Policy, max_norm: float | None) -> Tensor:
    """Clip the gradients to a norm; returns the one before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), float("inf") if max_norm is None else max_norm)
    return _whole(norm)
