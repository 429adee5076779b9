"""Log-probabilities straight from hidden states, without ever holding a ``[tokens, vocabulary]`` tensor.

At a vocabulary of 151,936 the logits of 4,096 tokens take 2.3 GiB in float32, and a textbook loss keeps several copies
of them. Everything HDPO needs of a position is a handful of numbers: the log-probability of the sampled token (policy
gradient), or those of the teacher's top k (distillation). Both are ``logit - logsumexp(logits)``, so the output layer
is applied to a chunk of positions at a time, reduced at once, and recomputed chunk by chunk in the backward pass.

Why no library's kernel: Liger's fused losses are written in Triton, for GPUs only. torch's chunked
``linear_cross_entropy`` (2.13) computes the gradient in the forward pass, for one weight common to all tokens, where a
policy gradient has an advantage and a clip per token. TRL's chunked log-probabilities are private to its trainer, and
take several times the memory (benchmarks/RESULTS.md). None gathers a teacher's top k.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Default bound on the elements of one chunk of logits, by device. In float32 they take 128 MiB on a CPU and 1 GiB on
#: a GPU, where each chunk also reads and writes the output layer's gradient (0.9 GiB each at 1.5B) once.
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


def chunk_rows(vocab_size: int, chunk_elements: int | None = None, device: str = "cpu") -> int:
    """Number of positions whose logits fit into one chunk.

    Example:
        >>> chunk_rows(151_936), chunk_rows(384)
        (220, 87381)
    """
    return max(1, (chunk_elements or CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"])) // vocab_size)


@cache
def _multiplies_into_float32(device: str) -> bool:
    """Whether matrices of 16 bits can be multiplied, and added up, without rounding the sums to 16 bits on a device.

    torch has no such kernel for a CPU. Elsewhere it is tried, since not every backend has it.
    """
    if device == "cpu":
        return False
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        total = torch.mm(one, one, out_dtype=torch.float32)
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 32).all())


def _widens(matrix: Tensor) -> bool:
    return matrix.dtype in (torch.bfloat16, torch.float16) and _multiplies_into_float32(matrix.device.type)


def wide_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Logits in float32 (or float64 for float64 inputs), divided by the temperature.

    Where the device can, products of 16-bit numbers are not rounded to 16 bits first: of a logit of 30 that takes up to
    1/16 away.
    """
    if _widens(hidden):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _SelectedLogProbs(torch.autograd.Function):
    """``logits[ids] - logsumexp(logits)`` per position, recomputing each chunk of logits in the backward pass.

    Autocast is off inside: the caller has already cast hidden states and weight to the dtype of the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        rows: int,
    ) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(ids.shape, dtype=accumulate, device=hidden.device)
        logsumexps = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                logits = wide_logits(hidden[part], weight, bias, temperature)
                logsumexps[part] = lse = logits.logsumexp(-1)
                logps[part] = logits.gather(-1, ids[part]) - lse[:, None]
                del logits
        ctx.save_for_backward(hidden, weight, bias, ids, logsumexps)
        ctx.temperature, ctx.rows = temperature, rows
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logsumexps = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Sums over many chunks lose digits in 16 bits, so the weight's gradient is collected in full precision.
        grad_weight = torch.zeros(weight.shape, dtype=logsumexps.dtype, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=logsumexps.dtype, device=weight.device) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), ctx.rows):
                part = slice(start, start + ctx.rows)
                grads = grad_logps[part]
                # d logp_s / d logit_v = [v = s] - p_v, hence - p_v * (sum of the incoming gradients) + scatter.
                delta = wide_logits(hidden[part], weight, bias, ctx.temperature)
                delta = delta.sub_(logsumexps[part, None]).exp_().mul_(-grads.sum(-1, keepdim=True))
                delta.scatter_add_(-1, ids[part], grads)
                if ctx.temperature != 1.0:
                    delta.div_(ctx.temperature)
                if grad_bias is not None:
                    grad_bias += delta.sum(0)
                delta = delta.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = delta @ weight
                if grad_weight is not None:
                    if hidden.dtype == grad_weight.dtype:
                        grad_weight.addmm_(delta.t(), hidden[part])
                    elif _widens(hidden):
                        torch.addmm(grad_weight, delta.t(), hidden[part], out_dtype=torch.float32, out=grad_weight)
                    else:
                        grad_weight += delta.t() @ hidden[part]
                del delta  # or it would stay beside the next chunk's logits
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(weight.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )


def selected_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_elements: int | None = None,
) -> Tensor:
    """Log-probabilities of selected tokens under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: last hidden states, ``[M, H]``.
        weight: the output layer, ``[V, H]``, in the dtype of ``hidden``.
        bias: ``[V]`` or None.
        ids: ``[M, S]`` int64 token ids; S = 1 for sampled tokens, S = k for a teacher's top k.
        temperature: softmax temperature, > 0.
        chunk_elements: bound on the elements of one chunk of logits; default :data:`CHUNK_ELEMENTS`. The result does
            not depend on it.

    Returns:
        ``[M, S]`` log-probabilities in nats, differentiable once in hidden, weight and bias.

    Raises:
        ValueError: the temperature is not positive.

    Example:
        >>> h, w = torch.randn(5, 4, dtype=torch.double), torch.randn(11, 4, dtype=torch.double)
        >>> ids = torch.randint(11, (5, 2))
        >>> out = selected_logps(h, w, None, ids, chunk_elements=22)
        >>> torch.allclose(out, (h @ w.T).log_softmax(-1).gather(-1, ids))
        True
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    rows = chunk_rows(len(weight), chunk_elements, weight.device.type)
    logps: Tensor = _SelectedLogProbs.apply(hidden, weight, bias, ids, temperature, rows)
    return logps


@torch.no_grad()
def topk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *, chunk_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest logits of each position and the ids they belong to, chunk by chunk, without gradient.

    Args:
        hidden: ``[M, H]``.
        weight: ``[V, H]``, V >= k.
        bias: ``[V]`` or None.
        k: how many.
        chunk_elements: bound on the elements of one chunk of logits; default :data:`CHUNK_ELEMENTS`.

    Returns:
        ids ``[M, k]`` int32 and logits ``[M, k]`` float32 (float64 for float64 inputs), in descending order.

    Raises:
        ValueError: k is larger than the vocabulary.
    """
    if not 1 <= k <= len(weight):
        raise ValueError(f"top-k must be between 1 and the vocabulary's {len(weight)} tokens, got {k}")
    rows = chunk_rows(len(weight), chunk_elements, weight.device.type)
    ids, values = [], []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, max(len(hidden), 1), rows):
            top = wide_logits(hidden[start : start + rows], weight, bias, 1.0).topk(k, dim=-1)
            values.append(top.values)
            ids.append(top.indices.to(torch.int32))
    return torch.cat(ids), torch.cat(values)
