"""Bad inputs: exit status 2, one line that names key, file or row, and no run folder lost, changed or left."""

import logging
import shutil
from pathlib import Path

import pytest

from hdpo.__main__ import main
from hdpo.commands.run import HDPOCLI
from tests.trust.bad_values import VALUES

SMALL = [
    "--data.selection.num_train_problems=32",
    "--data.selection.num_val_problems=4",
    "--data.selection.num_test_problems=0",
    "--data.prompts_per_step=4",
    "--rollouts.num_generations=2",
    "--rollouts.num_val_samples=2",
    "--rollouts.max_new_tokens=8",
    "--distillation.max_new_tokens=8",
    "--model.pass_k=[1,2]",
    "--model.verifier.init_args.num_workers=1",
    "--checkpoint.every_n_steps=1",
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
]


def command(*arguments, name="fit"):
    return [name, "--config", "lab", *SMALL, *arguments]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Prepared data that all cases use, and a run that is finished."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command()) == 0
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder; and only ``fit`` is parsed, which is four times as quick and says the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    known = HDPOCLI.subcommands()
    monkeypatch.setattr(HDPOCLI, "subcommands", staticmethod(lambda: {"fit": known["fit"]}))
    return tmp_path


def contents(folder):
    """Every file of the runs with its bytes, and every run's folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.glob("runs/*/**/*"))}


def refused(capsys, arguments, status=2):
    """Run a command that must be refused; returns the one line that says why."""
    capsys.readouterr()
    before = contents(Path())
    try:
        found = main(arguments)
    except SystemExit as exit_:  # jsonargparse exits itself
        found = exit_.code
    errors = capsys.readouterr().err.splitlines()
    assert found == status, errors
    (line,) = [line for line in errors if line.startswith("hdpo: ")]
    assert errors[-1] == line, "nothing after the line that matters"
    after = contents(Path())
    assert after == before, sorted(k for k in {*before, *after} if before.get(k, "no") != after.get(k, "no"))
    return line


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_refused(workplace, capsys, name):
    arguments, message = VALUES[name]
    line = refused(capsys, command(*arguments))
    assert line.startswith("hdpo: error: ")
    assert message in line
