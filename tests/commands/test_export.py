"""A checkpoint as a Hugging Face model, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo.commands.export import export_checkpoint, main
from hdpo.errors import ConfigError
from hdpo.policy import PolicyConfig
from tests.helpers.models import random_policy
from tests.helpers.small_disk import small_disk

LAB = {"path": "pkg://hdpo.lab/policy"}


@pytest.fixture
def weights():
    """A policy's weights that are not those that it starts with."""
    model = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[2] / "hdpo" / "lab" / "policy")
    return {name: value + 1 for name, value in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path, weights):
    path = tmp_path / "last.ckpt"
    state = {f"policy.model.{name}": value for name, value in weights.items()}
    # An EMA teacher's weights have the same names behind another prefix.
    state |= {f"teacher.average.model.{name}": value + 1 for name, value in weights.items()}
    torch.save({"state_dict": state, "global_step": 3}, path)
    return path


def write(file, **policy):
    file.write_text(yaml.safe_dump({"model": {"policy": policy}}))
    return str(file)


def test_the_checkpoints_policy_is_written_with_its_tokenizer(tmp_path, checkpoint, weights, capsys):
    files = [write(tmp_path / "a.yaml", path="nowhere", dtype="float64"), write(tmp_path / "b.yaml", **LAB)]
    (tmp_path / "c.yaml").write_text("seed_everything: 3\n")
    arguments = [f"--config={file}" for file in (*files, tmp_path / "c.yaml")]
    assert main([*arguments, "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert f"policy: {tmp_path / 'out'}" in capsys.readouterr().out
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        # A key of a later file overrides that of an earlier one, and the others stay.
        assert written[name].dtype == torch.float64
        assert torch.equal(written[name], value.double())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_policy(tmp_path, checkpoint):
    line = r"^--out: \S+out cannot be written \(.*File too large.*\): free space, or give another folder$"
    with small_disk(100_000), pytest.raises(ConfigError, match=line):
        export_checkpoint(PolicyConfig(**LAB), checkpoint, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt"]


def test_what_holds_no_policy_is_refused(tmp_path):
    torch.save({"state_dict": {"model.weight": torch.zeros(1)}, "global_step": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"--ckpt_path: .*other.ckpt is a checkpoint of something else"):
        export_checkpoint(PolicyConfig(**LAB), tmp_path / "other.ckpt", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--ckpt_path: there is no file or folder .*missing"):
        export_checkpoint(PolicyConfig(**LAB), tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tmp_path):
    state = {f"policy.{name}": value for name, value in random_policy(dtype=torch.float32).state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"the weights in .*other.ckpt do not fit model.policy.path='pkg://hdpo.lab"):
        export_checkpoint(PolicyConfig(**LAB), tmp_path / "other.ckpt", tmp_path / "out")


def test_weights_that_are_not_finite_are_not_exported(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[3] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ConfigError, match=r"nan.ckpt holds weights that are not finite; export the one before"):
        export_checkpoint(PolicyConfig(**LAB), tmp_path / "nan.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_without_a_policy_is_refused(tmp_path, checkpoint):
    (tmp_path / "empty.yaml").write_text("")
    more = ["--ckpt_path", str(checkpoint), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"--config: model.policy.path is in none of .*empty.yaml"):
        main([f"--config={tmp_path / 'empty.yaml'}", *more])
    for text in ("model: foo", "model: {policy: foo}"):
        (tmp_path / "word.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"--config: .*word.yaml: model.policy must be a section"):
            main([f"--config={tmp_path / 'word.yaml'}", *more])
    with pytest.raises(ConfigError, match=r"--config: there is no file .*missing.yaml"):
        main([f"--config={tmp_path / 'missing.yaml'}", *more])
    for key, value, message in (
        ("dtpe", "float32", "does not accept option 'dtpe'"),
        ("dtype", "float3", r"policy.dtype.*float3"),
        ("lora", {"r": 8, "rank": 4}, "rank"),
    ):
        (tmp_path / "odd.yaml").write_text(yaml.safe_dump({"model": {"policy": LAB | {key: value}}}))
        with pytest.raises(ConfigError, match=rf"--config: model.policy: .*{message}"):
            main([f"--config={tmp_path / 'odd.yaml'}", *more])
