"""What vLLM is asked, and what its answers become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hdpo.errors import ConfigError
from hdpo.experience import Completions
from hdpo.generation.engine import SamplingConfig

if TYPE_CHECKING:
    from vllm import RequestOutput


def check_lengths(prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_model_len: int) -> None:
    """Refuse what vLLM would cut off.

    Raises:
        ConfigError: prompt and completion could exceed ``max_model_len`` tokens.
    """
    longest = max(map(len, prompts), default=0)
    if longest + sampling.max_new_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and a completion of up to {sampling.max_new_tokens} exceed the engine's "
            f"{max_model_len} tokens: raise model.engine.max_model_len (up to what the policy was made for), or lower "
            "max_new_tokens of rollouts or distillation, or data.selection.max_{prompt,privileged}_tokens"
        )


def requests_of(
    prompts: Sequence[Sequence[int]], seeds: Tensor, sampling: SamplingConfig
) -> tuple[list[Any], list[Any]]:
    """One request per sample, each with a seed of its own; vLLM's prefix cache reads a group's prompt once."""
    from vllm import SamplingParams

    requests, parameters = [], []
    for prompt, group in zip(prompts, seeds.tolist(), strict=True):
        for seed in group:
            requests.append({"prompt_token_ids": list(prompt)})
            parameters.append(
                SamplingParams(
                    temperature=sampling.temperature,
                    # The full distribution.
                    top_p=1.0,
                    top_k=0,
                    min_p=0.0,
                    seed=seed & (2**63 - 1),  # vLLM takes -1 for no seed
                    max_tokens=sampling.max_new_tokens,
                    stop_token_ids=list(sampling.eos_token_ids),
                    ignore_eos=True,  # the config's, so that ours alone end a completion
                    detokenize=False,
                    logprobs=0,
                    flat_logprobs=True,
                )
            )
    return requests, parameters


def completions_of(outputs: Sequence[RequestOutput], shape: tuple[int, int]) -> Completions:
    """Pad vLLM's answers, one per sample, to ``[N, S, T]``."""
    results = [output.outputs[0] for output in outputs]
    width = max((len(result.token_ids) for result in results), default=1)
    num = len(results)
    ids = torch.zeros(num, width, dtype=torch.int64)
    mask = torch.zeros(num, width, dtype=torch.bool)
    logps = torch.zeros(num, width)
    truncated = torch.zeros(num, dtype=torch.bool)
    for i, result in enumerate(results):
        if result.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {result.finish_reason!r} instead of 'stop' or 'length'")
        length = len(result.token_ids)
        ids[i, :length] = torch.tensor(result.token_ids)
        mask[i, :length] = True
        logps[i, :length] = torch.tensor(result.logprobs.logprobs)
        truncated[i] = result.finish_reason == "length"
    return Completions(
        ids.view(*shape, width),
        mask.view(*shape, width),
        logps.view(*shape, width),
        truncated.view(shape),
    )
