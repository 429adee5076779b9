r"""Divergences between a teacher that is known on its k most likely tokens and a student over the whole vocabulary.

Throughout, S is the set of the teacher's top k tokens, P the teacher renormalised over S, Q the student over the full
vocabulary (never renormalised, except where a function says so). Each divergence comes in two forms:

- from the student's logits ``[..., V]``: simple, for small vocabularies, tests and notebooks;
- ``*_from_logps``, from the student's log-probabilities at the teacher's tokens alone, ``[..., k]``: what training
  uses, since no ``[tokens, vocabulary]`` tensor ever exists (see :func:`hdpo.functional.selected_logps`).

Temperatures are applied to the logits before they come here. All results are in nats; half precision is computed in
float32. The teacher carries no gradient (Algorithm 1, line 16).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Tail = Literal["exact", "paper"]
"""How the student's mass outside the teacher's tokens is weighed; see :func:`topk_jsd`."""

_LN2 = math.log(2.0)
# exp() of it is 0 in every dtype, yet differences of it are finite: stands for log 0 where -inf would make NaNs.
_LOG_ZERO = -1e4


def _student_logps(student_logits: Tensor, teacher_topk_logits: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """Log-probabilities of the full student at the teacher's tokens, ``[..., k]``."""
    if teacher_topk_logits.shape != teacher_topk_ids.shape:
        shapes = f"{list(teacher_topk_logits.shape)} and {list(teacher_topk_ids.shape)}"
        raise ValueError(f"teacher_topk_logits and teacher_topk_ids must have one shape [..., k], got {shapes}")
    if student_logits.shape[:-1] != teacher_topk_ids.shape[:-1]:
        shapes = f"{list(student_logits.shape)} and {list(teacher_topk_ids.shape)}"
        raise ValueError(
            f"student_logits [..., V] and teacher_topk_ids [..., k] must agree before V and k, got {shapes}"
        )
    if teacher_topk_ids.shape[-1] > student_logits.shape[-1]:
        sizes = f"{teacher_topk_ids.shape[-1]} > {student_logits.shape[-1]}"
        raise ValueError(f"the teacher's top k must not exceed the vocabulary, got k = {sizes} = V")
    return _full_precision(student_logits).log_softmax(-1).gather(-1, teacher_topk_ids.long())


def _teacher_logps(teacher_topk_logits: Tensor) -> Tensor:
    return _full_precision(teacher_topk_logits.detach()).log_softmax(-1)


