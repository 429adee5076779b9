"""Without peft the option says what to install."""

import sys

import pytest

from hdpo.errors import ConfigError
from hdpo.policy import Policy, PolicyConfig
from hdpo.policy.lora import LoRAConfig


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.policy.lora needs peft .*pip install 'hdpo\[lora\]'"):
        Policy.load(PolicyConfig("pkg://hdpo.lab/policy", lora=LoRAConfig()))


@pytest.mark.parametrize("options", [{"r": 0}, {"alpha": 0.0}])
def test_values_out_of_range(options):
    with pytest.raises(ConfigError, match=rf"model\.policy\.lora\.{next(iter(options))}"):
        LoRAConfig(**options)
