"""The policy-gradient loss of a micro-batch against its formula, written out one sequence at a time in float64."""

import math

import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.losses import ClippedPolicyLoss
from hdpo.losses.selection import PolicyBatch
from hdpo.measurements import Measurements
from tests.helpers.models import random_ids, random_policy
from tests.helpers.reference import Reference

#: A micro-batch takes sequences in an order of its own, and not all of them.
GROUP = [3, 0, 2]
#: Weights of sequences, 1 / length, are float32; all else is float64.
TOLERANCE = 4 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def policies():
    """The student, and an initial policy that it has moved away from."""
    student, reference = random_policy("gpt2"), random_policy("gpt2", seed=5)
    with torch.no_grad():
        for mine, other in zip(student.parameters(), reference.parameters(), strict=True):
            other.copy_(mine + 0.05 * other)
    return student, reference


TEMPERATURE = 1.7


@pytest.fixture
def items(policies):
    """Four rollouts; the sampler's log-probabilities are about the student's, in float32 as an engine reports them."""
    batch = PolicyBatch(
        Sequences(random_ids((4, 2, 4, 7)), random_ids((3, 5, 6, 2), seed=2)),
        advantages=torch.tensor([1.5, -0.25, -2.0, 0.75], dtype=torch.float64),
        counts=torch.tensor([2, 1, 3, 1]),
        sampler_logps=[],
        denominator=99.0,
    )
    batch.sampler_logps = [x.float() for x in perturbed(policies[0], batch, 0.5, seed=6)]
    return batch


