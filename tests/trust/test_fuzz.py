"""Damaged files, whatever the damage: one line or what was written, never a traceback and never something else."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdpo.checkpoints import read_header
from hdpo.cli import main
from hdpo.commands.parsing import config_file
from hdpo.commands.run import HDPOCLI, read_config
from hdpo.errors import ConfigError
from hdpo.evaluation.runs import flat_config

CONFIGS = Path(__file__).parents[2] / "configs"
LAB = (CONFIGS / "lab.yaml").read_bytes()
#: All but those of an engine that may not be installed.
OVERLAYS = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.glob("*/*.yaml") if "vllm" not in p.name)


def damaged(content: bytes, numbers: random.Random) -> bytes:
    """Cut off, bits flipped, bytes overwritten, left out, or repeated."""
    data, start = bytearray(content), numbers.randrange(len(content))
    end = start + numbers.choice((1, 8, 200))
    match numbers.randrange(5):
        case 0:
            del data[start:]
        case 1:
            data[start] ^= 1 << numbers.randrange(8)
        case 2:
            data[start:end] = numbers.randbytes(end - start)
        case 3:
            del data[start:end]
        case _:
            data[start:start] = data[start:end]
    return bytes(data)


def test_a_damaged_checkpoint_is_refused_or_holds_what_was_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"policy.w{i}": torch.randn(40, 30, generator=generator) for i in range(3)}
    whole = {"state_dict": state, "global_step": 7, "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}]}
    torch.save(whole, tmp_path / "whole.ckpt")
    content, path, numbers, refused = (tmp_path / "whole.ckpt").read_bytes(), tmp_path / "x.ckpt", random.Random(0), []
    for _ in range(400):
        path.write_bytes(damaged(content, numbers))
        try:
            header = read_header("--ckpt_path", path)
        except ConfigError as error:
            refused.append(str(error))
            continue
        found = torch.load(path, weights_only=True)
        assert header.step == found["global_step"] == 7
        assert all(torch.equal(found["state_dict"][name], value) for name, value in state.items())
    assert len(refused) > 300
    assert all("\n" not in line and str(path) in line for line in refused)


def test_damaged_yaml_is_read_or_refused_with_its_file(tmp_path):
    numbers, refused, path = random.Random(0), [], tmp_path / "damaged.yaml"
    for _ in range(120):
        path.write_bytes(damaged(LAB, numbers))
        try:
            config_file(str(path))
        except ConfigError as error:
            refused.append(str(error))
        else:
            assert isinstance(yaml.safe_load(path.read_text()), dict | None)
    assert len(refused) > 10
    assert all("\n" not in line and str(path) in line for line in refused)


@pytest.fixture
def only_fit(monkeypatch):
    known = HDPOCLI.subcommands()
    monkeypatch.setattr(HDPOCLI, "subcommands", staticmethod(lambda: {"fit": known["fit"]}))


@pytest.mark.slow
def test_damaged_yaml_through_the_program(tmp_path, only_fit, capsys):
    """Whatever stands in a file, the program prints the configuration or says in one line what is wrong."""
    numbers, statuses = random.Random(1), []
    for _ in range(30):
        (tmp_path / "damaged.yaml").write_bytes(damaged(LAB, numbers))
        capsys.readouterr()
        try:
            statuses.append(main(["fit", "--config", str(tmp_path / "damaged.yaml"), "--print_config"]))
        except SystemExit as exit_:
            statuses.append(exit_.code)
        lines = capsys.readouterr().err.splitlines()
        assert len([line for line in lines if line.startswith("hdpo: error: ")]) == (statuses[-1] == 2)
    assert set(statuses) == {0, 2}


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sampled_from(["lab", "hdpo"]), chosen=st.lists(st.sampled_from(OVERLAYS), min_size=1, max_size=3))
def test_of_any_overlays_the_last_word_stands_and_saying_it_twice_changes_nothing(only_fit, base, chosen):
    def read(*names):
        return read_config([argument for name in (base, *names) for argument in ("--config", name)])

    whole = read(*chosen)
    assert read(*chosen, chosen[-1]) == whole
    alone = read(chosen[-1])
    for key, value in flat_config(yaml.safe_load((CONFIGS / f"{chosen[-1]}.yaml").read_text())).items():
        assert whole.get(key) == alone.get(key), key
        if not isinstance(value, str | list):  # the parser writes classes in its own way
            assert whole.get(key) == value, key
