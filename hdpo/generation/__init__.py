"""The engines that sample completions from the policy."""

from hdpo.generation.engine import GenerationEngine, SamplingConfig
from hdpo.generation.transformers import TransformersEngine
from hdpo.generation.vllm import VLLMEngine

__all__ = ["GenerationEngine", "SamplingConfig", "TransformersEngine", "VLLMEngine"]
