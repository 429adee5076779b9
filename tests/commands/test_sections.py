"""``fit --help`` on two screens, and each section's keys by ``--help SECTION``."""

import re

import pytest

from hdpo.cli import main
from hdpo.commands.run import read_config


def printed(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["fit", *args])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_overview_names_every_key_that_a_configuration_has(capsys):
    status, out, _ = printed(capsys, "--help")
    assert status == 0
    assert len(out.splitlines()) < 100
    named = set()
    for block in out.split("\n\n")[1:-1]:
        head, *lines = block.splitlines()
        section = head.partition(":")[0]
        keys = re.split(r",\s+", " ".join(lines).strip())
        named |= set(keys if section == "of the command" else (f"{section}.{key}" for key in keys))
    config = read_config(["--config", "lab"])
    # Below a class or a dictionary (model.verifier.timeout, data.source.kwargs.seed) the keys are its own.
    missing = [key for key in config if key not in named and not any(key.startswith(f"{name}.") for name in named)]
    assert not missing
    assert {"model.engine", "model.policy.path", "data.selection.split_by", "distillation.topk", "resume"} <= named
    assert not any(word in out for word in ("-->", ".help,", "CONFIG]"))


@pytest.mark.parametrize("form", [["--help", "data.selection"], ["--help=data.selection"], ["-h", "data.selection"]])
def test_a_section_explains_its_keys_alone(form, capsys):
    status, out, _ = printed(capsys, *form)
    assert status == 0
    found = set(re.findall(r"^  --([\w.]+)", out, re.MULTILINE))
    assert "data.selection.num_train_problems" in found
    assert all(key.startswith("data.selection.") for key in found)
    assert "stop reading after this many training problems" in " ".join(out.split())
    assert "default: 64000" in " ".join(out.split())


def test_a_section_that_there_is_not(capsys):
    status, out, err = printed(capsys, "--help", "rolouts")
    assert (status, out) == (2, "")
    assert err == "hdpo: error: --help: there is no section 'rolouts'; did you mean rollouts?\n"
