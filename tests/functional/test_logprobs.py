"""The chunked output layer against the dense one, in values and in gradients."""

import pytest
import torch

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
