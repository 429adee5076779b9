"""What vLLM says while it takes over weights, without vLLM."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hdpo.errors import TrainingStopped
from hdpo.generation.vllm_weights import first_rows, weights_all_loaded
from hdpo.policy import Policy

LOGGER = logging.getLogger("vllm.model_executor.model_loader.reload")


@pytest.fixture
def errors_only():
    """As VLLM_LOGGING_LEVEL=ERROR, which the engine sets."""
    parent = logging.getLogger("vllm.model_executor")
    parent.setLevel(logging.ERROR)
    yield parent
    parent.setLevel(logging.NOTSET)


def test_a_warning_about_weights_gets_through(errors_only):
    with pytest.warns(UserWarning, match="^vLLM: a scale of layer 3 is unused$"), weights_all_loaded():
        LOGGER.warning("a scale of layer %d is unused", 3)
    assert errors_only.level == logging.ERROR
    assert not errors_only.handlers


def test_weights_that_are_not_loaded_are_an_error(errors_only):
    with (
        pytest.raises(TrainingStopped, match=r"not taken over all of the policy's weights: .*q_proj"),
        weights_all_loaded(),
    ):
        LOGGER.warning("Following weights were not loaded from checkpoint: {'q_proj'}")
    assert not errors_only.handlers


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_a_workers_weights_have_the_names_of_the_policys(kind):
    """vLLM packs Qwen2's queries, keys and values into one matrix; Phi-3 has them so itself."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 24, "pad_token_id": 0}  # fmt: skip
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        held = dict(model.named_parameters())
        for whole, parts in packed.items():
            for name in [name for name in held if f".{parts[0]}." in name]:
                pieces = [held.pop(name.replace(parts[0], part)) for part in parts]
                held[name.replace(parts[0], whole)] = torch.cat(pieces)
    else:
        model = Phi3ForCausalLM(Phi3Config(**sizes))
        held, packed = dict(model.named_parameters()), {whole: [whole] for whole in packed}
    inside = SimpleNamespace(named_parameters=held.items, packed_modules_mapping=packed)
    found = first_rows(SimpleNamespace(get_model=lambda: inside))
    policy = Policy(model)
    assert len(found) == len(held) > 8
    for name, rows in found.items():
        assert torch.equal(rows, policy.weight(name)[: len(rows)]), name