def perturbed(policy, batch, scale, seed):
    """Log-probabilities of all completions, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    found = [logps(policy, batch, i, TEMPERATURE).detach() for i in range(4)]
    return [x + scale * torch.randn(len(x), generator=generator, dtype=torch.float64) for x in found]


def logps(policy, items, i, temperature):
    prompt, completion = items.sequences.prompt_ids[i], items.sequences.completion_ids[i]
    dense = Reference.distribution(policy.model, prompt, completion, temperature)
    return dense[torch.arange(len(completion)), torch.tensor(completion)]


def expected(loss, student, reference, items):
    """The loss of the micro-batch, and what is measured of it as name -> (sum, count)."""
    total, kl_total = 0.0, 0.0
    found = {name: [0.0, 0.0] for name in ("loss/kl", "loss/clip_fraction", "loss/ratio")}
    token, sequence = [], []
    for i in GROUP:
        count, advantage = int(items.counts[i]), float(items.advantages[i])
        new = logps(student, items, i, TEMPERATURE)
        old = items.old_logps[i] if items.old_logps else new.detach()
        weight = count * (1.0 if loss.aggregation == "token" else 1.0 / len(new))
        sampled = items.sampler_logps[i].double()
        # What the policy did not write: no sampler, no clip, no KL; LUFFY's shaped probability instead.
        foreign = items.off_policy is not None and bool(items.off_policy[i])
        ratio = torch.ones_like(old) if foreign else (old - sampled).exp()
        token += [(float(r), count) for r in ratio]
        sequence.append((float(ratio.prod()), count))
        for t in range(len(new)):
            rho = (new[t] - old[t]).exp()
            low, high = 1 - loss.clip_eps_low, 1 + loss.clip_eps_high
            term = -min(rho * advantage, rho.clamp(low, high) * advantage)
            if foreign:
                term = -advantage * new[t].exp() / (new[t].exp() + loss.off_policy_shaping)
            if loss.sampler_correction == "truncated":
                term = term * min(float(ratio[t]), loss.sampler_correction_threshold)
            total = total + weight * term
            found["loss/kl"][1] += weight * (reference is not None)  # of all tokens, as the loss's own denominator
            if foreign:
                continue
            clipped = rho > high if advantage > 0 else rho < low
            found["loss/clip_fraction"][0] += count * float(clipped)
            found["loss/ratio"][0] += count * float(rho.detach())
            found["loss/clip_fraction"][1] += count
            found["loss/ratio"][1] += count
        if reference is not None and not foreign:
            ref = logps(reference, items, i, TEMPERATURE).detach()
            kl = ((ref - new).exp() - (ref - new) - 1).sum()
            kl_total = kl_total + weight * kl
            found["loss/kl"][0] += weight * float(kl.detach())
    for name, values in (("token", token), ("sequence", sequence)):
        number = sum(count for _, count in values)
        found[f"sampler/{name}_ratio_mean"] = [sum(r * count for r, count in values), number]
        above = sum(count for r, count in values if r > loss.sampler_correction_threshold)
        found[f"sampler/{name}_ratio_above"] = [above, number]
        found[f"sampler/{name}_ratio_max"] = [max(r for r, _ in values), 1]
    found["loss/policy"] = [float(total.detach()), 1]
    return total + loss.kl_coef * kl_total, {name: total / count for name, (total, count) in found.items() if count}


OPTIONS = {
    "on policy": {},
    "sequence": {"aggregation": "sequence"},
    "kl": {"kl_coef": 0.7},
    "kl, sequence": {"kl_coef": 0.7, "aggregation": "sequence"},
    "correction": {"sampler_correction": "truncated", "sampler_correction_threshold": 1.2},
    "correction, sequence, kl": {
        "sampler_correction": "truncated",
        "sampler_correction_threshold": 0.9,
        "aggregation": "sequence",
        "kl_coef": 0.3,
    },
}


@pytest.mark.parametrize("foreign", [False, True], ids=["own", "with a reference solution"])
@pytest.mark.parametrize("several", [False, True], ids=["one update", "several"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_its_formula(policies, items, options, several, foreign):
    student, reference = policies
    layout = "shared" if several else "padded"
    loss = ClippedPolicyLoss(clip_eps_low=0.1, clip_eps_high=0.02, off_policy_shaping=0.3, **options)
    if foreign:
        items.off_policy = torch.tensor([True, True, False, False])
    if several:
        items.old_logps = perturbed(student, items, 0.15, seed=3)
    reference = reference if loss.kl_coef else None
    gradients, measured = [], Measurements()
    mine = loss(student, reference, items, GROUP, layout, TEMPERATURE, measured)
    theirs, values = expected(loss, student, reference, items)
    for value in (mine, theirs):
        student.zero_grad()
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert mine.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert (gradients[0] - gradients[1]).norm() < TOLERANCE * gradients[1].norm()
    # The numerator of the loss alone: its denominator is added where it is known.
    measured.add("loss/policy", 0.0, 1.0)
    means = measured.means()
    names = {"loss/policy"} | ({"loss/kl"} if reference else set())
    names |= {"loss/clip_fraction", "loss/ratio"} if several else set()
    if loss.sampler_correction == "truncated":
        names |= {name for name in values if name.startswith("sampler/")}
    assert set(means) == names
    assert means == pytest.approx({name: values[name] for name in names}, rel=TOLERANCE)
    if loss.sampler_correction == "truncated":
        assert 0 < means["sampler/token_ratio_above"] < 1, "the bound must matter"
    if several:
        assert 0 < means["loss/clip_fraction"] < 1, "the clip must matter"


def test_of_another_loss_only_its_value_is_measured(policies, items):
    student, _ = policies
    items.old_logps = perturbed(student, items, 0.15, seed=3)
    measured, plain = Measurements(), Measurements()
    loss = ClippedPolicyLoss()
    arguments = (student, None, items, GROUP, "padded", TEMPERATURE)
    assert loss(*arguments, measured, "privileged_policy").item() == loss(*arguments, plain).item()
    totals = {name: total for name, total, _ in plain.items()}
    assert [(name, total) for name, total, _ in measured.items()] == [("loss/privileged_policy", totals["loss/policy"])]


@pytest.mark.parametrize(("scale", "divisors"), [
    ("none", [1.0] * 4),
    ("std", [0.5] * 4),
    ("leave_one_out_std", [1.0] + [math.sqrt(1 / 3)] * 3),  # the first one's others do not vary
])  # fmt: skip
def test_advantages_are_scaled_as_it_says(scale, divisors):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0], [1.0] * 5])
    valid = torch.tensor([True] * 4 + [False]).expand(2, 5)  # the last one has no verdict
    found = ClippedPolicyLoss(advantage_scale=scale).advantages(rewards, valid)
    expected = [a / d for a, d in zip([1, -1 / 3, -1 / 3, -1 / 3], divisors, strict=True)]
    assert found[0].tolist() == pytest.approx([*expected, 0.0], rel=TOLERANCE)
    assert found[1].tolist() == [0.0] * 5


@pytest.mark.parametrize(("option", "value"), [
    ("clip_eps_low", 1.01),
    ("clip_eps_low", -0.01),
    ("clip_eps_high", -0.01),
    ("kl_coef", -1e-9),
    ("kl_coef", math.nan),
    ("sampler_correction_threshold", 0.0),
    ("off_policy_shaping", 0.0),
    ("advantage_scale", "variance"),
    ("aggregation", "batch"),
    ("sampler_correction", "yes"),
])  # fmt: skip
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ConfigError, match=f"model.policy_loss.{option} must be"):
        ClippedPolicyLoss(**{option: value})
