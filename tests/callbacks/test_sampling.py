"""Sampling and grading: what goes to the engine and the verifier, and where each answer ends up."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hdpo.callbacks.sampling import graded, sample, sample_seeds, sampling_config
from hdpo.experience import Completions
from hdpo.functional.random import Purpose, derive_seeds
from hdpo.generation.engine import SamplingConfig
from hdpo.measurements import Measurements
from hdpo.rewards import Grade, Outcome, Verifier


class Watching(Verifier):
    """Keeps what it was asked, and gives each completion a reward and an outcome of its own."""

    def __init__(self):
        self.asked = []

    def grade(self, completions, references, **columns):
        self.asked.append((list(completions), list(references), {k: list(v) for k, v in columns.items()}))
        outcomes = [Outcome.CORRECT, Outcome.ERROR, Outcome.WRONG]
        return [Grade(outcomes[i % 3], i / 10, parts={"number": i}) for i in range(len(completions))]

    def usable(self, references, **columns):
        return [True for _ in references]


def completions():
    """Two samples for each of three prompts."""
    ids = torch.tensor([[[10, 1], [11, 0]], [[12, 1], [13, 0]], [[14, 14], [15, 1]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 0]], [[1, 1], [1, 1]]]).bool()
    logps = -torch.arange(12.0).view(3, 2, 2)
    return Completions(ids, mask, logps, torch.tensor([[False, True], [False, True], [True, False]]))


class Words:
    """Decodes ids to their numbers; 1 is a special token."""

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(i) for i in row if i != 1) for row in ids]


TEXTS = ["10", "11", "12", "13", "14 14", "15"]


@pytest.mark.parametrize("positions", [None, [3, 0, 2]])
def test_each_completion_is_graded_with_its_own_prompts_columns(module, experience, positions):
    prompts, measured, sampled = experience.prompts, Measurements(), completions()
    prompts.columns = {"tests": ["ta", "tb", "tc", "td"], "unit": [1, 2, 3, 4]}
    module.verifier, module.tokenizer = Watching(), Words()
    rollouts = graded(module, sampled, prompts, measured, positions)
    ((texts, references, columns),) = module.verifier.asked
    which = [i for i in positions or [0, 1, 2] for _ in range(2)]
    assert texts == TEXTS
    assert references == [prompts.reference[i] for i in which]
    assert columns == {
        "prompts": [prompts.problem[i] for i in which],
        "tests": [prompts.columns["tests"][i] for i in which],
        "unit": [prompts.columns["unit"][i] for i in which],
    }
    torch.testing.assert_close(rollouts.rewards, torch.arange(6.0).view(3, 2) / 10)
    assert rollouts.outcomes == [["correct", "error"], ["wrong", "correct"], ["error", "wrong"]]
    assert rollouts.texts == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
    assert rollouts.parts == [[{"number": i}, {"number": i + 1}] for i in (0, 2, 4)]
    assert rollouts.success.tolist() == [[True, False], [False, True], [False, False]]
    assert torch.equal(rollouts.completion_ids, sampled.ids)
    assert torch.equal(rollouts.completion_mask, sampled.mask)
    assert torch.equal(rollouts.sampler_logps, sampled.logps)
    assert torch.equal(rollouts.truncated, sampled.truncated)
    means = measured.means()
    speed = means.pop("speed/scoring")
    assert speed * means["time/scoring"] == pytest.approx(sampled.mask.sum()), "completion tokens per second"
    assert {k: v for k, v in means.items() if k != "time/scoring"} == {
        "verifier/correct": 2, "verifier/error": 2, "verifier/wrong": 2
    }  # fmt: skip
    assert means["time/scoring"] >= 0


def test_nothing_to_grade(module, experience):
    none = Completions(*(torch.zeros(0, 2, 1, dtype=torch.long) for _ in range(3)), torch.zeros(0, 2).bool())
    rollouts = graded(module, none, experience.prompts, Measurements(), [])
    assert rollouts.rewards.shape == (0, 2)
    assert rollouts.texts == rollouts.outcomes == []


def test_a_completion_ends_at_any_token_that_ends_one(module):
    module.student.eos_token_ids, module.tokenizer.eos_token_id = (7, 4), 9
    assert sampling_config(module, 12, 0.5) == SamplingConfig(12, 0.5, (4, 7, 9))


def test_seeds_are_those_of_run_purpose_step_prompt_and_sample(module):
    seeds = sample_seeds(module, Purpose.PRIVILEGED, 9, torch.tensor([4, 2]), 3)
    for row, prompt in enumerate((4, 2)):
        for k in range(3):
            assert seeds[row, k] == derive_seeds(5, Purpose.PRIVILEGED, 9, prompt, k)


@pytest.mark.parametrize("drafts", [None, [], ["the solution", ""]])
def test_an_engine_samples_in_the_trainers_precision_with_drafts_as_tokens(module, drafts):
    entered, given = [], []

    @contextmanager
    def forward_context():
        entered.append("in")
        yield
        entered.append("out")

    def generate(policy, prompts, seeds, sampling, guesses):
        entered.append("generate")
        given.append((policy, prompts, seeds, sampling, guesses))
        return SimpleNamespace(cpu=lambda: completions)

    seeds = torch.zeros(2, 3, dtype=torch.int64)
    completions = SimpleNamespace(mask=torch.ones(2, 3, 5, dtype=torch.bool))
    module.engine.generate = generate
    module.tokenizer.encode = lambda text, add_special_tokens: [len(text), int(add_special_tokens)]
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=forward_context))
    measured = Measurements()
    found = sample(trainer, module, [[1], [2]], seeds, "sampling", measured, "privileged", drafts)
    assert found is completions
    assert entered == ["in", "generate", "out"]
    assert given == [(module.student, [[1], [2]], seeds, "sampling", [[12, 0], [0, 0]] if drafts else None)]
    means = measured.means()
    assert means.pop("speed/privileged") * means.pop("time/privileged") == pytest.approx(30)
    assert means == {"spent/completions": 6, "spent/tokens": 30}
    sample(trainer, module, [[1], [2]], seeds, "sampling", measured, "privileged", drafts, policy="another")
    assert given[1][0] == "another"
