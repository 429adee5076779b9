"""Micro-batches: which sequences go through the model together, and how they lie in the tensors.

The result never depends on it; the cost does. Three layouts:

* ``padded``: one row per sequence, padded on the right, from length-sorted sequences.
* ``packed``: all sequences in one row, without padding. For attention that knows where each begins and ends (on a GPU).
* ``shared``: prompts that several sequences begin with are read once, and only completions have rows. The K rollouts of
  a group share their prompt, so this saves up to (K - 1) / K of all prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hdpo.experience import Sequences

Layout = Literal["padded", "packed", "shared"]

#: Reading prompts apart makes two forward passes of one, and attention with a mask is slower than causal attention. To
#: be worth it, sharing has to save so many tokens a micro-batch (see benchmarks/update.py) and a tenth of all.
_PASS, _WORTH = 256, 0.9


def on_device(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor; to a GPU from pinned memory, since another copy waits for all that was queued."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class Prefixes:
    """The prompts of a ``shared`` micro-batch, each once.

    Attributes:
        ids: ``[P, W]``, padded on the right.
        lengths: ``[P]``.
        rows: ``[n]``, which of them each sequence begins with.
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor


@dataclass
class TokenBatch:
    """One micro-batch, ready for the model.

    Attributes:
        input_ids: ``padded``: ``[n, L]``, padded on the right. Under causal attention padding on the right is never
            attended to, so no attention mask is needed and the result does not depend on how much padding there is.
            ``packed``: ``[1, L]``. ``shared``: ``[n, L]`` completions without their last token, L may be 0.
        positions: ``[M]`` where the hidden state that predicts a completion token stands, as flat index into the
            hidden states of ``input_ids``; where prefixes are shared, into those of the prefixes ``[P * W]`` followed
            by those of ``input_ids``.
        targets: ``[M]`` the completion tokens, sequence after sequence.
        lengths: number of completion tokens of each of the n sequences (they sum to M).
        position_ids: ``packed``: ``[1, L]``, counting from 0 in each sequence; else None.
        bounds: ``packed``: ``[n + 1]`` int32, where each sequence begins, and L; else None.
        longest: tokens of the longest sequence.
        prefixes: ``shared``: the prompts; else None.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    lengths: list[int]
    position_ids: Tensor | None = None
    bounds: Tensor | None = None
    longest: int = 0
    prefixes: Prefixes | None = None

    @classmethod
    def placeholder(cls, device: torch.device) -> TokenBatch:
        """One token behind a context of one: for a rank that only takes part in a forward pass of all ranks."""
        return cls.from_sequences(Sequences([[0]], [[0]]), device)

    @classmethod
    def from_sequences(cls, sequences: Sequences, device: torch.device, layout: Layout = "padded") -> TokenBatch:
        """Lay out ragged sequences; every context and every completion must hold at least one token."""
        prompts, completions = sequences
        position_ids: Tensor | None = None
        bounds: Tensor | None = None
        prefixes: Prefixes | None = None
        match layout:
            case "padded":
                width = max(sequences.lengths())
                rows = [_padded(p + c, width) for p, c in zip(prompts, completions, strict=True)]
                starts = [i * width + len(p) - 1 for i, p in enumerate(prompts)]
                places = _places(starts, completions)
            case "packed":
                rows = [[t for p, c in zip(prompts, completions, strict=True) for t in (*p, *c)]]
                ends = [0, *accumulate(sequences.lengths())]
                places = _places([e + len(p) - 1 for e, p in zip(ends, prompts, strict=False)], completions)
                bounds = on_device(ends, device, torch.int32)
                position_ids = on_device([[i for n in sequences.lengths() for i in range(n)]], device)
            case _:
                unique = list(dict.fromkeys(map(tuple, prompts)))
                number = {prompt: i for i, prompt in enumerate(unique)}
                which = [number[tuple(p)] for p in prompts]
                widest = max(map(len, unique))
                width = max(map(len, completions)) - 1
                rows = [_padded(c[:-1], width) for c in completions]
                places = []
                for i, (p, c) in enumerate(zip(which, completions, strict=True)):
                    first = len(unique) * widest + i * width
                    places += [p * widest + len(unique[p]) - 1, *range(first, first + len(c) - 1)]
                prefixes = Prefixes(
                    on_device([_padded(list(p), widest) for p in unique], device),
                    on_device([len(p) for p in unique], device),
                    on_device(which, device),
                )
        return cls(
            on_device(rows, device, torch.int64).view(len(rows), -1 if rows[0] else 0),
            on_device(places, device, torch.int64),
            on_device([t for c in completions for t in c], device, torch.int64),
            [len(c) for c in completions],
            position_ids,
            bounds,
            max(sequences.lengths()),
            prefixes,
        )


def _padded(ids: list[int], width: int) -> list[int]:
    return ids + [0] * (width - len(ids))


def _places(starts: list[int], completions: list[list[int]]) -> list[int]:
    return [i for start, c in zip(starts, completions, strict=True) for i in range(start, start + len(c))]


class Packing(NamedTuple):
    """Micro-batches of sequences.

    Attributes:
        groups: indices of the sequences of each; every sequence occurs exactly once.
        layout: of all of them.
        num_tokens: tokens that go through the model, padding included.
    """

    groups: list[list[int]]
    layout: Layout
    num_tokens: int


class _Group:
    """A micro-batch that grows, and what it costs."""

    def __init__(self, padded: bool) -> None:
        self.indices: list[int] = []
        self.padded = padded
        self.cost = self.total = self.longest = self.widest = 0
        self.prompts: set[int] = set()

    def cost_with(self, length: int, prompt: int | None, width: int) -> int:
        """Tokens after adding a sequence of that length, behind a shared prompt of that number and width."""
        if not self.padded:
            return self.total + length
        shared = len(self.prompts) + (prompt is not None and prompt not in self.prompts)
        return (len(self.indices) + 1) * max(self.longest, length) + shared * max(self.widest, width)

    def add(self, index: int, length: int, prompt: int | None, width: int) -> None:
        self.cost = self.cost_with(length, prompt, width)
        self.indices.append(index)
        self.total += length
        self.longest, self.widest = max(self.longest, length), max(self.widest, width)
        if prompt is not None:
            self.prompts.add(prompt)


def _fill(
    order: Sequence[int], lengths: Sequence[int], budget: int, prompts: Sequence[tuple[int, int]] | None, layout: Layout
) -> Packing:
    """Take sequences in order, and begin a new group where the next would exceed the budget.

    One that alone exceeds the budget gets a group of its own.
    """
    groups: list[_Group] = []
    for i in order:
        item = (lengths[i], *(prompts[i] if prompts is not None else (None, 0)))
        if not groups or groups[-1].cost_with(*item) > budget:
            groups.append(_Group(padded=layout != "packed"))
        groups[-1].add(i, *item)
    return Packing([g.indices for g in groups], layout, sum(g.cost for g in groups))


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def pack(sequences: Sequences, token_budget: int, layouts: Sequence[Layout] = ("padded",)) -> Packing:
    """Group sequences into micro-batches, in the one of several layouts that costs the fewest tokens.

    Args:
        sequences: N contexts with completions.
        token_budget: bound on the tokens of a micro-batch, padding included.
        layouts: to choose from, the first being the default: another must save so much that it is worth it.

    Returns:
        The micro-batches.

    Example:
        >>> prompt = [7] * 1000
        >>> pack(Sequences([prompt] * 3, [[1, 2], [1], [3, 4]]), 4096, ("padded", "shared"))
        Packing(groups=[[0, 2, 1]], layout='shared', num_tokens=1003)
    """
    best = min(_packings(sequences, token_budget, layouts[0]), key=lambda p: p.num_tokens)
    for layout in layouts[1:]:
        other = min(_packings(sequences, token_budget, layout), key=lambda p: p.num_tokens)
        if other.num_tokens + _PASS * len(other.groups) < _WORTH * best.num_tokens:
            best = other
    return best


def _packings(sequences: Sequences, budget: int, layout: Layout) -> list[Packing]:
    if layout != "shared":
        lengths = sequences.lengths()
        return [_fill(_by_length(lengths), lengths, budget, None, layout)]
    number: dict[tuple[int, ...], int] = {}
    prompts = [(number.setdefault(tuple(p), len(number)), len(p)) for p in sequences.prompt_ids]
    rest = [len(c) - 1 for c in sequences.completion_ids]
    longest = [0] * len(number)
    for (prompt, _), n in zip(prompts, rest, strict=True):
        longest[prompt] = max(longest[prompt], n)
    # By length the completions need little padding; by group the prompts are read once in all micro-batches together.
    orders = (
        _by_length(rest),
        sorted(range(len(rest)), key=lambda i: (-longest[prompts[i][0]], prompts[i][0], -rest[i])),
    )
    return [_fill(order, rest, budget, prompts, layout) for order in orders]