def _full_precision(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def topk_jsd_from_logps(student_topk_logps: Tensor, teacher_topk_logps: Tensor, *, tail: Tail = "exact") -> Tensor:
    r"""Jensen-Shannon divergence from log-probabilities at the teacher's tokens (section 3.3, Algorithm 1 line 16).

    .. math:: JSD = \tfrac12 \sum_{S} P \ln\frac{P}{M} + \tfrac12 \sum_{S} Q \ln\frac{Q}{M}
              + \tfrac12 \ln 2 \cdot \Bigl(1 - \sum_S Q\Bigr), \qquad M = \tfrac12 (P + Q)

    The last term is what the student's mass outside S adds: there P = 0, hence ln(Q / M) = ln 2. With
    ``tail="exact"`` the result is the JSD of P and Q over the whole vocabulary, between 0 and ln 2.

    Args:
        student_topk_logps: log Q at the teacher's tokens, ``[..., k]``, nats, normalised over the whole vocabulary.
        teacher_topk_logps: log P, ``[..., k]``, nats, normalised over the k tokens: ``logits.log_softmax(-1)``. A token
            may be impossible (``-inf``).
        tail: ``"exact"``, or ``"paper"`` for the factor 1 instead of 1/2 in the last term, as the paper prints it: no
            longer a JSD, and up to 3/2 ln 2.

    Returns:
        ``[...]`` nats, differentiable in ``student_topk_logps``; the gradient is finite for any student.

    Raises:
        ValueError: the shapes differ, or the tail is unknown.

    Example:
        >>> student = torch.tensor([0.4, 0.4, 0.2]).log()  # over three tokens, of which the teacher reports two
        >>> teacher = torch.tensor([0.5, 0.5]).log()
        >>> topk_jsd_from_logps(student[:2], teacher)
        tensor(0.0749)
    """
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, got {tail!r}")
    _check_logps(student_topk_logps, teacher_topk_logps)
    log_q = _full_precision(student_topk_logps).clamp(min=_LOG_ZERO)
    log_p = _full_precision(teacher_topk_logps.detach()).clamp(min=_LOG_ZERO)
    p, q = log_p.exp(), log_q.exp()
    # ln(P / M) = ln 2 + ln(P / (P + Q)), and the latter is a log-sigmoid of ln P - ln Q: no division, no underflow.
    difference = log_p - log_q
    divergence = 0.5 * (p * (_LN2 + logsigmoid(difference)) + q * (_LN2 + logsigmoid(-difference))).sum(-1)
    return divergence + (0.5 if tail == "exact" else 1.0) * _LN2 * _outside(q)


def _outside(q: Tensor) -> Tensor:
    """The student's mass outside S."""
    outside = 1 - q.sum(-1)
    # Rounding can make it negative. Only the value is clamped: clamping the gradient too would drop the tail's share of
    # it wherever the student puts (nearly) all its mass on S.
    return outside + (outside.clamp(min=0) - outside).detach()


def topk_jsd(
    student_logits: Tensor, teacher_topk_logits: Tensor, teacher_topk_ids: Tensor, *, tail: Tail = "exact"
) -> Tensor:
    """Jensen-Shannon divergence between the teacher's renormalised top k and the full student (section 3.3).

    See :func:`topk_jsd_from_logps` for the formula. With k = V it is the dense JSD.

    Args:
        student_logits: ``[..., V]``.
        teacher_topk_logits: ``[..., k]``.
        teacher_topk_ids: ``[..., k]`` integers in [0, V), distinct along the last axis.
        tail: ``"exact"`` or ``"paper"``.

    Returns:
        ``[...]`` nats, in [0, ln 2] with the exact tail; differentiable in the student's logits only.

    Raises:
        ValueError: the shapes do not fit together, k > V, or the tail is unknown.

    Example:
        >>> logits = torch.tensor([2.0, 1.0, 0.0])
        >>> topk_jsd(logits, logits[:2], torch.tensor([0, 1]))
        tensor(0.0323)
        >>> round(topk_jsd(logits, logits, torch.tensor([0, 1, 2])).item(), 6)
        0.0
    """
    student = _student_logps(student_logits, teacher_topk_logits, teacher_topk_ids)
    return topk_jsd_from_logps(student, _teacher_logps(teacher_topk_logits), tail=tail)


def topk_generalized_jsd_from_logps(
    student_topk_logps: Tensor, teacher_topk_logps: Tensor, *, teacher_weight: float
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence with another mixture than half and half (Agarwal et al. 2024, GKD).

    .. math:: b \sum_S P \ln\frac{P}{M} + (1-b) \sum_S Q \ln\frac{Q}{M}
              + (1-b) \ln\frac{1}{1-b} \Bigl(1 - \sum_S Q\Bigr), \qquad M = b P + (1-b) Q

    With b = 1/2 it is the JSD. Divided by b it tends to KL(P || Q) as b goes to 0, whose gradient stays where the
    student has almost no mass; divided by 1 - b it tends to KL(Q || P) as b goes to 1.

    Args:
        student_topk_logps: log Q at the teacher's tokens, ``[..., k]``, nats, normalised over the whole vocabulary.
        teacher_topk_logps: log P, ``[..., k]``, nats, normalised over the k tokens; may hold ``-inf``.
        teacher_weight: b, in (0, 1).

    Returns:
        ``[...]`` nats, between 0 and the entropy of (b, 1 - b); differentiable in ``student_topk_logps``.

    Raises:
        ValueError: the shapes differ, or the weight is not in (0, 1).

    Example:
        >>> student = torch.tensor([0.4, 0.4, 0.2]).log()
        >>> topk_generalized_jsd_from_logps(student[:2], torch.tensor([0.5, 0.5]).log(), teacher_weight=0.5)
        tensor(0.0749)
    """
    if not 0 < teacher_weight < 1:
        raise ValueError(f"teacher_weight must be between 0 and 1, got {teacher_weight}")
    _check_logps(student_topk_logps, teacher_topk_logps)
    b = teacher_weight
    log_q = _full_precision(student_topk_logps).clamp(min=_LOG_ZERO)
    log_p = _full_precision(teacher_topk_logps.detach()).clamp(min=_LOG_ZERO)
    log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log1p(-b))
    inside = b * log_p.exp() * (log_p - log_m) + (1 - b) * log_q.exp() * (log_q - log_m)
    return inside.sum(-1) - (1 - b) * math.log1p(-b) * _outside(log_q.exp())


def topk_forward_kl_from_logps(student_topk_logps: Tensor, teacher_topk_logps: Tensor) -> Tensor:
    r"""KL(P || Q) of the truncated teacher from the full student: :math:`\sum_S P (\ln P - \ln Q)`.

    P has no mass outside S, so nothing is missing from the sum. It is finite wherever the student's logits are, and
    unlike the JSD's its gradient does not vanish where the student has almost no mass on the teacher's tokens.

    Args:
        student_topk_logps: log Q at the teacher's tokens, ``[..., k]``, nats, normalised over the whole vocabulary.
        teacher_topk_logps: log P, ``[..., k]``, nats, normalised over the k tokens; may hold ``-inf``.

    Returns:
        ``[...]`` nats, at least 0.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> student = torch.tensor([0.4, 0.4, 0.2]).log()
        >>> topk_forward_kl_from_logps(student[:2], torch.tensor([0.5, 0.5]).log())
        tensor(0.2231)
    """
    _check_logps(student_topk_logps, teacher_topk_logps)
    log_p = _full_precision(teacher_topk_logps.detach())
    possible = log_p > -torch.inf
    # 0 * ln 0 = 0, and its gradient too: impossible tokens are taken out before the product.
    difference = torch.where(possible, log_p, 0.0) - torch.where(possible, _full_precision(student_topk_logps), 0.0)
    return (log_p.exp() * difference).sum(-1)


def topk_forward_kl(student_logits: Tensor, teacher_topk_logits: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """KL(P || Q) of the teacher's renormalised top k from the full student; see :func:`topk_forward_kl_from_logps`.

    Args:
        student_logits: ``[..., V]``.
        teacher_topk_logits: ``[..., k]``.
        teacher_topk_ids: ``[..., k]`` integers in [0, V), distinct along the last axis.

    Returns:
        ``[...]`` nats, at least 0; differentiable in the student's logits only.

    Raises:
        ValueError: the shapes do not fit together, or k > V.

    Example:
        >>> logits = torch.tensor([2.0, 1.0, 0.0])
        >>> topk_forward_kl(logits, logits[:2], torch.tensor([0, 1]))
        tensor(0.0943)
    """
    student = _student_logps(student_logits, teacher_topk_logits, teacher_topk_ids)
    return topk_forward_kl_from_logps(student, _teacher_logps(teacher_topk_logits))


def topk_reverse_kl_from_logps(student_topk_logps: Tensor, teacher_topk_logps: Tensor) -> Tensor:
    r"""KL( Q(. | S) || P ), the student CONDITIONED on the teacher's tokens from the truncated teacher.

    KL(Q || P) itself is infinite for every student with mass outside S, since P is 0 there. This one compares the two
    within S, where it is finite by construction. The price: it says nothing about how much mass the student has on S,
    and gives no gradient that would move mass there.

    Args:
        student_topk_logps: log Q at the teacher's tokens, ``[..., k]``, nats; renormalised here.
        teacher_topk_logps: log P, ``[..., k]``, nats, normalised over the k tokens. A token that is impossible for the
            teacher (``-inf``) does not belong to S.

    Returns:
        ``[...]`` nats, at least 0.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> student = torch.tensor([0.6, 0.2, 0.2]).log()
        >>> topk_reverse_kl_from_logps(student[:2], torch.tensor([0.5, 0.5]).log())
        tensor(0.1308)
    """
    _check_logps(student_topk_logps, teacher_topk_logps)
    log_p = _full_precision(teacher_topk_logps.detach())
    impossible = log_p == -torch.inf
    log_q = _full_precision(student_topk_logps).clamp(min=_LOG_ZERO).masked_fill(impossible, 2 * _LOG_ZERO)
    conditional = log_q.log_softmax(-1)
    return (conditional.exp() * (conditional - log_p.masked_fill(impossible, 0.0))).sum(-1)


def topk_reverse_kl(student_logits: Tensor, teacher_topk_logits: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """KL( Q(. | S) || P ), student conditioned on the teacher's top k; see :func:`topk_reverse_kl_from_logps`.

    Args:
        student_logits: ``[..., V]``.
        teacher_topk_logits: ``[..., k]``.
        teacher_topk_ids: ``[..., k]`` integers in [0, V), distinct along the last axis.

    Returns:
        ``[...]`` nats, at least 0; differentiable in the student's logits only.

    Raises:
        ValueError: the shapes do not fit together, or k > V.

    Example:
        >>> student = torch.tensor([2.0, 1.0, 9.0])
        >>> topk_reverse_kl(student, torch.tensor([1.0, 1.0]), torch.tensor([0, 1]))
        tensor(0.1109)
    """
    student = _student_logps(student_logits, teacher_topk_logits, teacher_topk_ids)
    return topk_reverse_kl_from_logps(student, _teacher_logps(teacher_topk_logits))


def _check_logps(student_topk_logps: Tensor, teacher_topk_logps: Tensor) -> None:
    if student_topk_logps.shape != teacher_topk_logps.shape:
        shapes = f"{list(student_topk_logps.shape)} and {list(teacher_topk_logps.shape)}"
        raise ValueError(f"student_topk_logps and teacher_topk_logps must have one shape [..., k], got {shapes}")
