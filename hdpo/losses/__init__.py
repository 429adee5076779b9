"""What a step optimises: which rollouts are read, the two losses, and the update."""

from hdpo.losses.divergence import JSD, Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from hdpo.losses.policy_loss import ClippedPolicyLoss, PolicyLoss
from hdpo.losses.update import UpdateConfig

__all__ = [
    "JSD",
    "ClippedPolicyLoss",
    "Divergence",
    "ForwardKL",
    "GeneralizedJSD",
    "PolicyLoss",
    "ReverseKL",
    "UpdateConfig",
]
