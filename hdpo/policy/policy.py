"""The policy: any causal language model of transformers, read token by token.

The policy knows nothing of parallelism (:mod:`hdpo.distributed` shards it) and nothing of losses. It turns ragged
sequences into per-token numbers: log-probabilities of what was sampled, or of a teacher's top k.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.files import whole_folder
from hdpo.functional.logprobs import selected_logps, topk_logits
from hdpo.policy.architecture import check_architecture, counts_columns, is_compiled
from hdpo.policy.attention import (
    MASKED_KINDS,
    PrefixCache,
    attention_kinds,
    attention_masks,
    causal_attention,
    grouped_attention,
    packs_in_kernel,
)
from hdpo.policy.loading import PolicyConfig, load_model
from hdpo.policy.lora import is_adapter, merged_weight, merged_weights, save_adapter
from hdpo.policy.packing import Layout, Packing, TokenBatch, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Policy(nn.Module):
    """A causal language model whose output layer is applied to chunks of positions only.

    Args:
        model: a transformers model with a base model and an output embedding.
        chunk_elements: see :func:`hdpo.functional.logprobs.selected_logps`.
    """

    def __init__(self, model: PreTrainedModel, chunk_elements: int | None = None) -> None:
        super().__init__()
        check_architecture(model.config)
        self.model = model
        self.chunk_elements = chunk_elements
        # Dropout would make the policy that is trained another one than the policy that was sampled.
        for module in (*model.modules(), model.config.get_text_config()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():
                if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
                    setattr(module, name, 0.0)

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Load weights and architecture; see :func:`~hdpo.policy.loading.load_model`."""
        return cls(load_model(config))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Number of rows of the output layer (it may exceed the tokenizer's vocabulary)."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def backbone(self) -> nn.Module:
        """The model without its output layer."""
        return self.model.base_model

    @property
    def has_adapter(self) -> bool:
        """Whether low-rank matrices are trained in place of the weights."""
        return any(is_adapter(name) for name, _ in self.model.named_parameters())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, under their checkpoint names; an adapter is merged into them."""
        return merged_weights(self.model)

    def weight(self, name: str) -> Tensor:
        """One of :meth:`named_weights`."""
        return merged_weight(self.model, name)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """All that the computation depends on."""
        return self.model.parameters()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion, from the generation config and the model config."""
        for config in (self.model.generation_config, self.model.config):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
        raise ConfigError("the policy names no eos_token_id in generation_config.json or config.json")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of products: autocast's if it is active, else that of the weights."""
        weight = cast(Tensor, self.model.get_output_embeddings().weight)
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def output_layer(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden states, output weight and bias in the dtype of the computation (autocast's, if active)."""
        head = self.model.get_output_embeddings()
        dtype = self.compute_dtype
        bias = getattr(head, "bias", None)
        return hidden.to(dtype), head.weight.to(dtype), None if bias is None else bias.to(dtype)

    def pack(self, sequences: Sequences, token_budget: int) -> Packing:
        """Group sequences into micro-batches in the layout that costs this policy the fewest tokens."""
        plain: Layout = "packed" if self._packs() else "padded"
        return pack(sequences, token_budget, (plain, "shared") if self._shares_prefixes() else (plain,))

    def _packs(self) -> bool:
        # Compiled layers were measured on padded rows alone.
        in_kernel = packs_in_kernel(self.model, self.device, self.compute_dtype) and not is_compiled(self.model)
        return in_kernel or self._is_flash()

    def _is_flash(self) -> bool:
        return cast(bool, self.model.config.get_text_config()._attn_implementation.startswith("flash"))

    def _shares_prefixes(self) -> bool:
        if self._is_flash():
            return False
        # Recomputed layers take no cache, compiled ones none that grows. A sharded policy would gather its weights for
        # the prompts once more, and all ranks would have to agree on the layout.
        sharded = any(hasattr(p, "device_mesh") for p in self.parameters())
        if self.model.is_gradient_checkpointing or is_compiled(self.model) or sharded:
            return False
        return set(attention_kinds(self.model)) <= MASKED_KINDS and not counts_columns(self.model.config)

    def _hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states ``[M, H]`` that predict the completion tokens; all others never meet the output layer."""
        if batch.prefixes is not None:
            return self._hidden_after_prefixes(batch)
        read, bounds = partial(self.backbone, input_ids=batch.input_ids, use_cache=False), batch.bounds
        if bounds is None:
            with causal_attention(self.model):
                hidden = read().last_hidden_state
        elif self._packs():
            ends: dict[str, Any] = {f"cu_seq_lens_{x}": bounds for x in "qk"}
            ends |= {f"max_length_{x}": batch.longest for x in "qk"}
            with causal_attention(self.model):
                hidden = read(position_ids=batch.position_ids, **ends).last_hidden_state
        else:  # the model looks for the bounds itself
            hidden = read(position_ids=batch.position_ids).last_hidden_state
        return cast(Tensor, hidden).flatten(0, 1).index_select(0, batch.positions)

    def _hidden_after_prefixes(self, batch: TokenBatch) -> Tensor:
        """Read each prompt once, then all completions behind the keys and values of theirs."""
        prefixes = batch.prefixes
        assert prefixes is not None
        cache = PrefixCache(len(attention_kinds(self.model)), prefixes.rows)
        width = prefixes.ids.shape[1]
        columns = torch.arange(width, device=self.device)
        read = partial(self.backbone, past_key_values=cache, use_cache=True)
        # Padding on the right: causal attention never looks at it, the completions' mask leaves it out.
        hidden = read(input_ids=prefixes.ids, position_ids=columns.expand_as(prefixes.ids)).last_hidden_state
        parts = [hidden.flatten(0, 1)]
        if batch.input_ids.shape[1]:
            lengths = prefixes.lengths[prefixes.rows][:, None]
            positions = lengths + torch.arange(batch.input_ids.shape[1], device=self.device)
            beyond = width + batch.input_ids.shape[1]
            keys = torch.cat([torch.where(columns < lengths, columns, beyond), positions], -1)
            mask = attention_masks(self.model, positions, keys, self.compute_dtype)
            with grouped_attention(self.model):
                hidden = read(input_ids=batch.input_ids, position_ids=positions, attention_mask=mask).last_hidden_state
            parts.append(hidden.flatten(0, 1))
        return torch.cat(parts).index_select(0, batch.positions)

    def forward(
        self, batch: TokenBatch, ids: Tensor | None = None, *, topk: int | None = None, temperature: float = 1.0
    ) -> Any:
        """Per-token numbers of one micro-batch. One entry point, because sharding hooks into ``forward``.

        Args:
            batch: the micro-batch, with M completion tokens.
            ids: ``[M, S]`` ids whose log-probabilities are wanted; default the completion tokens.
            topk: if given, return the k largest logits of each position instead (no gradient).
            temperature: softmax temperature of the log-probabilities.

        Returns:
            Log-probabilities in nats, ``[M]`` of the completion tokens, or ``[M, S]`` where ``ids`` are given; with
            ``topk`` the pair (ids ``[M, k]`` int32, logits ``[M, k]``).
        """
        hidden, weight, bias = self.output_layer(self._hidden(batch))
        if topk is not None:
            return topk_logits(hidden, weight, bias, topk, chunk_elements=self.chunk_elements)
        wanted = batch.targets[:, None] if ids is None else ids.long()
        logps = selected_logps(
            hidden, weight, bias, wanted, temperature=temperature, chunk_elements=self.chunk_elements
        )
        return logps[:, 0].clone() if ids is None else logps  # a copy, since FSDP2 warns of views

    @torch.no_grad()
    def completion_logps(
        self, sequences: Sequences, *, token_budget: int, temperature: float = 1.0, num_passes: int | None = None
    ) -> list[Tensor]:
        """Log-probability of each completion token, per sequence, without gradient.

        Args:
            sequences: N contexts and completions.
            token_budget: tokens of one forward pass.
            temperature: softmax temperature.
            num_passes: forward passes that all ranks make (a sharded policy is a collective); the missing ones are
                made on a dummy token.

        Returns:
            One ``[length]`` float32 tensor per sequence, in nats.
        """
        results: list[Any] = [None] * len(sequences.prompt_ids)
        packing = self.pack(sequences, token_budget)
        for group in packing.groups:
            batch = TokenBatch.from_sequences(sequences.select(group), self.device, packing.layout)
            logps = self(batch, temperature=temperature)
            for i, part in zip(group, logps.split(batch.lengths), strict=True):
                results[i] = part
        for _ in range((num_passes or 0) - len(packing.groups)):
            self(TokenBatch.placeholder(self.device))
        return results

    def save(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the policy (and its tokenizer) in the Hugging Face format, whole or not at all.

        An adapter is merged into the weights, and written on its own to ``adapter``, in peft's format.

        Args:
            folder: where to; an OSError says that it cannot be written.
            tokenizer: written beside the weights if given.
            state_dict: the model's unsharded weights, where it is sharded itself.
        """
        with whole_folder(folder) as partial:
            if self.has_adapter:
                state_dict = dict(self.named_weights())
                save_adapter(self.model, partial / "adapter")
            self.model.config.use_cache = True
            try:
                self.model.save_pretrained(partial, state_dict=state_dict)
            finally:
                self.model.config.use_cache = False
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
