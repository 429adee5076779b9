"""The chunked output layer against the dense one, in values and in gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hdpo.functional import logprobs
from hdpo.functional.logprobs import chunk_rows, selected_logps, topk_logits
from tests.helpers.tolerances import EXACT, of_sum

WIDTH, VOCAB, POSITIONS = 16, 101, 37


def dense(hidden, weight, bias, ids, temperature):
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return (logits / temperature).log_softmax(-1).gather(-1, ids)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * 0.5
    bias = torch.randn(VOCAB, generator=generator)
    ids = torch.randint(VOCAB, (POSITIONS, 5), generator=generator)
    upstream = torch.randn(POSITIONS, 5, generator=generator)
    return hidden, weight, bias, ids, upstream


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1, 101 * 10, 1 << 20])
def test_values_and_gradients_equal_the_dense_float64_computation(
    problem, dtype, with_bias, temperature, chunk_elements
):
    hidden, weight, bias, upstream = (x.to(dtype) for x in (*problem[:3], problem[4]))
    ids = problem[3]
    bias = bias if with_bias else None
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    out = selected_logps(
        leaves[0],
        leaves[1],
        leaves[2] if with_bias else None,
        ids,
        temperature=temperature,
        chunk_elements=chunk_elements,
    )
    (out * upstream).sum().backward()
    reference = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = dense(reference[0], reference[1], reference[2] if with_bias else None, ids, temperature)
    (logps * upstream).sum().backward()
    # A logit is a sum of WIDTH products, a probability one of VOCAB; a gradient adds up what either side brings.
    terms = float((hidden.abs() @ weight.abs().T).max()) / temperature
    tolerance = EXACT if dtype == torch.float64 else of_sum(WIDTH, terms) + of_sum(VOCAB, 1.0)
    torch.testing.assert_close(out.double(), logps, rtol=0, atol=tolerance)
    for mine, theirs in zip(leaves, reference, strict=True):
        passed_on = 5 * float(upstream.abs().max()) * max(float(hidden.abs().max()), float(weight.abs().max()), 1.0)
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=tolerance * passed_on * POSITIONS)


def test_gradcheck_with_repeated_ids():
    # The same id twice in a row must add its two gradients.
    hidden = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(7, dtype=torch.double, requires_grad=True)
    ids = torch.tensor([[1, 1, 2], [0, 6, 6], [3, 4, 5], [2, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda h, w, b: selected_logps(h, w, b, ids, temperature=1.3, chunk_elements=14), (hidden, weight, bias)
    )


def test_frozen_output_layer_gets_no_gradient(problem):
    hidden, weight, _, ids, _ = problem
    hidden = hidden.clone().requires_grad_()
    selected_logps(hidden, weight, None, ids).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_position_at_all(problem):
    hidden, weight, _, ids, _ = problem
    hidden = hidden[:0].clone().requires_grad_()
    out = selected_logps(hidden, weight.clone().requires_grad_(), None, ids[:0])
    out.sum().backward()
    assert out.shape == (0, 5)
    assert hidden.grad.shape == (0, 16)


def test_bfloat16_inputs_are_reduced_in_float32(problem):
    hidden, weight, _, ids, _ = problem
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    out = selected_logps(hidden, weight, None, ids)
    assert out.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    atol = of_sum(VOCAB, 1.0) + of_sum(1, float(logits.abs().max()))
    torch.testing.assert_close(out, logits.log_softmax(-1).gather(-1, ids), rtol=0, atol=atol)


def test_temperature_must_be_positive(problem):
    hidden, weight, _, ids, _ = problem
    with pytest.raises(ValueError, match="temperature must be positive"):
        selected_logps(hidden, weight, None, ids, temperature=0.0)


@pytest.mark.parametrize("chunk_elements", [1, 101 * 4, 1 << 20])
def test_topk_equals_torch_topk(problem, chunk_elements):
    hidden, weight, bias = (x.double() for x in problem[:3])
    ids, values = topk_logits(hidden, weight, bias, 8, chunk_elements=chunk_elements)
    expected = (hidden @ weight.T + bias).topk(8, dim=-1)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(values, expected.values, rtol=EXACT, atol=EXACT)


def test_topk_refuses_more_than_the_vocabulary(problem):
    hidden, weight, _, _, _ = problem
    with pytest.raises(ValueError, match="vocabulary's 101 tokens, got 102"):
        topk_logits(hidden, weight, None, 102)


def test_no_tensor_of_tokens_times_vocabulary_is_saved_for_backward():
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(4096, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        selected_logps(hidden, weight, None, torch.zeros(512, 1, dtype=torch.long), chunk_elements=4096 * 16)
    assert max(saved) < 512 * 4096 // 16
    assert chunk_rows(4096, 4096 * 16) == 16
    # By default one chunk is 1 GiB in float32 on a GPU, 128 MiB on a CPU and on what else there may be.
    assert [chunk_rows(4096, None, device) * 4096 * 4 for device in ("cuda", "cpu", "xpu")] == [
        1 << 30,
        1 << 27,
        1 << 27,
    ]


# 16 bits


class _Float32Kernels(TorchDispatchMode):
    """What a GPU has and a CPU has not: products of 16-bit matrices in float32."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.dtype, torch.ops.aten.addmm.dtype, torch.ops.aten.addmm.dtype_out):
            self.calls.append(func)
            *added, left, right, dtype = args
            assert (left.dtype, right.dtype, dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
            result = left.float() @ right.float() + (added[0] if added else 0)
            return kwargs["out"].copy_(result) if "out" in (kwargs or {}) else result
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_bias", [True, False])
def test_products_of_16_bit_numbers_are_not_rounded_where_the_device_can(problem, with_bias, monkeypatch):
    """Values, gradients and top-k logits are then those of the rounded inputs in float64, within float32."""
    hidden, weight, bias = (x.bfloat16() for x in problem[:3])
    bias, ids, upstream = bias if with_bias else None, *problem[3:]
    rounded = selected_logps(hidden, weight, bias, ids)
    monkeypatch.setattr(logprobs, "_multiplies_into_float32", lambda device: True)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with _Float32Kernels() as kernels:
        out = selected_logps(*leaves, bias, ids, temperature=0.7, chunk_elements=101 * 10)
        (out * upstream).sum().backward()
        _, top = topk_logits(hidden, weight, bias, 5)
        exact = selected_logps(hidden, weight, bias, ids)
    assert len(kernels.calls) == 4 + 4 * 2 + 1 + 1
    expected = [x.double().clone().requires_grad_() for x in (hidden, weight)]
    reference = dense(*expected, bias, ids, 0.7)
    (reference * upstream).sum().backward()
    tolerance = of_sum(WIDTH + VOCAB, 20.0)
    assert (out - reference).abs().max() < tolerance
    logits = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert (top - logits.topk(5).values).abs().max() < tolerance
    truth = dense(hidden, weight, bias, ids, 1.0)
    assert (exact - truth).abs().max() < tolerance < 0.01 < (rounded - truth).abs().max()
    # The weight's gradient is rounded once, at its end, as are the gradients of logits.
    for mine, theirs in zip(leaves, expected, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - theirs.grad).norm() < torch.finfo(torch.bfloat16).eps * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_numbers_are_multiplied_as_they_are_whatever_the_device_can(problem, dtype, monkeypatch):
    hidden, weight, bias = (x.to(dtype) for x in problem[:3])
    expected = logprobs.wide_logits(hidden, weight, bias)
    assert expected.dtype == dtype
    monkeypatch.setattr(logprobs, "_multiplies_into_float32", lambda device: True)
    assert torch.equal(logprobs.wide_logits(hidden, weight, bias), expected)


def test_a_gpu_makes_the_logits_in_one_kernel_and_a_cpu_keeps_its_own(monkeypatch):
    assert not logprobs._multiplies_into_float32("cpu")
    monkeypatch.setattr(logprobs, "_multiplies_into_float32", lambda device: device == "cuda")
    found = {}
    for device in ("cuda", "cpu"):
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device=device) for n in (37, 101))
            with _Casts() as casts:
                assert logprobs.wide_logits(hidden, weight, None).dtype == torch.float32
            found[device] = [name for name in casts.names if name in ("mm", "_to_copy")]
    assert found == {"cuda": ["mm"], "cpu": ["mm", "_to_copy"]}


class _Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
