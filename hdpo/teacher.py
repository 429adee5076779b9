"""The teacher: which weights read the privileged context (paper, section 3.3).

The teacher gives the token distribution that is distilled. Who samples the privileged rollouts is another choice
(``distillation.sampled_by``).

- drifting: the current weights. The teacher is as good as the policy is, and the same-model bound (Proposition 1) holds
  with its second term at zero.
- frozen: the weights at the start of training.
- ema: an exponential moving average between the two, which the paper leaves unexplored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hdpo.distributed import reshard
from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.policy import Policy, TokenBatch
from hdpo.policy.without_adapter import WithoutAdapter, with_own_adapter

__all__ = ["DriftingTeacher", "EMATeacher", "FrozenTeacher", "Teacher", "teacher_topk"]


class Teacher(nn.Module):
    """Interface of what is distilled from: the weights that read the privileged context.

    A teacher of your own is a subclass with :meth:`policy`; its constructor's arguments become ``init_args``.
    """

    @abstractmethod
    def policy(self, student: Policy) -> Policy:
        """Return the policy that reads the privileged context in this step."""

    def prepare(self, student: Policy, load: Callable[[], Policy]) -> None:
        """Get ready before training, while ``student`` holds the initial weights and is not sharded yet.

        Args:
            student: the policy, with its initial weights.
            load: loads (and, under FSDP2, shards) another copy of the initial policy.
        """

    def update(self, student: Policy) -> None:
        """Follow the student after an optimizer step."""


class DriftingTeacher(Teacher):
    """The current weights: the student teaches itself (paper, section 3.3)."""

    def policy(self, student: Policy) -> Policy:
        """Return the student itself."""
        return student


class FrozenTeacher(Teacher):
    """The weights at the start of training (paper, section 3.3), loaded from the initial policy, not from checkpoints.

    With LoRA they are the student's own weights with the adapter off, and take no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: neither a checkpoint nor the optimizer nor DDP sees it.
        self._holder: tuple[Policy, ...] = ()

    def prepare(self, student: Policy, load: Callable[[], Policy]) -> None:
        """Load the initial policy once."""
        if not self._holder:
            shared = student.has_adapter
            self._holder = (WithoutAdapter(student) if shared else load().requires_grad_(False).eval(),)

    def policy(self, student: Policy) -> Policy:
        """Return the frozen policy, on the student's device and in its dtype: Lightning moves and casts the student."""
        (frozen,) = self._holder
        if (frozen.device, frozen.model.dtype) != (student.device, student.model.dtype):
            frozen.to(student.device, student.model.dtype)
        return frozen


class EMATeacher(Teacher):
    """``teacher <- decay * teacher + (1 - decay) * student`` after each step; a checkpoint holds it.

    It is not in the paper. With LoRA the average is an adapter too, on the student's own base weights; A and B are
    averaged each, not their product.

    Args:
        decay: in [0, 1]; 0 is the drifting and 1 the frozen teacher.

    Raises:
        ConfigError: a decay outside its range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ConfigError(f"model.teacher.decay must be in [0, 1], got {decay}")
        self.decay = decay
        self.average: Policy | None = None

    def prepare(self, student: Policy, load: Callable[[], Policy]) -> None:
        """Start the average at the initial weights."""
        if self.average is None:
            average = with_own_adapter(student) if student.has_adapter else load()
            self.average = average.requires_grad_(False).eval()

    def policy(self, student: Policy) -> Policy:
        """Return the averaged policy."""
        assert self.average is not None, "prepare() comes first"
        return self.average

    @torch.no_grad()
    def update(self, student: Policy) -> None:
        """Move the average towards the student."""
        assert self.average is not None, "prepare() comes first"
        for mean, current in zip(self.average.parameters(), student.parameters(), strict=True):
            if mean is not current:  # weights that both stand on
                mean.lerp_(current.to(mean.dtype), 1.0 - self.decay)


@torch.no_grad()
def teacher_topk(
    teacher: Policy, privileged: Sequences, k: int, *, token_budget: int, num_passes: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's top-k logits at every completion position, given the privileged context.

    Args:
        teacher: the policy that reads the privileged context.
        privileged: N privileged contexts with their completions.
        k: how many logits; capped at the vocabulary's size.
        token_budget: tokens of one forward pass.
        num_passes: number of forward passes that all ranks make (a sharded teacher is a collective); the missing ones
            are made on a dummy token.

    Returns:
        Per sequence the ids ``[length, k]`` int32 and the logits ``[length, k]`` float32.
    """
    k = min(k, teacher.vocab_size)
    num = len(privileged.completion_ids)
    empty = torch.empty(0, k, device=teacher.device)
    ids, logits = [empty.int()] * num, [empty] * num
    groups, layout, _ = teacher.pack(privileged, token_budget)
    for group in groups:
        batch = TokenBatch.from_sequences(privileged.select(group), teacher.device, layout)
        top_ids, top_logits = teacher(batch, topk=k)
        for i, part_ids, part in zip(group, top_ids.split(batch.lengths), top_logits.split(batch.lengths), strict=True):
            ids[i], logits[i] = part_ids, part
    for _ in range((num_passes or 0) - len(groups)):
        teacher(TokenBatch.placeholder(teacher.device), topk=k)
    # An EMA moves the shards: what is left unsharded would hide them.
    reshard(teacher)
    return ids, logits
