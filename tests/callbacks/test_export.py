"""The policy that a run leaves behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo.callbacks import PolicyExport
from tests.helpers import toy


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


def test_no_policy_is_written_where_none_is_wanted(tmp_path):
    fitter = toy.trainer(tmp_path, PolicyExport(enabled=False), max_steps=1, limit_val_batches=0)
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    assert not (tmp_path / "policy").exists()
