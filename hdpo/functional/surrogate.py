"""The clipped policy-gradient loss (Algorithm 1, line 4), and its companions, one number per token.

Nothing here adds up or divides. The caller sums over tokens, micro-batches and ranks and divides once by a count that
is global, so that the gradient does not depend on how the batch was split. All functions are elementwise over tokens
and take any shape; training uses the flat vector ``[M]`` of all completion tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence"]
"""What has equal weight in the loss: each token of the batch, or each sequence."""

# exp() of a larger difference of log-probabilities overflows float32 and turns one broken token into a NaN of the whole
# batch; a ratio of e^20 = 5e8 is as broken, but finite.
_MAX_LOG_RATIO = 20.0


class ClippedSurrogate(NamedTuple):
    """The clipped surrogate of each token.

    Attributes:
        losses: with gradient; sum them (weighted by :func:`token_weights`) and divide by :func:`loss_denominator`.
        ratios: probability ratios new / old, without gradient; 1 on policy.
        clipped: bool, True where the clip removed the gradient.
    """

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {', '.join(get_args(Aggregation))}, got {aggregation!r}")


def token_weights(lengths: Tensor, aggregation: Aggregation = "token") -> Tensor:
    """The weight of each token in the loss's sum, for all tokens of all sequences one after another.

    Args:
        lengths: ``[n]`` integers, number of trained tokens of each sequence.
        aggregation: ``"token"``: every token counts the same (weight 1; the paper's choice). ``"sequence"``: every
            sequence counts the same (weight 1 / length).

    Returns:
        ``[M]`` float32 with M = ``lengths.sum()``.

    Raises:
        ValueError: the aggregation is unknown.

    Example:
        >>> token_weights(torch.tensor([1, 2]), "sequence")
        tensor([1.0000, 0.5000, 0.5000])
    """
    _check_aggregation(aggregation)
    per_sequence = torch.ones(lengths.shape, device=lengths.device)
    if aggregation == "sequence":
        # A sequence without tokens repeats its weight zero times; the clamp only avoids 1 / 0.
        per_sequence = per_sequence / lengths.clamp(min=1)
    return per_sequence.repeat_interleave(lengths)


def loss_denominator(lengths: Tensor, aggregation: Aggregation = "token") -> Tensor:
    """What a sum weighted by :func:`token_weights` is divided by, after adding up over micro-batches and ranks.

    Rollouts whose advantage is 0 add nothing to the sum and need no forward pass, but they belong to the count (unless
    zero-variance groups are to be left out): pass the lengths of all rollouts.

    Args:
        lengths: ``[n]`` integers, number of trained tokens of each sequence.
        aggregation: ``"token"``: the number of tokens. ``"sequence"``: the number of sequences with tokens.

    Returns:
        An integer scalar.

    Raises:
        ValueError: the aggregation is unknown.

    Example:
        >>> loss_denominator(torch.tensor([3, 0, 5])), loss_denominator(torch.tensor([3, 0, 5]), "sequence")
        (tensor(8), tensor(2))
    """
    _check_aggregation(aggregation)
    return lengths.sum() if aggregation == "token" else (lengths > 0).sum()


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2
) -> ClippedSurrogate:
    r"""PPO's clipped surrogate (Schulman et al., 2017, eq. 7), negated (Algorithm 1, line 4).

    .. math:: -\min\bigl(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A_t\bigr),
              \qquad \rho_t = \pi_\theta(y_t) / \pi_{old}(y_t)

    Args:
        logps: log-probabilities (nats) of the sampled tokens under the current weights, any shape.
        old_logps: the same under the weights that sampled them, same shape. With one update per batch these are
            ``logps.detach()``: all ratios are 1 and the gradient is that of REINFORCE.
        advantages: broadcastable to ``logps``.
        clip_eps_low: the ratio's lower limit is 1 - ``clip_eps_low``; in [0, 1].
        clip_eps_high: the ratio's upper limit is 1 + ``clip_eps_high``; at least 0.

    Returns:
        One number per token, see :class:`ClippedSurrogate`.

    Raises:
        ValueError: a clip range is out of bounds, or the shapes of ``logps`` and ``old_logps`` differ.

    Example:
        >>> logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        >>> loss = clipped_surrogate(logps, logps.detach(), torch.tensor([1.0, 1.0, -2.0]))
        >>> loss.losses.mean().backward()
        >>> logps.grad  # minus the advantage, over the number of tokens
        tensor([-0.3333, -0.3333,  0.6667])
    """
    if not 0 <= clip_eps_low <= 1:
        raise ValueError(f"clip_eps_low must be in [0, 1], got {clip_eps_low}")
    if not clip_eps_high >= 0:
        raise ValueError(f"clip_eps_high must not be negative, got {clip_eps_high}")
    if logps.shape != old_logps.shape:
        raise ValueError(
            f"logps and old_logps must have one shape, got {list(logps.shape)} and {list(old_logps.shape)}"
        )
    ratio = (logps - old_logps.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    low, high = 1 - clip_eps_low, 1 + clip_eps_high
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    return ClippedSurrogate(losses, ratio.detach(), clipped)


def k3_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""Per-token estimate of KL(policy || reference) from the policy's own samples (Schulman's k3).

    .. math:: \frac{\pi_{ref}(y)}{\pi_\theta(y)} - \ln \frac{\pi_{ref}(y)}{\pi_\theta(y)} - 1 \ge 0

    Its expectation under the policy is the KL divergence, and every term is non-negative. The paper runs without it.

    Args:
        logps: log-probabilities (nats) of the sampled tokens under the policy, any shape.
        ref_logps: the same under the reference; no gradient flows into it.

    Returns:
        Nats, one number per token, differentiable in ``logps``.

    Example:
        >>> k3_kl(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
        tensor([0.0000, 0.3679])
    """
    log_ratio = (ref_logps.detach() - logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    # expm1 keeps the digits of a tiny divergence.
    return log_ratio.expm1() - log_ratio


def sampler_correction(logps: Tensor, sampler_logps: Tensor, threshold: float = 2.0) -> Tensor:
    """Truncated importance ratio min(trainer / sampler, threshold) for tokens drawn by another implementation.

    A sampler with other kernels or precision draws from a slightly different distribution than the one the trainer
    differentiates. Multiplying the loss by this ratio corrects for it; the threshold bounds the variance.

    Args:
        logps: log-probabilities (nats) of the sampled tokens from the trainer, any shape.
        sampler_logps: the same as the sampler reported them.
        threshold: largest ratio, > 0.

    Returns:
        Ratios in (0, threshold], without gradient.

    Raises:
        ValueError: the threshold is not positive.

    Example:
        >>> sampler_correction(torch.tensor([-1.0, -1.0]), torch.tensor([-0.9, -3.0]))
        tensor([0.9048, 2.0000])
    """
    if threshold <= 0:
        raise ValueError(f"the sampler correction's threshold must be positive, got {threshold}")
    log_ratio = (logps.detach() - sampler_logps.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=threshold)
