"""What `export` writes is what vLLM loads from disk: the way from training to serving."""

import importlib.util

import pytest
import torch

from hdpo.commands.export import export_checkpoint
from hdpo.experience import Sequences
from hdpo.generation.isolation import process_state_kept
from hdpo.generation.vllm import _ENVIRONMENT
from hdpo.policy import Policy, PolicyConfig
from tests.helpers import toy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

LAB = PolicyConfig(path="pkg://hdpo.lab/policy")


def test_an_exported_checkpoint_has_the_log_probs_that_were_trained(tmp_path, monkeypatch):
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run = toy.trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trained = toy.module(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    run.fit(trained, toy.datamodule(tmp_path))
    run.save_checkpoint(tmp_path / "two.ckpt")
    export_checkpoint(LAB, tmp_path / "two.ckpt", tmp_path / "exported")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(8, 300, (n,), generator=generator).tolist() for n in (5, 40, 17, 1)]

    with process_state_kept():
        from vllm import LLM, SamplingParams

        served = LLM(
            str(tmp_path / "exported"),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            kv_cache_memory_bytes=2**28,
            distributed_executor_backend="uni",
        )
    try:
        outputs = served.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=20, seed=1, logprobs=0, detokenize=False),
            use_tqdm=False,
        )
    finally:
        served.llm_engine.engine_core.shutdown()
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    theirs = [
        torch.tensor([entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)])
        for output, tokens in zip(outputs, ids, strict=True)
    ]
    for policy, equal in ((trained.student, True), (Policy.load(LAB), False)):
        ours = policy.completion_logps(Sequences(prompts, ids), token_budget=4096)
        gap = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        assert (gap < 1e-4) == equal, gap
