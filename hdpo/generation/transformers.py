"""Sampling with the policy's own weights: a short decode loop over a transformers model.

Why not ``model.generate``: a group of K samples shares its prompt, so the prompt is read once and its cache copied;
finished rows leave the batch instead of being decoded until the longest is done; keys are not copied to every query
head; log-probabilities are kept as tokens are drawn; and every token is drawn with a random number that depends on its
own seed and position alone, so that a sample does not depend on what else is in the batch. It is also what makes
drafts (:mod:`hdpo.generation.drafts`) exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hdpo.distributed import gathered_parameters
from hdpo.errors import ConfigError, check_at_least
from hdpo.experience import Completions
from hdpo.functional.logprobs import wide_logits
from hdpo.functional.random import uniform
from hdpo.functional.sampling import draw
from hdpo.generation.cache import SlotCache
from hdpo.generation.drafts import Drafts
from hdpo.generation.engine import GenerationEngine, SamplingConfig
from hdpo.generation.weights import cast_weights
from hdpo.policy import Policy
from hdpo.policy.architecture import reads_flat_mask
from hdpo.policy.attention import MASKED_KINDS, attention_kinds, attention_masks, grouped_attention

#: Bound on the elements of one [rows, vocabulary] block of logits, and of the float64 probabilities made of it, by
#: device: a CPU's caches want small blocks, a GPU few kernels (512 rows of 151,936 tokens are one block there).
_SAMPLE_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}


class TransformersEngine(GenerationEngine):
    """Samples with the policy's own weights; there is nothing to synchronise.

    Args:
        max_sequences: bound on the completions that are decoded at the same time (it bounds the cache's memory); those
            of one prompt always are, however many.
        compaction: finished rows are dropped when they make up at least this share of the batch.
        use_drafts: guess tokens from drafts where a caller gives some; the completions are the same without.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(self, max_sequences: int = 512, compaction: float = 0.125, use_drafts: bool = True) -> None:
        check_at_least(1, model__engine__max_sequences=max_sequences)
        if not 0 < compaction <= 1:
            raise ConfigError(f"model.engine.compaction must be in (0, 1], got {compaction}")
        self.max_sequences = max_sequences
        self.compaction = compaction
        self.use_drafts = use_drafts

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        seeds: Tensor,
        sampling: SamplingConfig,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Completions:
        """See :meth:`GenerationEngine.generate`.

        Raises:
            ConfigError: the policy has layers that are neither full nor sliding attention, or ALiBi that is made of a
                mask without queries.
        """
        num_prompts, num_samples = seeds.shape
        width = sampling.max_new_tokens
        device = policy.device
        num_rows = num_prompts * num_samples
        out = _Out(
            ids=torch.zeros(num_rows, width + 1, dtype=torch.int64, device=device),
            logps=torch.zeros(num_rows, width + 1, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=device),
            truncated=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )
        # Prompts of similar length decode together, which keeps the attention's columns few.
        order = sorted(range(num_prompts), key=lambda i: len(prompts[i]))
        per_wave = max(1, self.max_sequences // max(num_samples, 1))
        was_training = policy.training
        policy.eval()  # gradient checkpointing is active in training mode and would refuse the cache
        with gathered_parameters(policy), torch.inference_mode(), cast_weights(policy), grouped_attention(policy.model):
            for start in range(0, num_prompts if num_samples else 0, per_wave):
                wave = order[start : start + per_wave]
                rows = torch.tensor(wave)[:, None] * num_samples + torch.arange(num_samples)
                decoding = _Wave(
                    policy,
                    sampling,
                    self.compaction,
                    [list(prompts[i]) for i in wave],
                    seeds[wave].flatten().to(device),
                    rows.flatten().to(device),
                    out,
                )
                given = [drafts[i] for i in wave for _ in range(num_samples)] if drafts and self.use_drafts else []
                decoding.run(Drafts(given, device) if any(given) else None)
        policy.train(was_training)
        used = max(1, int(out.lengths.max())) if num_rows else 1
        shape = (num_prompts, num_samples, used)
        mask = torch.arange(used, device=device) < out.lengths[:, None]
        return Completions(
            ids=(out.ids[:, :used] * mask).view(shape),
            mask=mask.view(shape),
            logps=torch.where(mask, out.logps[:, :used], 0.0).view(shape),
            truncated=out.truncated.view(shape[:2]),
        )


@dataclass
class _Out:
    """Where completions are written.

    Attributes:
        ids: ``[rows, limit + 1]``; beyond a completion's length, and in the last column, anything may stand.
        logps: log-probabilities, same shape.
        lengths: ``[rows]`` tokens of each completion so far.
        truncated: ``[rows]``.
    """

    ids: Tensor
    logps: Tensor
    lengths: Tensor
    truncated: Tensor

    def write(self, cells: Tensor, ids: Tensor, logps: Tensor) -> None:
        """Write tokens to cells, which count row after row."""
        self.ids.view(-1).index_copy_(0, cells.flatten(), ids.flatten())
        self.logps.view(-1).index_copy_(0, cells.flatten(), logps.flatten().to(self.logps.dtype))


class _Wave:
    """The prompts that are decoded together, from their common prefill to the last finished row.

    Args:
        policy: whose weights are sampled.
        sampling: limits and temperature.
        compaction: see :class:`TransformersEngine`.
        prompts: P prompts.
        seeds: ``[R]``, R / P samples of each prompt.
        rows: ``[R]``, which row of ``out`` each is.
        out: where the completions go.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: SamplingConfig,
        compaction: float,
        prompts: list[list[int]],
        seeds: Tensor,
        rows: Tensor,
        out: _Out,
    ) -> None:
        self.policy, self.sampling, self.compaction, self.out = policy, sampling, compaction, out
        kinds = attention_kinds(policy.model)
        unknown = [f"layers of kind {kind}" for kind in sorted(set(kinds) - MASKED_KINDS)]
        if reads_flat_mask(policy.model.config):
            unknown.append("ALiBi")
        if unknown:
            raise ConfigError(
                f"model.engine: the transformers engine cannot decode a {policy.model.config.model_type} with "
                f"{', '.join(unknown)}; choose hdpo.generation.VLLMEngine"
            )
        self.prompts, self.rows = prompts, rows
        device, self.limit = seeds.device, sampling.max_new_tokens
        self.repeats = len(seeds) // len(prompts)
        self.numbers = uniform(seeds[:, None], torch.arange(self.limit, device=device))  # [R, limit]
        self.ends = torch.tensor([len(p) for p in prompts], device=device)
        self.width = max(map(len, prompts))
        self.eos = torch.tensor(sampling.eos_token_ids, device=device)
        self.num_layers = len(kinds)
        #: A completion's token t stands at position starts + t.
        self.starts = self.ends.repeat_interleave(self.repeats)
        self.lengths = torch.zeros_like(seeds)  # tokens of each completion so far
        self.ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        self.done = torch.zeros_like(self.ended)  # ended, or as long as it may be

    # ------------------------------------------------------------------ the model

    def _hidden(self, input_ids: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """Last hidden states ``[rows, m, H]``; the cache takes the tokens."""
        hidden: Tensor = self.policy.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return hidden

    def _prefill(self, guesses: list[list[int]], num: int) -> tuple[Tensor, Tensor]:
        """Read each prompt once, with what is guessed to follow, and draw a token behind it and behind each guess.

        Args:
            guesses: tokens that may follow each of the P prompts; may be empty lists.
            num: tokens to draw for each row: one more than the longest guess.

        Returns:
            Token ids and log-probs, ``[R, num]``.
        """
        device, shape = self.rows.device, (len(self.prompts), self.repeats, -1)
        rows = [p + g for p, g in zip(self.prompts, guesses, strict=True)]
        width = max(map(len, rows))
        # Padding on the right is never attended to: its columns are overwritten before a query stands behind them.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        self.cache = SlotCache(self.num_layers, width, self.width + self.limit, self.policy.compute_dtype)
        hidden = self._hidden(ids, torch.arange(width, device=device).expand_as(ids), None)
        prompts = torch.arange(len(rows), device=device)
        places = (self.ends[:, None] - 1 + torch.arange(num, device=device)).clamp_max(width - 1)
        hidden = hidden[prompts[:, None], places]
        self.cache.select(prompts.repeat_interleave(self.repeats))
        # All samples of a prompt draw from one distribution per position.
        numbers = self.numbers[:, :num].reshape(shape).transpose(1, 2).flatten(0, 1)
        drawn = self._draw(hidden.flatten(0, 1), numbers)
        tokens, logps = (x.view(len(rows), -1, self.repeats).transpose(1, 2).flatten(0, 1) for x in drawn)
        return tokens, logps

    def _read(self, tokens: Tensor, steps: Tensor, num_columns: int) -> Tensor:
        """Hidden states ``[rows, m, H]`` of tokens ``[rows, m]``, which stand at ``steps`` of their completions.

        No position is ``num_columns`` or more.
        """
        positions = self.starts[:, None] + steps
        self.cache.write_at(positions, num_columns)
        columns = torch.arange(num_columns, device=positions.device)
        mask = attention_masks(self.policy.model, positions, columns, self.policy.compute_dtype)
        return self._hidden(tokens, positions, mask)

    def _draw(self, hidden: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and log-probs in the shape of ``numbers``, ``[n, ...]``, from hidden states ``[n, H]``.

        A bounded block of logits at a time.
        """
        hidden, weight, bias = self.policy.output_layer(hidden)
        size = max(1, _SAMPLE_ELEMENTS.get(weight.device.type, 1 << 25) // len(weight))
        drawn = []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = wide_logits(hidden[part], weight, bias)
            drawn.append(draw(logits, numbers[part], self.sampling.temperature))
        return drawn[0] if len(drawn) == 1 else (torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn]))

    def _is_end(self, tokens: Tensor) -> Tensor:
        return tokens == self.eos if len(self.eos) == 1 else torch.isin(tokens, self.eos)

    # ------------------------------------------------------------------ rows

    def _append(self, tokens: Tensor, logps: Tensor, accepted: Tensor | None) -> Tensor:
        """Write tokens ``[rows, m]`` behind the completions, of which ``accepted`` (None: one) belong to each.

        Returns:
            The last token of each row that belongs to it, ``[rows]``; of a finished row, any.
        """
        columns = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        # Guesses that were wrong, and what a finished row goes on to draw, lie behind the completion.
        self.out.write(self.rows[:, None] * (self.limit + 1) + columns.clamp_max(self.limit), tokens, logps)
        last = tokens[:, 0] if accepted is None else tokens.gather(1, accepted[:, None] - 1)[:, 0]
        self.lengths += ~self.done if accepted is None else torch.where(self.done, 0, accepted)
        self.ended |= self._is_end(last) & ~self.done
        self.done |= self.ended | (self.lengths >= self.limit)
        return last

    def _note(self) -> None:
        """Note how long the completions are by now, and which would be cut off there."""
        self.out.lengths[self.rows] = self.lengths
        self.out.truncated[self.rows] = ~self.ended

    def _keep(self, num_done: int) -> Tensor | None:
        """Drop finished rows where they are many; returns which are left, or None where all stay."""
        if num_done < self.compaction * len(self.done):
            return None
        # nonzero() would read its size from the device once more.
        keep = self.done.int().argsort(stable=True)[: len(self.done) - num_done]
        self._note()
        self.cache.select(keep)
        for name in ("rows", "numbers", "starts", "lengths", "ended", "done"):
            setattr(self, name, getattr(self, name)[keep])
        return keep

    def run(self, drafts: Drafts | None) -> None:
        """Decode as many tokens at a time as the drafts guess rightly; one by one when nothing is guessed any more."""
        limit, num_columns = self.limit, self.width
        guesses: list[list[int]] = [[] for _ in self.prompts]
        if drafts is not None:
            guessed, counts = drafts.first(limit - 1)
            samples = zip(guessed[:: self.repeats].tolist(), counts[:: self.repeats].tolist(), strict=True)
            guesses = [ids[:count] for ids, count in samples]
        tokens, logps = self._prefill(guesses, 1 if drafts is None else guessed.shape[1] + 1)
        last = torch.full_like(self.lengths, -1)
        while True:
            if drafts is None:
                last = self._append(tokens, logps, None)
                num_done = int(self.done.sum())
                # Rows go on at their own places; the one in front may have ended.
                num_columns = min(num_columns + 1, self.width + limit)
            else:
                right = self._num_right(tokens, guessed, counts)
                drafts.learn(right)
                accepted = torch.minimum(1 + right, limit - self.lengths).clamp_min(1)
                before, last = last, self._append(tokens, logps, accepted)
                before = torch.where(accepted > 1, tokens.gather(1, (accepted[:, None] - 2).clamp_min(0))[:, 0], before)
                places, counts = drafts.propose(last, before, self.lengths)
                num_done, *bounds = self._bounds(counts)
            if num_done == len(self.done):
                break
            keep = self._keep(num_done)
            last = last if keep is None else last[keep]
            steps, given = self.lengths[:, None], last[:, None]
            if drafts is not None:
                if keep is not None:
                    places, counts = places[keep], counts[keep]
                    drafts.select(keep)
                most, num_columns = bounds[:2] if keep is None else bounds[2:]
                guessed = drafts.guesses(places, most)
                given = torch.cat([given, guessed], -1)
                steps = steps + torch.arange(given.shape[1], device=steps.device)
                drafts = drafts if most else None
            # A guess may reach beyond the limit; the column of the last token is never attended to.
            hidden = self._read(given, (steps - 1).clamp_max(limit - 1), num_columns)
            numbers = self.numbers.gather(1, steps.clamp_max(limit - 1))
            tokens, logps = (x.view(given.shape) for x in self._draw(hidden.flatten(0, 1), numbers.flatten()))
        self._note()

    def _bounds(self, counts: Tensor) -> list[int]:
        """What decoding must know on the host, in one read.

        Returns:
            Number of finished rows; most guesses of a row and columns that they need, with all rows; the same without
            the finished ones.
        """
        bounds = [self.done.sum()]
        for rows in (torch.ones_like(self.done), ~self.done):
            most = (counts * rows).max()
            ends = self.starts + (self.lengths - 1 + most).clamp_max(self.limit - 1)
            bounds += [most, (ends * rows).max() + 1]
        return torch.stack(bounds).tolist()

    def _num_right(self, tokens: Tensor, guessed: Tensor, counts: Tensor) -> Tensor:
        """How many guesses of each row are what was drawn in their place, before the completion's end."""
        drawn = tokens[:, :-1]
        right = (drawn == guessed) & ~self._is_end(drawn)
        right &= torch.arange(right.shape[1], device=right.device) < counts[:, None]
        return right.long().cumprod(-1).sum(-1)
