"""What vLLM says while it takes over weights, without vLLM."""

import logging

import pytest

from hdpo.errors import TrainingStopped
from hdpo.generation.vllm_weights import weights_all_loaded

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
