"""The policy-gradient loss of a step, as an object that a configuration names (``model.policy_loss``)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from hdpo.errors import ConfigError, check_at_least, check_choice, check_positive
from hdpo.functional import (
    AdvantageScale,
    Aggregation,
    clipped_surrogate,
    group_advantages,
    k3_kl,
    sampler_correction,
    token_weights,
)
from hdpo.measurements import Measurements
from hdpo.policy import Policy, TokenBatch
from hdpo.policy.packing import Layout, on_device

if TYPE_CHECKING:
    from hdpo.losses.selection import PolicyBatch

Correction = Literal["none", "truncated"]


class PolicyLoss(ABC):
    """Group-relative policy gradient; a loss of your own is a subclass with :meth:`token_losses`.

    Which rollouts are put through the policy follows from :meth:`advantages` and the options
    (:mod:`hdpo.losses.selection`); what is common to all policy losses (weights of tokens, the sampler's correction,
    the KL penalty) is computed here.

    Args:
        advantage_scale: what group advantages are divided by: the group's ``std``, ``none`` (1), or
            ``leave_one_out_std`` (defective; only for parity with the paper's code base).
        aggregation: mean over all ``token``s of the step (paper) or over ``sequence``s of their token means.
        mask_truncated: leave completions that hit the token limit out of loss and denominator.
        count_zero_variance: whether tokens of groups without variance count in the denominator (paper: yes).
        kl_coef: weight of the k3 estimate of KL(policy || initial policy); the paper uses 0.
        sampler_correction: ``truncated`` multiplies each token's loss by min(policy / sampler, threshold), for an
            engine whose probabilities differ from the policy's; ``none`` is the paper.
        sampler_correction_threshold: bound on that ratio.
        off_policy_shaping: gamma of LUFFY's shaping ``p / (p + gamma)`` of the probability p of a token that the policy
            did not write (arXiv 2504.14945, section 3.2); of use with ``cliffs.reference_in_group``.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        advantage_scale: AdvantageScale = "std",
        aggregation: Aggregation = "token",
        mask_truncated: bool = False,
        count_zero_variance: bool = True,
        kl_coef: float = 0.0,
        sampler_correction: Correction = "none",
        sampler_correction_threshold: float = 2.0,
        off_policy_shaping: float = 0.1,
    ) -> None:
        check_choice("model.policy_loss.advantage_scale", advantage_scale, get_args(AdvantageScale))
        check_choice("model.policy_loss.aggregation", aggregation, get_args(Aggregation))
        check_choice("model.policy_loss.sampler_correction", sampler_correction, get_args(Correction))
        check_at_least(0, model__policy_loss__kl_coef=kl_coef)
        check_positive(
            model__policy_loss__sampler_correction_threshold=sampler_correction_threshold,
            model__policy_loss__off_policy_shaping=off_policy_shaping,
        )
        self.advantage_scale: AdvantageScale = advantage_scale
        self.aggregation: Aggregation = aggregation
        self.mask_truncated = mask_truncated
        self.count_zero_variance = count_zero_variance
        self.kl_coef = kl_coef
        self.sampler_correction = sampler_correction
        self.sampler_correction_threshold = sampler_correction_threshold
        self.off_policy_shaping = off_policy_shaping

    def advantages(self, rewards: Tensor, valid: Tensor) -> Tensor:
        """Return the advantages of K rollouts per prompt; exactly 0 means that a rollout has no gradient.

        Args:
            rewards: ``[B, K]``.
            valid: ``[B, K]`` bool, False where the verifier came to no verdict, so that there is no reward.
        """
        return group_advantages(rewards, valid, scale=self.advantage_scale)

    @abstractmethod
    def token_losses(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each token, to be minimised, and what else is worth a curve.

        Args:
            logps: ``[M]`` log-probabilities (nats) of the sampled tokens under the current weights.
            old_logps: ``[M]`` the same under the weights before the step's first update, without gradient.
            advantages: ``[M]``, that of its rollout for each token.

        Returns:
            Losses ``[M]`` with gradient in ``logps``, and name -> ``[M]``: their means over tokens are logged as
            ``loss/<name>`` where a batch has several updates (else the ratio is 1 everywhere).
        """

    def __call__(
        self,
        student: Policy,
        reference: Policy | None,
        items: PolicyBatch,
        group: list[int],
        layout: Layout,
        temperature: float,
        measured: Measurements,
        name: str = "policy",
    ) -> Tensor:
        """Sum (not mean) over the tokens of one micro-batch.

        Args:
            student: the policy that is trained.
            reference: the initial policy; needed with a KL penalty.
            items: the selected rollouts of this rank.
            group: which of them.
            layout: how they lie in the micro-batch.
            temperature: of the rollouts: the loss is about the distribution that they were sampled from.
            measured: where the loss and what else is measured are added.
            name: of the loss; of ``policy`` more is measured than its value.
        """
        tokens = TokenBatch.from_sequences(items.sequences.select(group), student.device, layout)
        logps = student(tokens, temperature=temperature)
        device, lengths = logps.device, torch.tensor(tokens.lengths)
        by_token = partial(_by_token, group=group, lengths=lengths, device=device)
        counts = by_token(items.counts)
        weights = on_device(token_weights(lengths, self.aggregation), device) * counts
        # With one update per batch the policy that sampled is the policy that is updated: the ratio is exp(0) = 1, its
        # gradient is that of log pi, and no second forward pass is needed for the old log-probabilities.
        old_logps = torch.cat([items.old_logps[i] for i in group]) if items.old_logps else logps.detach()
        advantages = by_token(items.advantages)
        losses, others = self.token_losses(logps, old_logps, advantages)
        written = None if items.off_policy is None else ~by_token(items.off_policy)
        if written is not None:
            shaped = logps.exp() / (logps.exp() + self.off_policy_shaping)
            losses = torch.where(written, losses, -advantages * shaped)
        corrected = weights
        if self.sampler_correction == "truncated":
            sampler = on_device(torch.cat([items.sampler_logps[i] for i in group]), device).to(old_logps)
            if written is not None:  # what was not sampled has no sampler to be corrected for
                sampler = sampler.where(written, old_logps)
            by_sequence = on_device(items.counts[group], device)
            self._measure_ratios(old_logps - sampler, counts, by_sequence, tokens.lengths, measured)
            corrected = weights * sampler_correction(old_logps, sampler, self.sampler_correction_threshold)
        loss = (losses * corrected).sum()
        measured.add(f"loss/{name}", loss, 0.0)
        if items.old_logps and name == "policy":
            own = counts if written is None else counts * written
            for other, values in others.items():
                measured.add(f"loss/{other}", (values * own).sum(), own.sum())
        if reference is not None:
            with torch.no_grad():
                ref_logps = reference(tokens, temperature=temperature)
            kl_weights = weights if written is None else weights * written
            kl = (k3_kl(logps, ref_logps) * kl_weights).sum()
            measured.add("loss/kl", kl, weights.sum())  # what the gradient divides by
            loss = loss + self.kl_coef * kl
        return loss

    def _measure_ratios(
        self, differences: Tensor, counts: Tensor, by_sequence: Tensor, lengths: list[int], measured: Measurements
    ) -> None:
        """Measure the ratios policy / sampler of tokens and sequences, before they are truncated.

        Args:
            differences: ``[M]`` of the log-probabilities.
            counts: ``[M]``, how many equal ones each token stands for.
            by_sequence: ``[n]``, the same of each sequence.
            lengths: of the n sequences.
            measured: where they are added.
        """
        sums = torch.stack([part.sum() for part in differences.split(lengths)])
        for name, values, weights in (("token", differences, counts), ("sequence", sums, by_sequence)):
            ratios, num = sampler_correction(values, torch.zeros_like(values), math.inf), weights.sum()
            measured.add(f"sampler/{name}_ratio_mean", (ratios * weights).sum(), num)
            above = ratios > self.sampler_correction_threshold
            measured.add(f"sampler/{name}_ratio_above", (above * weights).sum(), num)
            measured.add(f"sampler/{name}_ratio_max", ratios.max())


def _by_token(values: Tensor, group: list[int], lengths: Tensor, device: torch.device) -> Tensor:
    """For each token of a micro-batch the value of its sequence, which is on the CPU."""
    return on_device(values[group].repeat_interleave(lengths), device)


class ClippedPolicyLoss(PolicyLoss):
    """PPO's clipped surrogate on GRPO's advantages (paper, Algorithm 1, line 4).

    Args:
        clip_eps_low: lower clip of the probability ratio, 1 - clip_eps_low; in [0, 1].
        clip_eps_high: upper clip, 1 + clip_eps_high; at least 0.
        options: see :class:`PolicyLoss`.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(self, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= clip_eps_low <= 1:
            raise ConfigError(f"model.policy_loss.clip_eps_low must be in [0, 1], got {clip_eps_low}")
        check_at_least(0, model__policy_loss__clip_eps_high=clip_eps_high)
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high

    def token_losses(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PolicyLoss.token_losses`."""
        losses, ratios, clipped = clipped_surrogate(
            logps, old_logps, advantages, clip_eps_low=self.clip_eps_low, clip_eps_high=self.clip_eps_high
        )
        return losses, {"clip_fraction": clipped, "ratio": ratios}
