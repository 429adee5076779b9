"""The policy: a causal language model that is read token by token, and how sequences are laid out for it."""

from hdpo.policy.loading import PolicyConfig, load_tokenizer
from hdpo.policy.lora import LoRAConfig
from hdpo.policy.packing import Packing, TokenBatch, pack
from hdpo.policy.policy import Policy

__all__ = ["LoRAConfig", "Packing", "Policy", "PolicyConfig", "TokenBatch", "load_tokenizer", "pack"]
