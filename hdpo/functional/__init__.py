"""Pure tensor mathematics of HDPO; needs torch and nothing else."""

from hdpo.functional.advantages import AdvantageScale, group_advantages, has_variance
from hdpo.functional.logprobs import selected_logps, topk_logits
from hdpo.functional.pass_at_k import any_of_k, pass_at_k
from hdpo.functional.random import Purpose, derive_seeds, uniform
from hdpo.functional.surrogate import (
    Aggregation,
    ClippedSurrogate,
    clipped_surrogate,
    k3_kl,
    loss_denominator,
    sampler_correction,
    token_weights,
)
from hdpo.functional.topk_divergence import (
    Tail,
    topk_forward_kl,
    topk_forward_kl_from_logps,
    topk_generalized_jsd_from_logps,
    topk_jsd,
    topk_jsd_from_logps,
    topk_reverse_kl,
    topk_reverse_kl_from_logps,
)

__all__ = [
    "AdvantageScale",
    "Aggregation",
    "ClippedSurrogate",
    "Purpose",
    "Tail",
    "any_of_k",
    "clipped_surrogate",
    "derive_seeds",
    "group_advantages",
    "has_variance",
    "k3_kl",
    "loss_denominator",
    "pass_at_k",
    "sampler_correction",
    "selected_logps",
    "token_weights",
    "topk_forward_kl",
    "topk_forward_kl_from_logps",
    "topk_generalized_jsd_from_logps",
    "topk_jsd",
    "topk_jsd_from_logps",
    "topk_logits",
    "topk_reverse_kl",
    "topk_reverse_kl_from_logps",
    "uniform",
]
