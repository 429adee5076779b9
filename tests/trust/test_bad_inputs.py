"""Bad inputs: exit status 2, one line that names key, file or row, and no run folder lost, changed or left."""

import logging
import shutil
from pathlib import Path

import pytest

from hdpo.__main__ import main
from hdpo.commands.run import HDPOCLI
from tests.trust.bad_files import FILES, LOCKS, POLICY
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Prepared data, a policy in a folder, and a run that is finished."""
    folder = tmp_path_factory.mktemp("shared")
    lab = Path(__file__).parents[2] / "hdpo/lab/policy"
    shutil.copytree(lab, folder / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "lab", *SMALL]) == 0
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder; and only ``fit`` is parsed, which is four times as quick and says the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the first test's stderr
    known = HDPOCLI.subcommands()
    monkeypatch.setattr(HDPOCLI, "subcommands", staticmethod(lambda: {"fit": known["fit"]}))
    yield tmp_path
    while LOCKS:
        LOCKS.pop().release()


def contents():
    """Every file of the runs with its bytes, and every run's folder."""
    return {str(p): p.read_bytes() if p.is_file() else "folder" for p in Path().glob("runs/*/**/*")}


def refused(capsys, arguments):
    """Run a command that must be refused; returns the one line that says why."""
    capsys.readouterr()
    before = contents()
    try:
        status = main(arguments)
    except SystemExit as exit_:  # jsonargparse and argparse exit themselves
        status = exit_.code
    errors = capsys.readouterr().err.splitlines()
    assert status == 2, errors
    (line,) = [line for line in errors if " error: " in line]
    assert errors[-1] == line, "nothing after the line that matters"
    after = contents()
    assert sorted(k for k in {*before, *after} if before.get(k) != after.get(k)) == []
    return line


#: A refusal takes a fifth of a second; a quarter of them are a sample.
SAMPLED = [pytest.param(name, marks=[pytest.mark.slow] if i % 4 else []) for i, name in enumerate(VALUES)]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_value_is_refused(workplace, capsys, name):
    arguments, message = VALUES[name]
    assert message in refused(capsys, ["fit", "--config", "lab", *SMALL, *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(workplace, shared, capsys, name):
    make, message = FILES[name]
    shutil.copytree(shared / "runs", "runs", symlinks=True)
    shutil.copytree(shared / "policy", "policy")
    arguments = make()
    if not name.startswith("command"):
        cache = [] if POLICY[0] in arguments else [f"--data.cache_dir={shared}/.hdpo_cache"]
        arguments = ["fit", "--config", "lab", *SMALL, *cache, *arguments]
    assert message in refused(capsys, arguments)
    assert not Path("run-by-a-pickle").exists()


def test_there_are_at_least_ninety_of_each():
    assert len(VALUES) >= 90
    assert len(FILES) >= 90
