import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hdpo.functional import (
    topk_forward_kl,
    topk_forward_kl_from_logps,
    topk_generalized_jsd_from_logps,
    topk_jsd,
    topk_jsd_from_logps,
    topk_reverse_kl,
    topk_reverse_kl_from_logps,
)
from tests.helpers.tolerances import EXACT, of_sum

LN2 = math.log(2)


def random_case(vocab, k, *, student_scale=1.0, teacher_scale=1.0, rows=16, seed=0, related=0.5, dtype=torch.double):
    """Student logits, and the top k of a teacher that partly agrees with it."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator, dtype=torch.double)
    teacher = related * student + (1 - related) * torch.randn(rows, vocab, generator=generator, dtype=torch.double)
    student, teacher = (student_scale * student).to(dtype), (teacher_scale * teacher).to(dtype)
    top = teacher.topk(k, dim=-1)
    return student, top.values, top.indices


def dense(student_logits, topk_logits, topk_ids):
    """Both distributions over the whole vocabulary in float64."""
    q = student_logits.double().exp() / student_logits.double().exp().sum(-1, keepdim=True)
    weights = (topk_logits.double() - topk_logits.double().amax(-1, keepdim=True)).exp()
    p = torch.zeros_like(q).scatter(-1, topk_ids.long(), weights / weights.sum(-1, keepdim=True))
    return p, q


def dense_jsd(p, q):
    m = (p + q) / 2
    left = torch.where(p > 0, p * (p / m).log(), 0.0).sum(-1)
    right = torch.where(q > 0, q * (q / m).log(), 0.0).sum(-1)
    return (left + right) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("student_temperature", "teacher_temperature"), [(1.0, 1.0), (0.1, 1.0), (2.0, 0.05), (5, 5)])
def test_jsd_against_a_dense_reference(dtype, student_temperature, teacher_temperature):
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        vocab = int(torch.randint(2, 3000, (), generator=generator))
        k = int(torch.randint(1, min(vocab, 128) + 1, (), generator=generator))
        student, values, ids = random_case(
            vocab,
            k,
            student_scale=1 / student_temperature,
            teacher_scale=1 / teacher_temperature,
            seed=seed,
            dtype=dtype,
        )
        expected = dense_jsd(*dense(student, values, ids))
        actual = topk_jsd(student, values, ids.int())
        assert actual.dtype == dtype
        # Each log-probability is rounded; sums of up to 3,000 numbers are added up pairwise.
        rounded = of_sum(1, float(student.double().log_softmax(-1).abs().max())) + of_sum(12, 1.0)
        assert (actual.double() - expected).abs().max() < (rounded if dtype == torch.float32 else EXACT)


def test_jsd_of_the_whole_vocabulary_against_torch_distributions():
    student, values, ids = random_case(40, 40)
    p, q = dense(student, values, ids)
    mixture = Categorical(probs=(p + q) / 2)
    expected = (kl_divergence(Categorical(probs=p), mixture) + kl_divergence(Categorical(probs=q), mixture)) / 2
    torch.testing.assert_close(topk_jsd(student, values, ids), expected)
    # With k = V there is nothing outside, and the tail's factor does not matter.
    torch.testing.assert_close(topk_jsd(student, values, ids, tail="paper"), expected)


def test_jsd_with_the_papers_tail():
    student, values, ids = random_case(50, 4)
    p, q = dense(student, values, ids)
    outside = torch.where(p > 0, 0.0, q).sum(-1)
    expected = dense_jsd(p, q) + outside * LN2 / 2
    torch.testing.assert_close(topk_jsd(student, values, ids, tail="paper"), expected)


def test_jsd_is_zero_at_equality_and_at_most_ln_2():
    student, values, ids = random_case(30, 30, related=1.0)
    assert topk_jsd(student, values, ids).abs().max() < 1e-15
    assert topk_jsd(student.float(), values.float(), ids).abs().max() < of_sum(30, 1.0)
    apart = torch.tensor([0.0, 60.0, 0.0], dtype=torch.double)
    far = topk_jsd(apart, torch.tensor([0.0], dtype=torch.double), torch.tensor([0]))
    assert far.item() == pytest.approx(LN2, abs=1e-15)
    assert topk_jsd(apart, torch.zeros(1), torch.tensor([0]), tail="paper").item() == pytest.approx(1.5 * LN2)
    for seed in range(20):
        value = topk_jsd(*random_case(200, 5, student_scale=8, teacher_scale=8, seed=seed, related=0.0))
        assert (value >= 0).all()
        assert (value <= LN2).all()


def test_jsd_is_symmetric_where_both_are_known_everywhere():
    first, second = torch.randn(2, 6, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20).expand(6, 20)
    torch.testing.assert_close(topk_jsd(first, second, ids), topk_jsd(second, first, ids))


def test_order_of_the_teachers_tokens_does_not_matter():
    student, values, ids = random_case(30, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for function in (topk_jsd, topk_forward_kl, topk_reverse_kl):
        torch.testing.assert_close(function(student, values[:, order], ids[:, order]), function(student, values, ids))


@pytest.mark.parametrize("tail", ["exact", "paper"])
@pytest.mark.parametrize(("vocab", "k"), [(12, 1), (12, 5), (12, 12)])
def test_jsd_gradient(tail, vocab, k):
    student, values, ids = random_case(vocab, k, rows=3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_jsd(x, values, ids, tail=tail), student)
    logps = student.detach().log_softmax(-1).gather(-1, ids).requires_grad_()
    if k < vocab:  # with k = V a step upwards leaves the probabilities' domain, and the value is clamped there
        teacher = values.log_softmax(-1)
        assert torch.autograd.gradcheck(lambda x: topk_jsd_from_logps(x, teacher, tail=tail), logps)


@pytest.mark.parametrize("tail", ["exact", "paper"])
def test_jsd_gradient_has_its_closed_form_even_without_a_tail(tail):
    """d JSD / d ln Q = Q / 2 * ln(Q / (P + Q)) for the exact tail, also where rounding makes sum Q exceed 1."""
    factor = 0.5 if tail == "exact" else 1.0
    for dtype in (torch.float32, torch.float64):
        for excess in (0.0, 1e-6):
            logps = (
                torch.randn(400, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)).log_softmax(-1) + excess
            )
            teacher = torch.randn(400, 8, dtype=dtype, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
            logps.requires_grad_()
            value = topk_jsd_from_logps(logps, teacher, tail=tail)
            (gradient,) = torch.autograd.grad(value.sum(), logps)
            p, q = teacher.double().exp(), logps.detach().double().exp()
            expected = 0.5 * q * (2 * q / (p + q)).log() - factor * LN2 * q
            torch.testing.assert_close(gradient.double(), expected, atol=of_sum(8, 1.0, dtype), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_students_give_finite_values_and_gradients(dtype):
    ids = torch.tensor([[0, 1]])
    teacher = torch.tensor([[0.0, -torch.inf]], dtype=dtype)  # P = (1, 0)
    cases = {
        "all mass on the teacher's token": ([300.0, 0.0, 0.0], 0.0),
        "all mass on the impossible one": ([0.0, 300.0, 0.0], LN2),
        "all mass outside": ([-300.0, -300.0, 300.0], LN2),
        "mass 0 on S, exactly": ([-torch.inf, -torch.inf, 0.0], LN2),
        "mass 0 on the impossible token": ([0.0, -torch.inf, -torch.inf], 0.0),
    }
    for name, (logits, expected) in cases.items():
        student = torch.tensor([logits], dtype=dtype, requires_grad=True)
        value = topk_jsd(student, teacher, ids)
        value.backward()
        assert value.item() == pytest.approx(expected, abs=of_sum(8, 1.0, dtype)), name
        assert student.grad.isfinite().all(), name
        assert student.grad.abs().max() < of_sum(8, 1.0, dtype), (
            name
        )  # all of these are stationary points of the softmax


def test_underflowing_students_still_have_a_direction():
    """At Q = e^-60 the JSD's gradient is tiny but right, and the forward KL's is not tiny at all."""
    student = torch.tensor([[-60.0, 0.0]], dtype=torch.double, requires_grad=True)
    ids, teacher = torch.tensor([[0]]), torch.zeros(1, 1, dtype=torch.double)
    (jsd,) = torch.autograd.grad(topk_jsd(student, teacher, ids), student)
    expected = 0.5 * math.exp(-60) * -60  # Q / 2 * ln(Q / (P + Q)), with P = 1
    assert jsd[0, 0].item() == pytest.approx(expected, rel=1e-9)
    (kl,) = torch.autograd.grad(topk_forward_kl(student, teacher, ids), student)
    assert kl[0].tolist() == pytest.approx([-1.0, 1.0])


def test_forward_kl_against_torch_distributions():
    for k in (1, 7, 40):
        student, values, ids = random_case(40, k, student_scale=3)
        p, q = dense(student, values, ids)
        expected = kl_divergence(Categorical(probs=p), Categorical(probs=q))
        # Categorical clamps its probabilities by 1e-16, which is where this tolerance comes from.
        torch.testing.assert_close(topk_forward_kl(student, values, ids), expected, atol=1e-9, rtol=1e-9)
        assert torch.autograd.gradcheck(lambda x, v=values, i=ids: topk_forward_kl(x, v, i), student.requires_grad_())


def test_reverse_kl_against_torch_distributions():
    for k in (1, 7, 40):
        student, values, ids = random_case(40, k, student_scale=3)
        conditional = Categorical(logits=student.gather(-1, ids))
        expected = kl_divergence(conditional, Categorical(logits=values))
        torch.testing.assert_close(topk_reverse_kl(student, values, ids), expected)
        assert torch.autograd.gradcheck(lambda x, v=values, i=ids: topk_reverse_kl(x, v, i), student.requires_grad_())


def test_reverse_kl_ignores_what_is_outside():
    student, values, ids = random_case(9, 4, rows=1)
    other = student.clone()
    outside = torch.ones(9, dtype=torch.bool).scatter(0, ids[0], False)
    other[0, outside] += 5
    torch.testing.assert_close(topk_reverse_kl(other, values, ids), topk_reverse_kl(student, values, ids))
    assert topk_forward_kl(other, values, ids) > topk_forward_kl(student, values, ids)


@pytest.mark.parametrize("function", [topk_forward_kl, topk_reverse_kl])
def test_kls_are_finite_with_impossible_and_vanishing_tokens(function):
    student = torch.tensor([[-400.0, 5.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, -torch.inf, 0.0]])
    value = function(student, teacher, torch.tensor([[0, 1, 2]]))
    value.backward()
    # The impossible token is the same as one that the teacher never named.
    without = function(student.detach(), teacher[:, [0, 2]], torch.tensor([[0, 2]]))
    torch.testing.assert_close(value.detach(), without)
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("function", "core"),
    [
        (topk_jsd, topk_jsd_from_logps),
        (topk_forward_kl, topk_forward_kl_from_logps),
        (topk_reverse_kl, topk_reverse_kl_from_logps),
    ],
)
def test_both_forms_agree_and_take_any_leading_shape(function, core):
    student, values, ids = random_case(25, 6, rows=12)
    expected = core(student.log_softmax(-1).gather(-1, ids), values.log_softmax(-1))
    shaped = function(student.view(3, 4, 25), values.view(3, 4, 6), ids.view(3, 4, 6))
    torch.testing.assert_close(shaped, expected.view(3, 4))
    torch.testing.assert_close(function(student[0], values[0], ids[0]), expected[0])


@pytest.mark.parametrize("function", [topk_jsd, topk_forward_kl, topk_reverse_kl])
def test_logits_are_known_up_to_a_constant_and_the_teacher_has_no_gradient(function):
    student, values, ids = random_case(25, 6)
    expected = function(student, values, ids)
    torch.testing.assert_close(function(student + 100, values - 50, ids), expected)
    values.requires_grad_()
    assert not function(student, values, ids).requires_grad


@pytest.mark.parametrize("function", [topk_jsd, topk_forward_kl, topk_reverse_kl])
def test_half_precision_is_computed_in_float32(function):
    student, values, ids = random_case(25, 6, dtype=torch.bfloat16)
    value = function(student, values, ids)
    assert value.dtype == torch.float32
    expected = function(student.double(), values.double(), ids)
    atol = of_sum(25, float(expected.abs().max())) + of_sum(1, float(student.double().log_softmax(-1).abs().max()))
    torch.testing.assert_close(value.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_jsd(torch.zeros(3, 5), torch.zeros(3, 2), torch.zeros(3, 3)), "one shape"),
        (lambda: topk_jsd(torch.zeros(4, 5), torch.zeros(3, 2), torch.zeros(3, 2)), "agree before V and k"),
        (lambda: topk_forward_kl(torch.zeros(3, 5), torch.zeros(3, 6), torch.zeros(3, 6)), "k = 6 > 5 = V"),
        (lambda: topk_jsd(torch.zeros(5), torch.zeros(2), torch.zeros(2), tail="half"), "one of exact, paper"),
        (lambda: topk_jsd_from_logps(torch.zeros(3, 2), torch.zeros(2)), "one shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def at_topk(student, ids):
    return student.log_softmax(-1).gather(-1, ids)


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_generalised_jsd_against_a_dense_reference(weight, k):
    student, values, ids = random_case(40, k, student_scale=2.0)
    p, q = dense(student, values, ids)
    m = weight * p + (1 - weight) * q
    left = torch.where(p > 0, p * (p / m).log(), 0.0).sum(-1)
    right = (q * (q / m).log()).sum(-1)
    student.requires_grad_()
    value = topk_generalized_jsd_from_logps(at_topk(student, ids), values.log_softmax(-1), teacher_weight=weight)
    torch.testing.assert_close(value, weight * left + (1 - weight) * right, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    other = student.detach().clone().requires_grad_()
    q = other.softmax(-1)
    m = weight * p + (1 - weight) * q
    written_out = weight * (torch.xlogy(p, p) - p * m.log()).sum() + (1 - weight) * (q * (q / m).log()).sum()
    (expected,) = torch.autograd.grad(written_out, other)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


def test_generalised_jsd_at_one_half_is_the_jsd_and_has_its_limits():
    student, values, ids = random_case(60, 8)
    logps, teacher = at_topk(student, ids), values.log_softmax(-1)

    def value(weight):
        return topk_generalized_jsd_from_logps(logps, teacher, teacher_weight=weight)

    torch.testing.assert_close(value(0.5), topk_jsd_from_logps(logps, teacher), rtol=1e-12, atol=0)
    forward = topk_forward_kl_from_logps(logps, teacher)
    torch.testing.assert_close(value(1e-7) / 1e-7, forward, rtol=1e-4, atol=0)
    b = 0.2
    assert (value(b) <= -b * math.log(b) - (1 - b) * math.log1p(-b)).all()
    assert (value(b) > 0).all()


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, math.nan])
def test_generalised_jsd_refuses_other_weights(weight):
    with pytest.raises(ValueError, match="teacher_weight must be between 0 and 1"):
        topk_generalized_jsd_from_logps(torch.zeros(1, 1), torch.zeros(1, 1), teacher_weight=weight)
