"""The distillation loss of a micro-batch against its formula, written out one token at a time in float64."""

import math

import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.experience import DistillationBatch, Sequences
from hdpo.losses import JSD, ForwardKL, GeneralizedJSD, ReverseKL
from hdpo.losses.divergence import distillation_loss
from hdpo.measurements import Measurements
from tests.helpers.models import VOCAB, random_ids, random_policy
from tests.helpers.reference import Reference

K, GROUP = 5, [2, 0]
TOLERANCE = 1e-12


def jsd(p, q, tail):
    """Over the whole vocabulary; ``p`` is 0 outside of the top k."""
    m = (p + q) / 2
    inside = p > 0
    value = 0.5 * (p[inside] * (p[inside] / m[inside]).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    return value + (0.5 * math.log(2) * q[~inside].sum() if tail == "paper" else 0)


def forward_kl(p, q):
    return (p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum()


def reverse_kl(p, q):
    inside = q[p > 0] / q[p > 0].sum()
    return (inside * (inside / p[p > 0]).log()).sum()


def generalized(p, q, b):
    m = b * p + (1 - b) * q
    inside = p > 0
    return b * (p[inside] * (p[inside] / m[inside]).log()).sum() + (1 - b) * (q * (q / m).log()).sum()


DIVERGENCES = {
    "generalized": (GeneralizedJSD(0.2), lambda p, q: generalized(p, q, 0.2)),
    "jsd": (JSD(), lambda p, q: jsd(p, q, "exact")),
    "jsd, paper": (JSD("paper"), lambda p, q: jsd(p, q, "paper")),
    "forward": (ForwardKL(), forward_kl),
    "reverse": (ReverseKL(), reverse_kl),
}


@pytest.fixture
def items():
    """Three kept rollouts, with a teacher's logits that are not normalised."""
    completions, generator = random_ids((3, 5, 4)), torch.Generator().manual_seed(4)
    return DistillationBatch(
        Sequences(random_ids((4, 2, 6), seed=2), completions),
        Sequences(random_ids((9, 8, 7), seed=3), completions),
        counts=[3, 1, 2],
        index=[0, 1, 2],
        topk_ids=[torch.rand(len(c), VOCAB, generator=generator).topk(K).indices.int() for c in completions],
        topk_logits=[torch.randn(len(c), K, generator=generator, dtype=torch.float64) for c in completions],
    )


@pytest.mark.parametrize(("divergence", "formula"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_the_loss_is_its_formula(items, divergence, formula):
    student, measured = random_policy("gpt2"), Measurements()
    mine = distillation_loss(divergence, student, items, GROUP, "padded", measured)
    theirs, mass, number, written, rare = 0.0, 0.0, 0, 0.0, 0
    for i in GROUP:
        dense = Reference.distribution(student.model, items.student.prompt_ids[i], items.student.completion_ids[i], 1.0)
        for t, q in enumerate(dense.exp()):
            ids = items.topk_ids[i][t].long()
            p = torch.zeros(VOCAB, dtype=torch.float64).scatter(0, ids, items.topk_logits[i][t].softmax(-1))
            theirs = theirs + items.counts[i] * formula(p, q)
            mass += items.counts[i] * q[ids].sum().item()
            number += items.counts[i]
            probability = q[items.student.completion_ids[i][t]].item()
            written += items.counts[i] * probability
            rare += items.counts[i] * (probability < 0.01)
    gradients = []
    for value in (mine, theirs):
        student.zero_grad()
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert mine.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert (gradients[0] - gradients[1]).norm() < TOLERANCE * gradients[1].norm()
    measured.add("loss/distillation", 0.0, 1.0)  # the denominator comes from where it is known
    assert measured.means() == pytest.approx(
        {
            "loss/distillation": theirs.item(),
            "privileged/student_mass": mass / number,
            "privileged/token_probability": written / number,
            "privileged/rare_tokens": rare / number,
        },
        rel=TOLERANCE,
    )
    assert 0 < rare < number


def test_the_largest_value_is_that_of_distributions_that_share_nothing():
    p, q = torch.tensor([[1.0, 0.0], [1e-300, 1.0]], dtype=torch.float64)
    for tail in ("exact", "paper"):
        assert jsd(p, q, tail).item() == pytest.approx(JSD(tail).largest, rel=TOLERANCE)
    assert (ForwardKL.largest, ReverseKL.largest) == (None, None)


def test_a_wrong_tail_is_refused():
    with pytest.raises(ConfigError, match=r"model.divergence.tail must be one of exact, paper, got 'long'"):
        JSD("long")


@pytest.mark.parametrize("weight", [0.0, 1.0, math.nan])
def test_a_mixture_of_one_is_refused(weight):
    with pytest.raises(ConfigError, match=r"model.divergence.teacher_weight must be between 0 and 1"):
        GeneralizedJSD(weight)
