"""The two terms of the combined loss on one micro-batch, as sums over tokens with their statistics.

What a sum is divided by is global over micro-batches and ranks, and therefore the module's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from hdpo.batching import Layout, TokenBatch
from hdpo.experience import DistillationBatch, Statistics
from hdpo.functional import (
    clipped_policy_loss,
    k3_kl,
    sampler_correction,
    token_weights,
    topk_forward_kl_from_logps,
    topk_jsd_from_logps,
    topk_reverse_kl_from_logps,
)
from hdpo.functional.logprobs import SelectedLogProbs
from hdpo.functional.policy_loss import Aggregation
from hdpo.policy import Policy
from hdpo.policy_batch import PolicyBatch

__all__ = ["DistillationTerm", "PolicyTerm"]


@dataclass(frozen=True)
class PolicyTerm:
    """The clipped surrogate of GRPO (Algorithm 1, line 4), and two options that the paper leaves off.

    Attributes:
        temperature: of the rollouts: the loss is about the distribution that they were sampled from.
        aggregation: see :func:`hdpo.functional.token_weights`.
        clip_eps_low: lower clip of the probability ratio.
        clip_eps_high: upper clip.
        kl_coef: weight of KL(policy || initial policy).
        correction: ``truncated`` multiplies each token's loss by min(policy / sampler, threshold).
        correction_threshold: bound on that ratio.
    """

    temperature: float
    aggregation: Aggregation
    clip_eps_low: float
    clip_eps_high: float
    kl_coef: float
    correction: Literal["none", "truncated"]
    correction_threshold: float

    def __call__(
        self,
        student: Policy,
        reference: Policy | None,
        items: PolicyBatch,
        group: list[int],
        layout: Layout,
        stats: Statistics,
    ) -> Tensor:
        """Sum (not mean) over the tokens of one micro-batch.

        Args:
            student: the policy that is trained.
            reference: the initial policy; needed with a KL penalty.
            items: the selected rollouts of this rank.
            group: which of them.
            layout: how they lie in the micro-batch.
            stats: where the loss and what else is measured are added.
        """
        tokens = TokenBatch.from_sequences(items.sequences.select(group), student.device, layout)
        logps = cast(SelectedLogProbs, student(tokens, temperature=self.temperature)).logps[:, 0]
        lengths = torch.tensor(tokens.lengths, device=logps.device)
        weights = token_weights(lengths, self.aggregation) * items.counts[group].repeat_interleave(lengths)
        # With one update a batch the policy that sampled is the policy that is updated: the ratio is exp(0) = 1, its
        # gradient is that of log pi, and no second forward pass is needed for the old log-probabilities.
        old_logps = torch.cat([items.old_logps[i] for i in group]) if items.old_logps else logps.detach()
        corrected = weights
        if self.correction == "truncated":
            corrected = weights * self._ratios(items, group, lengths, old_logps, stats)
        result = clipped_policy_loss(
            logps,
            old_logps,
            items.advantages[group].repeat_interleave(lengths),
            weights=corrected,
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
        )
        loss = result.loss_sum
        stats.add("loss/policy", loss.detach(), 0.0)
        if items.old_logps:
            stats.add("loss/clip_fraction", result.num_clipped, float(result.num_tokens))
            stats.add("loss/ratio", result.ratio_sum, float(result.num_tokens))
        if reference is not None:
            with torch.no_grad():
                ref_logps = cast(SelectedLogProbs, reference(tokens, temperature=self.temperature)).logps[:, 0]
            kl = (k3_kl(logps, ref_logps) * weights).sum()
            stats.add("loss/kl", kl.detach(), float(weights.sum()))
            loss = loss + self.kl_coef * kl
        return loss

    def _ratios(
        self, items: PolicyBatch, group: list[int], lengths: Tensor, old_logps: Tensor, stats: Statistics
    ) -> Tensor:
        """Truncated ratios policy / sampler of the tokens; measures them as they were before."""
        sampler = torch.cat([items.sampler_logps[i] for i in group]).to(old_logps)
        threshold, counts = self.correction_threshold, items.counts[group]
        differences = old_logps - sampler
        by_sequence = torch.stack([part.sum() for part in differences.split(lengths.tolist())])
        for name, values, weights in (
            ("token", differences, counts.repeat_interleave(lengths)),
            ("sequence", by_sequence, counts),
        ):
            ratios = sampler_correction(values, torch.zeros_like(values), math.inf)
            num = float(weights.sum())
            stats.add(f"sampler/{name}_ratio_mean", (ratios * weights).sum(), num)
            stats.add(f"sampler/{name}_ratio_above", ((ratios > threshold) * weights).sum(), num)
            stats.add(f"sampler/{name}_ratio_max", ratios.max())
        return sampler_correction(old_logps, sampler, threshold)


@dataclass(frozen=True)
class DistillationTerm:
    """The divergence between the teacher's truncated and the student's full distribution (Algorithm 1, line 16).

    Attributes:
        divergence: ``jsd``, ``forward_kl`` or ``reverse_kl``.
        jsd_tail: see :func:`hdpo.functional.topk_jsd_from_logps`.
    """

    divergence: Literal["jsd", "forward_kl", "reverse_kl"]
    jsd_tail: Literal["exact", "paper"]

    def __call__(
        self, student: Policy, items: DistillationBatch, group: list[int], layout: Layout, stats: Statistics
    ) -> Tensor:
        """Sum (not mean) over the completion tokens of one micro-batch; arguments as in :class:`PolicyTerm`."""
        tokens = TokenBatch.from_sequences(items.student.select(group), student.device, layout)
        ids = torch.cat([items.topk_ids[i] for i in group]).to(student.device)
        teacher = torch.cat([items.topk_logits[i] for i in group]).to(student.device).log_softmax(-1)
        logps = cast(SelectedLogProbs, student(tokens, ids)).logps
        match self.divergence:
            case "jsd":
                values = topk_jsd_from_logps(logps, teacher, tail=self.jsd_tail)
            case "forward_kl":
                values = topk_forward_kl_from_logps(logps, teacher)
            case _:
                values = topk_reverse_kl_from_logps(logps, teacher)
        counts = torch.tensor([items.counts[i] for i in group], device=values.device)
        counts = counts.repeat_interleave(torch.tensor(tokens.lengths, device=values.device))
        total = (values * counts).sum()
        stats.add("loss/distillation", total.detach(), 0.0)
        stats.add("privileged/student_mass", (logps.detach().exp().sum(-1) * counts).sum(), float(counts.sum()))
        return total
