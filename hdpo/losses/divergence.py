"""The distance between teacher and student, as an object that a configuration names (``model.divergence``)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import get_args

import torch
from torch import Tensor

from hdpo.errors import ConfigError, check_choice
from hdpo.experience import DistillationBatch
from hdpo.functional import (
    Tail,
    topk_forward_kl_from_logps,
    topk_generalized_jsd_from_logps,
    topk_jsd_from_logps,
    topk_reverse_kl_from_logps,
)
from hdpo.measurements import Measurements
from hdpo.policy import Policy, TokenBatch
from hdpo.policy.packing import Layout, on_device

RARE = 0.01
"""Probability below which a distilled token is counted as one that the student would hardly write."""


class Divergence(ABC):
    """Distance of the student's full distribution from the teacher's truncated one, per token.

    A divergence of your own is a subclass with ``__call__``; its constructor's arguments become ``init_args``.

    Attributes:
        largest: upper bound in nats; None where there is none.
    """

    largest: float | None = None

    @abstractmethod
    def __call__(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """Return the divergence at each token.

        Args:
            student_logps: ``[M, k]`` log-probabilities (nats) at the teacher's k most likely tokens, normalised over
                the whole vocabulary, with gradient.
            teacher_logps: ``[M, k]`` the teacher's, normalised over the k tokens.

        Returns:
            ``[M]`` nats, differentiable in ``student_logps``.
        """


class JSD(Divergence):
    """Jensen-Shannon divergence (paper, section 3.3 and Algorithm 1, line 16).

    Args:
        tail: what the student's mass outside the teacher's top k adds: ``exact`` (1/2 ln 2 per unit of mass), or the
            ``paper``'s printed factor, which is twice that.

    Raises:
        ConfigError: another tail.
    """

    largest = math.log(2)

    def __init__(self, tail: Tail = "exact") -> None:
        check_choice("model.divergence.tail", tail, get_args(Tail))
        self.tail: Tail = tail
        if tail == "paper":
            self.largest = 1.5 * math.log(2)

    def __call__(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """See :func:`hdpo.functional.topk_jsd_from_logps`."""
        return topk_jsd_from_logps(student_logps, teacher_logps, tail=self.tail)


class GeneralizedJSD(Divergence):
    """The JSD with another mixture than half and half (generalised knowledge distillation, arXiv 2306.13649).

    Args:
        teacher_weight: b of the mixture ``b * teacher + (1 - b) * student``, in (0, 1); 1/2 is the JSD. The smaller b,
            the less the gradient vanishes where the student has almost no mass on the teacher's token; the loss shrinks
            by about b, so raise ``model.distillation_weight`` accordingly.

    Raises:
        ConfigError: a weight outside (0, 1).
    """

    def __init__(self, teacher_weight: float = 0.5) -> None:
        if not 0 < teacher_weight < 1:
            raise ConfigError(f"model.divergence.teacher_weight must be between 0 and 1, got {teacher_weight}")
        self.teacher_weight = teacher_weight

    def __call__(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """See :func:`hdpo.functional.topk_generalized_jsd_from_logps`."""
        return topk_generalized_jsd_from_logps(student_logps, teacher_logps, teacher_weight=self.teacher_weight)


class ForwardKL(Divergence):
    """KL(teacher || student): its gradient does not vanish where the student has almost no mass on a teacher's token.

    With ``distillation.target: token`` it is the cross-entropy of supervised learning.
    """

    def __call__(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """See :func:`hdpo.functional.topk_forward_kl_from_logps`."""
        return topk_forward_kl_from_logps(student_logps, teacher_logps)


class ReverseKL(Divergence):
    """KL(student || teacher), both conditioned on the teacher's top k tokens: no gradient moves mass onto these."""

    def __call__(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """See :func:`hdpo.functional.topk_reverse_kl_from_logps`."""
        return topk_reverse_kl_from_logps(student_logps, teacher_logps)


def distillation_loss(
    divergence: Divergence,
    student: Policy,
    items: DistillationBatch,
    group: list[int],
    layout: Layout,
    measured: Measurements,
) -> Tensor:
    """Sum (not mean) of the divergence over the completion tokens of one micro-batch (Algorithm 1, line 16).

    Args:
        divergence: between teacher and student.
        student: the policy that is trained.
        items: the kept privileged rollouts of this rank, with the teacher's logits.
        group: which of them.
        layout: how they lie in the micro-batch.
        measured: where the loss, the student's mass on the teacher's tokens and its probability of the distilled ones
            are added.
    """
    tokens = TokenBatch.from_sequences(items.student.select(group), student.device, layout)
    ids = torch.cat([items.topk_ids[i] for i in group]).to(student.device)
    teacher = torch.cat([items.topk_logits[i] for i in group]).to(student.device).log_softmax(-1)
    logps, written = student(tokens, torch.cat([ids, tokens.targets[:, None].to(ids)], -1)).split([ids.shape[1], 1], -1)
    by_token = [items.counts[i] for i, n in zip(group, tokens.lengths, strict=True) for _ in range(n)]
    counts = on_device(by_token, logps.device)
    total = (divergence(logps, teacher) * counts).sum()
    measured.add("loss/distillation", total, 0.0)
    num, probability = float(sum(by_token)), written.detach()[:, 0].exp()
    measured.add("privileged/student_mass", (logps.detach().exp().sum(-1) * counts).sum(), num)
    measured.add("privileged/token_probability", (probability * counts).sum(), num)
    measured.add("privileged/rare_tokens", ((probability < RARE) * counts).sum(), num)
    return total
