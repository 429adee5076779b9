import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hdpo.functional import clipped_surrogate, k3_kl, loss_denominator, sampler_correction, token_weights


def reference(logps, old, advantages, low, high) -> tuple[float, int]:
    """One token at a time, with Python floats: sum of losses and number of tokens whose gradient the clip removed."""
    total, clipped = 0.0, 0
    for new, before, advantage in zip(logps, old, advantages, strict=True):
        ratio = math.exp(new - before)
        if advantage > 0 and ratio > 1 + high:
            total, clipped = total - (1 + high) * advantage, clipped + 1
        elif advantage < 0 and ratio < 1 - low:
            total, clipped = total - (1 - low) * advantage, clipped + 1
        else:
            total -= ratio * advantage
    return total, clipped


def flat_case(size=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(size, dtype=torch.double, generator=generator)
    logps = old + 0.4 * torch.randn(size, dtype=torch.double, generator=generator)
    advantages = torch.randn(size, dtype=torch.double, generator=generator)
    return logps, old, advantages


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5), (0.0, 0.0)])
def test_against_reference(low, high):
    logps, old, advantages = flat_case()
    loss = clipped_surrogate(logps, old, advantages, clip_eps_low=low, clip_eps_high=high)
    total, clipped = reference(logps.tolist(), old.tolist(), advantages.tolist(), low, high)
    assert loss.losses.sum().item() == pytest.approx(total, rel=1e-12)
    assert loss.clipped.sum() == clipped > 20
    assert loss.ratios.tolist() == pytest.approx([math.exp(a - b) for a, b in zip(logps, old, strict=True)])


def test_gradient_is_that_of_the_formula():
    logps, old, advantages = flat_case(60)
    # gradcheck leaves the kinks of the clip out by chance: no token of this draw lies within its step of one.
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, old, advantages, clip_eps_low=0.2, clip_eps_high=0.28).losses,
        logps.requires_grad_(),
    )
    (gradient,) = torch.autograd.grad(clipped_surrogate(logps, old, advantages).losses.sum(), logps)
    assert torch.equal(gradient == 0, clipped_surrogate(logps, old, advantages).clipped)


