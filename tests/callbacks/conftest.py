"""A module and a trainer small enough to call stations by hand."""

from types import SimpleNamespace

import pytest
import torch

from hdpo.callbacks import CliffDetection
from hdpo.experience import Completions, Experience, Prompts, Rollouts
from hdpo.functional.random import derive_seeds
from hdpo.losses import JSD, ClippedPolicyLoss, UpdateConfig
from hdpo.policy import pack
from tests.helpers.toy import BoxedVerifier


class ScriptedEngine:
    """Answers prompt [answer] * n with the answer wherever the seed's last bit is set; prompts are one token each."""

    def __init__(self):
        self.calls = []

    def generate(self, policy, prompts, seeds, sampling, drafts=None):
        self.calls.append((list(prompts), seeds.clone(), sampling))
        right = (seeds & 1).bool() if sampling.temperature else torch.ones_like(seeds, dtype=torch.bool)
        ids = torch.tensor([[[p[0] if r else 0] for r in row] for p, row in zip(prompts, right.tolist(), strict=True)])
        ids = ids.reshape(*seeds.shape, 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return Completions(ids, mask, torch.full(ids.shape, -0.5), torch.zeros(seeds.shape, dtype=torch.bool))

    def sync_version(self):
        return 0

    def held_weights(self):
        return {}

    def release_memory(self):
        self.calls.append("released")


class Tokenizer:
    eos_token_id = 1

    def encode(self, text, add_special_tokens):
        return []

    def batch_decode(self, ids, skip_special_tokens):
        return [f"\\boxed{{{i[0]}}}" for i in ids]


class Student(torch.nn.Module):
    eos_token_ids = (1, 3)
    vocab_size = 50

    def pack(self, sequences, token_budget):
        return pack(sequences, token_budget)

    def completion_logps(self, sequences, *, token_budget, temperature):
        return [torch.full((len(ids),), -0.5) for ids in sequences.completion_ids]

    def forward(self, batch, *, topk):
        return torch.zeros(len(batch.targets), topk, dtype=torch.int32), torch.zeros(len(batch.targets), topk)

    device = torch.device("cpu")
    compute_dtype = torch.float32


@pytest.fixture
def module():
    return SimpleNamespace(
        engine=ScriptedEngine(),
        verifier=BoxedVerifier(),
        tokenizer=Tokenizer(),
        student=Student(),
        teacher=SimpleNamespace(policy=lambda student: student),
        device=torch.device("cpu"),
        distillation_weight=1.0,
        privileged_policy_weight=0.0,
        update=UpdateConfig(micro_batch_tokens=64),
        pass_k=(1, 2),
        divergence=JSD(),
        policy_loss=ClippedPolicyLoss(),
        cliffs=CliffDetection(),
        seed=5,
    )


@pytest.fixture
def trainer():
    from contextlib import nullcontext

    return SimpleNamespace(callbacks=[], global_step=7, precision_plugin=SimpleNamespace(forward_context=nullcontext))


@pytest.fixture
def experience():
    """Four prompts with the answers 10 to 13."""
    answers = [10, 11, 12, 13]
    return Experience(
        Prompts(
            index=torch.tensor([4, 5, 6, 7]),
            row=torch.tensor([40, 50, 60, 70]),
            problem=["a", "b", "c", "d"],
            reference=[str(a) for a in answers],
            solution=[f"\\boxed{{{a}}}" for a in answers],
            source=["easy", "hard", "hard", "easy"],
            prompt_ids=[[a] for a in answers],
            privileged_ids=[[a, 9] for a in answers],
            valid=torch.ones(4, dtype=torch.bool),
        )
    )


@pytest.fixture
def scored(experience):
    """The experience with given rewards: two cliffs, a mixed group and a solved one."""

    def fill(rewards, outcomes=None):
        rewards = torch.tensor(rewards)
        shape = (*rewards.shape, 1)
        names = [["correct" if r else "wrong" for r in row] for row in rewards.tolist()]
        experience.rollouts = Rollouts(
            completion_ids=torch.zeros(shape, dtype=torch.long),
            completion_mask=torch.ones(shape, dtype=torch.bool),
            sampler_logps=torch.zeros(shape),
            truncated=torch.zeros(rewards.shape, dtype=torch.bool),
            rewards=rewards,
            outcomes=outcomes or names,
            texts=[["x"] * rewards.shape[1] for _ in rewards],
        )
        return experience

    return fill


@pytest.fixture
def expected_seeds():
    def seeds(seed, purpose, step, index, num):
        return derive_seeds(seed, purpose, step, torch.as_tensor(index)[:, None], torch.arange(num))

    return seeds
