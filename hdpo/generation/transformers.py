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
from hdpo.functional.random import uniform
from hdpo.generation.cache import SlotCache
from hdpo.generation.drafts import Drafts
from hdpo.generation.engine import GenerationEngine, SamplingConfig
from hdpo.policy import Policy
from hdpo.policy.attention import MASKED_KINDS, attention_kinds, attention_masks, grouped_attention

__all__ = ["TransformersEngine"]

#: Bound on the elements of one [rows, vocabulary] block of logits, and of the float64 probabilities made of it.
_SAMPLE_ELEMENTS = 1 << 25


class TransformersEngine(GenerationEngine):
    """Samples with the policy's own weights; there is nothing to synchronise.

    Args:
        max_sequences: bound on the completions that are decoded at the same time (it bounds the cache's memory).
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
            ConfigError: the policy has layers that are neither full nor sliding attention.
        """
        num_prompts, num_samples = seeds.shape
        width = sampling.max_new_tokens
        device = policy.device
        num_rows = num_prompts * num_samples
        out = _Out(
            ids=torch.zeros(num_rows * width, dtype=torch.int64, device=device),
            logps=torch.zeros(num_rows * width, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=device),
            truncated=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )
        # Prompts of similar length decode together, which keeps the attention's columns few.
        order = sorted(range(num_prompts), key=lambda i: len(prompts[i]))
        per_wave = max(1, self.max_sequences // max(num_samples, 1))
        was_training = policy.training
        policy.eval()  # gradient checkpointing is active in training mode and would refuse the cache
        with gathered_parameters(policy), grouped_attention(policy.model), torch.inference_mode():
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
                if drafts is not None and self.use_drafts:
                    decoding.run_with_drafts(Drafts([drafts[i] for i in wave for _ in range(num_samples)], device))
                else:
                    decoding.run()
        policy.train(was_training)
        used = max(1, int(out.lengths.max())) if num_rows else 1
        shape = (num_prompts, num_samples, used)
        mask = torch.arange(used, device=device) < out.lengths[:, None]
        return Completions(
            ids=(out.ids.view(num_rows, width)[:, :used] * mask).view(shape),
            mask=mask.view(shape),
            logps=torch.where(mask, out.logps.view(num_rows, width)[:, :used], 0.0).view(shape),
            truncated=out.truncated.view(shape[:2]),
        )


@dataclass
class _Out:
    """Where completions are written.

    Attributes:
        ids: ``[rows * tokens]``, flat; beyond a completion's length anything may stand.
        logps: log-probabilities, same shape.
        lengths: ``[rows]`` tokens of each completion so far.
        truncated: ``[rows]``.
    """

    ids: Tensor
    logps: Tensor
    lengths: Tensor
    truncated: Tensor


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
        unknown = sorted(set(kinds) - MASKED_KINDS)
        if unknown:
            raise ConfigError(
                f"the transformers engine cannot decode a {policy.model.config.model_type} with layers of kind "
                f"{', '.join(unknown)}; choose hdpo.generation.VLLMEngine"
            )
        self.prompts, self.rows, self.seeds = prompts, rows, seeds
        device, self.limit = seeds.device, sampling.max_new_tokens
        self.repeats = len(seeds) // len(prompts)
        self.ends = torch.tensor([len(p) for p in prompts], device=device)
        self.width = max(map(len, prompts))
        self.eos = torch.tensor(sampling.eos_token_ids, device=device)
        self.num_layers = len(kinds)
        #: A completion's token t stands at position starts + t.
        self.starts = self.ends.repeat_interleave(self.repeats)
        self.lengths = torch.zeros_like(seeds)  # tokens of each completion so far
        self.done = torch.zeros(len(seeds), dtype=torch.bool, device=device)

    # ------------------------------------------------------------------ the model

    def _hidden(self, input_ids: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """Last hidden states ``[rows, m, H]``; the cache takes the tokens."""
        hidden: Tensor = self.policy.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return hidden

    def _prefill(self, guesses: list[list[int]], numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Read each prompt once, with what is guessed to follow, and draw a token behind it and behind each guess.

        Args:
            guesses: tokens that may follow each of the P prompts; may be empty lists.
            numbers: ``[R, m]`` random numbers, m being one more than the longest guess.

        Returns:
            Token ids and log-probs, ``[R, m]``.
        """
        device, shape = self.seeds.device, (len(self.prompts), self.repeats, -1)
        rows = [p + g for p, g in zip(self.prompts, guesses, strict=True)]
        width = max(map(len, rows))
        # Padding on the right is never attended to: its columns are overwritten before a query stands behind them.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        self.cache = SlotCache(self.num_layers, width, self.width + self.limit)
        hidden = self._hidden(ids, torch.arange(width, device=device).expand_as(ids), None)
        prompts = torch.arange(len(rows), device=device)
        places = (self.ends[:, None] - 1 + torch.arange(numbers.shape[1], device=device)).clamp_max(width - 1)
        hidden = hidden[prompts[:, None], places]
        self.cache.select(prompts.repeat_interleave(self.repeats))
        # All samples of a prompt draw from one distribution per position.
        drawn = self._draw(hidden.flatten(0, 1), numbers.reshape(shape).transpose(1, 2).flatten(0, 1))
        tokens, logps = (x.view(len(rows), -1, self.repeats).transpose(1, 2).flatten(0, 1) for x in drawn)
        return tokens, logps

    def _read(self, tokens: Tensor, positions: Tensor, num_columns: int) -> Tensor:
        """Hidden states ``[rows, m, H]`` of tokens ``[rows, m]``; no position is ``num_columns`` or more."""
        self.cache.write_at(positions, num_columns)
        columns = torch.arange(num_columns, device=positions.device)
        mask = attention_masks(self.policy.model, positions, columns, self.policy.compute_dtype)
        return self._hidden(tokens, positions, mask)

    def _draw(self, hidden: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and log-probs in the shape of ``numbers``, ``[n, ...]``, from hidden states ``[n, H]``.

        A bounded block of logits at a time.
        """
        hidden, weight, bias = self.policy.output_layer(hidden)
        size = max(1, _SAMPLE_ELEMENTS // len(weight))
        drawn = []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            drawn.append(draw(logits, numbers[part], self.sampling.temperature))
        return drawn[0] if len(drawn) == 1 else (torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn]))

    def _is_end(self, tokens: Tensor) -> Tensor:
        return tokens == self.eos if len(self.eos) == 1 else torch.isin(tokens, self.eos)

    # ------------------------------------------------------------------ rows

    def _keep(self, num_done: int) -> Tensor | None:
        """Drop finished rows where they are many; returns which are left, or None where all stay."""
        if num_done < self.compaction * len(self.done):
            return None
        keep = (~self.done).nonzero()[:, 0]
        self.out.lengths[self.rows] = self.lengths
        self.cache.select(keep)
        self.rows, self.seeds, self.starts = self.rows[keep], self.seeds[keep], self.starts[keep]
        self.lengths, self.done = self.lengths[keep], self.done[keep]
        return keep

    def run(self) -> None:
        """Decode token by token."""
        limit, device = self.limit, self.seeds.device
        numbers = uniform(self.seeds[:, None], torch.arange(limit, device=device))
        drawn = self._prefill([[] for _ in self.prompts], numbers[:, :1])
        tokens, logps = drawn[0][:, 0], drawn[1][:, 0]
        for step in range(limit):
            cells = self.rows * limit + step
            # What a finished row goes on to draw lies behind its length.
            self.out.ids.index_copy_(0, cells, tokens)
            self.out.logps.index_copy_(0, cells, logps.to(self.out.logps.dtype))
            self.lengths += ~self.done
            self.done |= self._is_end(tokens)
            num_done = int(self.done.sum())
            if num_done == len(self.done) or step + 1 == limit:
                break
            keep = self._keep(num_done)
            if keep is not None:
                tokens, numbers = tokens[keep], numbers[keep]
            positions = (self.starts + step)[:, None]
            hidden = self._read(tokens[:, None], positions, self.width + step + 1)[:, 0]
            tokens, logps = self._draw(hidden, numbers[:, step + 1])
        self.out.truncated[self.rows] = ~self.done
        self.out.lengths[self.rows] = self.lengths

    def run_with_drafts(self, drafts: Drafts) -> None:
        """Decode as many tokens at a time as the drafts guess rightly."""
        limit, device = self.limit, self.seeds.device
        guessed, counts = drafts.first(limit - 1)
        steps = torch.arange(guessed.shape[1] + 1, device=device)
        samples = zip(guessed[:: self.repeats].tolist(), counts[:: self.repeats].tolist(), strict=True)
        tokens, logps = self._prefill([g[:n] for g, n in samples], uniform(self.seeds[:, None], steps))
        accepted = 1 + self._num_right(tokens, guessed, counts)  # of the tokens that were drawn last
        drafts.learn(accepted - 1)
        before = torch.full_like(self.seeds, -1)  # the last token but one
        while True:
            offsets = torch.arange(tokens.shape[1], device=device)
            fresh = ((offsets < accepted[:, None]) & ~self.done[:, None]).nonzero(as_tuple=True)
            cells = ((self.rows * limit + self.lengths)[:, None] + offsets)[fresh]
            self.out.ids.index_copy_(0, cells, tokens[fresh])
            self.out.logps.index_copy_(0, cells, logps[fresh].to(self.out.logps.dtype))
            last = tokens.gather(1, accepted[:, None] - 1)[:, 0]
            before = torch.where(accepted > 1, tokens.gather(1, (accepted[:, None] - 2).clamp_min(0))[:, 0], before)
            self.lengths = torch.where(self.done, self.lengths, self.lengths + accepted)
            ended, full = self._is_end(last), self.lengths >= limit
            self.out.truncated[self.rows] |= full & ~ended & ~self.done
            self.done |= ended | full
            num_done = int(self.done.sum())
            if num_done == len(self.done):
                break
            keep = self._keep(num_done)
            if keep is not None:
                last, before = last[keep], before[keep]
                drafts.select(keep)

            guessed, counts = drafts.propose(last, before, self.lengths)
            given = torch.cat([last[:, None], guessed], -1)
            steps = self.lengths[:, None] + torch.arange(given.shape[1], device=device)
            # A guess may reach beyond the limit; the column of the last token is never attended to.
            positions = self.starts[:, None] + (steps - 1).clamp_max(limit - 1)
            hidden = self._read(given, positions, int(positions.max()) + 1)
            tokens, logps = (
                x.view(given.shape)
                for x in self._draw(hidden.flatten(0, 1), uniform(self.seeds[:, None], steps).flatten())
            )
            accepted = 1 + self._num_right(tokens, guessed, counts)
            drafts.learn(accepted - 1)
            accepted = torch.minimum(accepted, limit - self.lengths).clamp_min(1)
            before = last
        self.out.lengths[self.rows] = self.lengths

    def _num_right(self, tokens: Tensor, guessed: Tensor, counts: Tensor) -> Tensor:
        """How many guesses of each row are what was drawn in their place, before the completion's end."""
        drawn = tokens[:, :-1]
        right = (drawn == guessed) & ~self._is_end(drawn)
        right &= torch.arange(right.shape[1], device=right.device) < counts[:, None]
        return right.long().cumprod(-1).sum(-1)


def draw(logits: Tensor, numbers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw tokens by inverting the cumulative distribution at uniform numbers.

    Args:
        logits: ``[R, V]``.
        numbers: ``[R]`` float64 in [0, 1), see :func:`hdpo.functional.random.uniform`; ``[R, K]`` for K tokens per row.
        temperature: 0 takes the most likely token.

    Returns:
        Token ids and their log-probabilities (nats) in the shape of ``numbers``, under the distribution that was
        sampled; with temperature 0 under the one of temperature 1.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20_000, 3)
        >>> ids, _ = draw(logits, (torch.arange(20_000) + 0.5).double() / 20_000, 1.0)
        >>> (ids.bincount() / 20_000 - logits[0].softmax(-1)).abs().max().item() < 0.001
        True
    """
    wanted = numbers.contiguous().view(len(numbers), -1)
    scaled = logits if temperature in (0, 1) else logits / temperature
    log_probs = scaled.log_softmax(-1)
    if temperature == 0:
        picked = logits.argmax(-1, keepdim=True).expand_as(wanted)
    else:
        # float64, because the sum of 150,000 float32 probabilities misses the tail's.
        cumulative = log_probs.to(torch.float64, copy=True).exp_().cumsum_(-1)
        picked = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)
        picked.clamp_(max=logits.shape[-1] - 1)
    return picked.view(numbers.shape), log_probs.gather(-1, picked).view(numbers.shape)
