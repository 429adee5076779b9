"""Policies on the weights of one that has an adapter: the initial one, with the adapter off, and one with another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hdpo.policy.lora import adapter_layers, adapter_off, is_adapter, merged_weight, merged_weights
from hdpo.policy.policy import Policy


class WithoutAdapter(Policy):
    """A policy with its adapter off; it shares all weights, and holds none of its own."""

    def __init__(self, policy: Policy) -> None:
        nn.Module.__init__(self)
        self.model = policy.model
        self.chunk_elements = policy.chunk_elements
        self._layers = adapter_layers(policy.model)

    @property
    def backbone(self) -> Any:
        """The model without its output layer, which has no adapter."""

        def read(**inputs: Any) -> Any:
            with adapter_off(self._layers):
                return self.model.base_model(**inputs)

        return read

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The initial weights."""
        return merged_weights(self.model, adapter=False)

    def weight(self, name: str) -> Tensor:
        """One of them."""
        return merged_weight(self.model, name, adapter=False)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but the adapter's."""
        return (parameter for name, parameter in self.model.named_parameters() if not is_adapter(name))


def with_own_adapter(policy: Policy) -> Policy:
    """Return a policy with an adapter of its own, at first an equal one, on the very weights of ``policy``."""
    shared = {id(p): p for name, p in policy.model.named_parameters() if not is_adapter(name)}
    return copy.deepcopy(policy, shared)
