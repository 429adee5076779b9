"""Decoding several tokens at a time where a completion probably repeats a known text.

A privileged rollout often repeats the reference solution that its prompt shows. Its next tokens are therefore guessed
from that text and read by the policy in one forward pass (prompt lookup decoding: Saxena, 2023; speculative sampling:
Leviathan et al., 2023). Every position draws its token with the random number that belongs to it, so the completion is
the one that decoding token by token would have drawn; a wrong guess costs a little computation, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST, _MOST = 4, 64
_PATIENCE = 2
_NONE = -1


class Drafts:
    """Guesses for the rows of one decoding batch.

    A completion is taken to follow its draft token by token, at first from the beginning. A token that was replaced
    leaves the two aligned. Where guesses go wrong several times in a row, tokens were added or left out: the last two
    are then looked up in the draft, and the guesses go on behind the nearest place where they stand. Once these are
    wrong too, or the draft is used up, nothing more is guessed for the row.

    Args:
        drafts: one text a row, as token ids; may be empty.
        device: where the rows are decoded.
    """

    def __init__(self, drafts: Sequence[Sequence[int]], device: torch.device) -> None:
        width = max(map(len, drafts), default=0)
        rows = [[*d, *[_NONE] * (width - len(d))] for d in drafts]
        self.ids = torch.tensor(rows, dtype=torch.int64, device=device).view(len(drafts), width)
        self.lengths = torch.tensor([len(d) for d in drafts], dtype=torch.int64, device=device)
        #: How many tokens are guessed at a time: what went well last time, doubled.
        self.window = torch.full((len(drafts),), _MOST, device=device)
        self.shift = torch.zeros_like(self.window)  # token t of the completion is guessed to be token t + shift
        self.misses = torch.zeros_like(self.window)  # times in a row that not even the first guess was right

    def first(self, limit: int) -> tuple[Tensor, Tensor]:
        """Guess how the completions begin: at most ``limit`` tokens ``[R, m]``, and how many of each row are meant."""
        guessed = self.ids[:, : max(0, min(_MOST, limit))]
        return guessed.clamp_min(0), self.lengths.clamp_max(guessed.shape[1])

    def propose(self, last: Tensor, before: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor]:
        """Say where in its draft each completion goes on.

        Args:
            last: ``[R]`` the last token of each completion.
            before: ``[R]`` the one before it, -1 for none.
            emitted: ``[R]`` length of each completion so far.

        Returns:
            Place of the next token in each draft, and how many tokens from there on are guessed, both ``[R]``.
        """
        width = self.ids.shape[1]
        if width > 1:
            places = torch.arange(2, width + 1, device=last.device)
            found = (self.ids[:, :-1] == before[:, None]) & (self.ids[:, 1:] == last[:, None])
            distance = (places - (emitted + self.shift)[:, None]).abs()
            nearest = torch.where(found, distance, 2 * width + emitted.max()).argmin(-1) + 2
            lost = (self.misses >= _PATIENCE) & found.any(-1)
            self.shift = torch.where(lost, nearest - emitted, self.shift)
        start = (emitted + self.shift).clamp_min(0)
        return start, torch.minimum((self.lengths - start).clamp_min(0), self.window)

    def guesses(self, places: Tensor, num: int) -> Tensor:
        """Return ``[R, num]`` tokens of the drafts from given places on; what a row does not mean is some token too."""
        index = places[:, None] + torch.arange(num, device=places.device)
        # What is not meant is read by the policy all the same, so it must be a token.
        return (
            self.ids.gather(1, index.clamp_max(max(self.ids.shape[1] - 1, 0))).clamp_min(0) if num else self.ids[:, :0]
        )

    def learn(self, accepted: Tensor) -> None:
        """Guess more after good guesses, less after bad ones, then none; ``accepted`` ``[R]`` tokens were right."""
        self.misses = torch.where(accepted > 0, 0, self.misses + 1)
        self.window = torch.where(self.misses > _PATIENCE, 0, (2 * accepted).clamp(_LEAST, _MOST))

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for name in ("ids", "lengths", "window", "shift", "misses"):
            setattr(self, name, getattr(self, name)[rows])