def test_on_policy_gradient_is_reinforce():
    """With one update per batch, GRPO's gradient is that of -sum A log pi, whatever the clip."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, dtype=torch.double, generator=generator, requires_grad=True)
    actions = Categorical(logits=logits.detach()).sample()
    advantages = torch.randn(50, dtype=torch.double, generator=generator)
    logps = Categorical(logits=logits).log_prob(actions)
    (expected,) = torch.autograd.grad(-(advantages * logps).sum(), logits, retain_graph=True)
    loss = clipped_surrogate(logps, logps.detach(), advantages)
    (gradient,) = torch.autograd.grad(loss.losses.sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert not loss.clipped.any()
    assert (loss.ratios == 1).all()


def test_a_step_against_the_gradient_makes_good_tokens_likelier():
    logits = torch.zeros(1, 3, dtype=torch.double, requires_grad=True)
    logps = logits.log_softmax(-1)[:, 0]
    for advantage, sign in ((1.0, 1), (-1.0, -1)):
        loss = clipped_surrogate(logps, logps.detach(), torch.tensor([advantage])).losses.sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        change = (logits - 0.1 * gradient).log_softmax(-1)[0, 0] - logps[0]
        assert math.copysign(1, change.item()) == sign


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_add_up_to_the_batch(aggregation):
    lengths = torch.tensor([3, 2, 5, 1, 4, 5])
    logps, old, advantages = flat_case(20)
    logps.requires_grad_()
    weights = token_weights(lengths, aggregation)
    denominator = loss_denominator(lengths, aggregation)
    (expected,) = torch.autograd.grad(
        (clipped_surrogate(logps, old, advantages).losses * weights).sum() / denominator, logps
    )
    for split in ([3, 3], [1, 5], [1] * 6):
        gradient = torch.zeros(20, dtype=torch.double)
        sizes = [int(part.sum()) for part in lengths.split(split)]
        for part in torch.arange(20).split(sizes):
            losses = clipped_surrogate(logps[part], old[part], advantages[part]).losses * weights[part]
            gradient += torch.autograd.grad(losses.sum() / denominator, logps)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_aggregations_are_the_means_they_are_named_after():
    lengths = torch.tensor([4, 0, 1, 2])
    advantages = torch.tensor([1.0, 9.0, 2.0, 4.0]).repeat_interleave(lengths)
    logps = torch.zeros(7)
    losses = [
        (clipped_surrogate(logps, logps, advantages).losses * token_weights(lengths, a)).sum()
        / loss_denominator(lengths, a)
        for a in ("token", "sequence")
    ]
    assert losses[0].item() == pytest.approx(-(4 * 1 + 2 + 2 * 4) / 7)
    assert losses[1].item() == pytest.approx(-(1 + 2 + 4) / 3)


def test_a_broken_token_stays_finite():
    logps = torch.tensor([0.0, -1.0], requires_grad=True)
    loss = clipped_surrogate(logps, torch.tensor([-500.0, -1.0]), torch.tensor([-1.0, 1.0]))
    loss.losses.sum().backward()
    assert loss.losses.isfinite().all()
    assert logps.grad.tolist() == [0.0, -1.0]


def test_no_token_keeps_the_graph():
    logps = torch.zeros(0, requires_grad=True)
    loss = clipped_surrogate(logps, logps, torch.zeros(0))
    loss.losses.sum().backward()
    assert loss.losses.sum() == 0
    assert logps.grad.shape == (0,)


def test_k3_is_unbiased_for_the_kl():
    """The expectation over all tokens, exactly, against torch.distributions."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, 9, dtype=torch.double, generator=generator).log_softmax(-1)
    ref = torch.randn(5, 9, dtype=torch.double, generator=generator).log_softmax(-1)
    estimates = k3_kl(policy, ref)
    assert (estimates >= 0).all()
    expected = kl_divergence(Categorical(logits=policy), Categorical(logits=ref))
    torch.testing.assert_close((policy.exp() * estimates).sum(-1), expected)
    assert torch.autograd.gradcheck(lambda x: k3_kl(x, ref), policy.clone().requires_grad_())
    assert k3_kl(policy, policy).eq(0).all()


def test_k3_keeps_its_digits_and_stays_finite():
    tiny = k3_kl(torch.zeros(1), torch.tensor([1e-3]))
    assert tiny.item() == pytest.approx(5e-7, rel=1e-3)
    assert k3_kl(torch.tensor([-500.0]), torch.tensor([0.0])).isfinite()


def test_sampler_correction():
    logps = torch.tensor([-1.0, -1.0, -3.0, 0.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -4.0, -1.0, -900.0])
    ratios = sampler_correction(logps, sampler, threshold=3.0)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 3.0, math.exp(-2), 3.0]))
    assert not ratios.requires_grad


def test_sampler_correction_undoes_the_samplers_bias():
    """E_sampler[ratio * grad] is the trainer's gradient, as long as the threshold does not bite."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.double, generator=generator, requires_grad=True)
    sampler = (logits.detach() + 0.2 * torch.randn(6, dtype=torch.double, generator=generator)).log_softmax(-1)
    advantages = torch.randn(6, dtype=torch.double, generator=generator)
    logps = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(logps.exp() * advantages).sum(), logits, retain_graph=True)
    weights = sampler.exp() * sampler_correction(logps, sampler, threshold=10.0)
    loss = (clipped_surrogate(logps, logps.detach(), advantages).losses * weights).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: clipped_surrogate(x, x, x, clip_eps_low=1.5), "clip_eps_low"),
        (lambda x: clipped_surrogate(x, x, x, clip_eps_high=-0.1), "clip_eps_high"),
        (lambda x: clipped_surrogate(x, x[:1], x), "one shape"),
        (lambda x: sampler_correction(x, x, threshold=0.0), "threshold must be positive"),
        (lambda x: token_weights(x.long(), "batch"), "one of token, sequence, got 'batch'"),
        (lambda x: loss_denominator(x.long(), "batch"), "one of token, sequence, got 'batch'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2))
