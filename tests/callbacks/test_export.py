"""The policy that a run leaves behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo.callbacks import PolicyExport
from hdpo.errors import TrainingStopped
from tests.helpers import toy
from tests.helpers.small_disk import small_disk


@pytest.mark.parametrize("named", [False, True])
def test_the_trained_policy_and_its_tokenizer_are_written(tmp_path, named, capsys):
    folder = tmp_path / ("elsewhere" if named else "policy")
    export = PolicyExport(path=str(folder) if named else None)
    module = toy.module()
    fitter = toy.trainer(tmp_path, export, max_steps=1, limit_val_batches=0)
    fitter.fit(module, datamodule=toy.datamodule(tmp_path))
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    trained = module.student.model.state_dict()
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == module.tokenizer.get_vocab()
    assert f"policy: {folder}" in capsys.readouterr().out


def test_a_policy_that_cannot_be_written_is_one_line_and_leaves_no_half_of_it(tmp_path):
    fitter = toy.trainer(tmp_path, PolicyExport(), max_steps=1, limit_val_batches=0)
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    before = {p.name: p.read_bytes() for p in (tmp_path / "policy").iterdir()}
    line = r"^the policy cannot be written to \S+policy \(.*File too large.*\); the last checkpoint holds it: [^\n]*$"
    with small_disk(100_000), pytest.raises(TrainingStopped, match=line):
        PolicyExport().on_train_end(fitter, fitter.lightning_module)
    assert {p.name: p.read_bytes() for p in (tmp_path / "policy").iterdir()} == before
    assert not list(tmp_path.glob(".*partial"))


def test_no_policy_is_written_where_none_is_wanted(tmp_path):
    fitter = toy.trainer(tmp_path, PolicyExport(enabled=False), max_steps=1, limit_val_batches=0)
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    assert not (tmp_path / "policy").exists()
