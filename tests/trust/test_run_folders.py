"""A run's folder: its own, locked, continued, found again; and how a command ends."""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from hdpo.cli import main
from hdpo.commands.run_folder import RunFolder
from hdpo.errors import ConfigError, TrainingStopped
from hdpo.trainer import check_trainer
from tests.test_cli import lab, refused, run_folder, workplace  # noqa: F401 - a fixture

FEW = ["--trainer.val_check_interval=1", "--checkpoint.every_n_steps=1", "--data.selection.num_test_problems=0"]


def fit(*arguments):
    return main(lab("fit", *FEW, *arguments))


def checkpoints(run):
    return sorted(p.name for p in (run / "checkpoints").glob("last-*.ckpt"))


def test_resume_auto_continues_the_newest_run_of_this_configuration(workplace, capsys):  # noqa: F811
    assert fit("--trainer.max_steps=3", "--resume=auto") == 0
    assert "nothing to resume: the run starts anew" in capsys.readouterr().out
    run = run_folder(workplace)
    expected = {p.name: p.read_bytes() for p in (run / "evaluations").iterdir()}
    summary = json.loads((run / "summary.json").read_text())
    samples = (run / "samples.jsonl").read_text()
    assert checkpoints(run) == ["last-000002.ckpt", "last-000003.ckpt"]
    # Another configuration is another run.
    assert fit("--trainer.max_steps=2", "--model.distillation_weight=0.5", "--resume=auto") == 0
    assert checkpoints(run_folder(workplace, 1)) == ["last-000001.ckpt", "last-000002.ckpt"]
    # As a kill after step 2 leaves it, with the newest checkpoint cut off and its evaluation lost.
    (run / "finished").unlink()
    (run / "evaluations/step_000003.jsonl.gz").unlink()
    (run / "evaluations/step_000002.jsonl.gz").unlink()
    (run / "summary.json").unlink()
    whole = (run / "checkpoints/last-000003.ckpt").read_bytes()
    (run / "checkpoints/last-000003.ckpt").write_bytes(whole[: len(whole) // 2])
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "half a l')
    capsys.readouterr()
    assert fit("--trainer.max_steps=3", "--progress.every_n_steps=7", "--resume=auto") == 0
    printed = "".join(capsys.readouterr())
    assert "last-000003.ckpt is not a checkpoint, or it is cut off or broken" in printed
    assert "version_0 from last-000002.ckpt" in printed
    assert {p.name: p.read_bytes() for p in (run / "evaluations").iterdir()} == expected
    assert {**json.loads((run / "summary.json").read_text()), "run": ""} == {**summary, "run": ""}
    assert (run / "samples.jsonl").read_text() == samples
    assert not run_folder(workplace, 2).exists()
    # Finished: nothing to do, and nothing is touched.
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert fit("--trainer.max_steps=3", "--resume=auto") == 0
    assert "version_0 is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_checkpoint_continues_its_run_and_an_older_one_begins_another(workplace):  # noqa: F811
    assert fit("--trainer.max_steps=2") == 0
    run = run_folder(workplace)
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert fit("--trainer.max_steps=3", "--ckpt_path", str(run / "checkpoints/last.ckpt")) == 0
    assert sorted(p.name for p in (run / "evaluations").iterdir()) == [f"step_{n:06d}.jsonl.gz" for n in range(4)]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["evaluations"]) == ["0", "1", "2", "3"], "before is still step 0"
    values = {step: v["pass@2"]["value"] for step, v in summary["evaluations"].items()}
    first = next(int(step) for step, v in values.items() if v == max(values.values()))
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == first
    assert best <= first
    assert not run_folder(workplace, 1).exists()
    assert fit("--trainer.max_steps=3", "--ckpt_path", str(run / "checkpoints/last-000002.ckpt")) == 0
    assert checkpoints(run_folder(workplace, 1)) == ["last-000003.ckpt"]
    assert checkpoints(run) == ["last-000002.ckpt", "last-000003.ckpt"]


def test_last_with_nothing_to_find_is_refused(workplace, capsys):  # noqa: F811
    line = refused(capsys, lab("fit", "--ckpt_path=last"))
    assert "--ckpt_path last: runs/lab holds no run of this configuration with last.ckpt" in line
    assert not (workplace / "runs/lab").exists() or not list((workplace / "runs/lab").iterdir())


def test_the_other_commands_find_the_run_of_a_configuration(workplace, capsys):  # noqa: F811
    assert fit("--trainer.max_steps=2") == 0
    run = run_folder(workplace)
    for command, name in (("validate", "last"), ("test", "best"), ("predict", "last")):
        options = [*FEW[:2], "--data.selection.num_test_problems=6"] if command == "test" else FEW
        same = options == FEW
        capsys.readouterr()
        status = main(lab(command, *options, "--trainer.max_steps=2", f"--ckpt_path={name}"))
        printed = capsys.readouterr()
        if same:
            assert status == 0
            assert re.search(rf"--ckpt_path {name}: .*version_0 from {name}-\d+.ckpt", printed.out)
        else:
            assert status == 2, "of other data it is another run"
            assert printed.err.rstrip().endswith("with best.ckpt; name the file")
    # They are no runs to go on with.
    (run / "finished").unlink()
    assert fit("--trainer.max_steps=2", "--resume=auto") == 0
    assert "version_0 from last-000002.ckpt" in capsys.readouterr().out
    (run / "finished").unlink()
    shutil.rmtree(run / "checkpoints")
    later = sorted(p.name for p in run.parent.glob("version_*"))
    assert fit("--trainer.max_steps=2", "--resume=auto") == 0
    assert "nothing to resume: the run starts anew" in capsys.readouterr().out
    assert checkpoints(run) == ["last-000001.ckpt", "last-000002.ckpt"], "in its own folder, and in no other command's"
    assert sorted(p.name for p in run.parent.glob("version_*")) == later


def test_checkpoints_elsewhere_are_nobodys(workplace, capsys):  # noqa: F811
    for key in ("checkpoint", "best_checkpoint"):
        line = refused(capsys, lab("fit", *FEW, f"--{key}.dirpath=elsewhere", "--resume=auto"))
        assert line.startswith(f"hdpo: error: {key}.dirpath: --resume auto")
    assert fit("--trainer.max_steps=1", "--checkpoint.dirpath=elsewhere") == 0
    assert (workplace / "elsewhere/last.ckpt").exists()


def test_without_a_logger_of_ones_own_a_run_is_found_again(workplace, capsys):  # noqa: F811
    nothing = ("--trainer.logger=null", "--trainer.default_root_dir=here", "--trainer.max_steps=2")
    assert fit(*nothing, "--resume=auto") == 0
    run = workplace / "here/lightning_logs/version_0"
    assert checkpoints(run) == ["last-000001.ckpt", "last-000002.ckpt"]
    (run / "finished").unlink()
    (run / "checkpoints/last-000002.ckpt").unlink()
    capsys.readouterr()
    assert fit(*nothing, "--resume=auto") == 0
    assert "version_0 from last-000001.ckpt" in capsys.readouterr().out
    assert checkpoints(run) == ["last-000001.ckpt", "last-000002.ckpt"]
    assert [p.name for p in (workplace / "here/lightning_logs").iterdir()] == ["version_0"]
    assert not (workplace / ".lock").exists()


def test_a_folder_that_holds_a_run_is_not_written_to(workplace, capsys):  # noqa: F811
    version = "--trainer.logger.init_args.version=mine"
    assert fit("--trainer.max_steps=1", version) == 0
    before = {p: p.stat().st_mtime_ns for p in (workplace / "runs/lab/mine").rglob("*") if p.name != ".lock"}
    line = refused(capsys, lab("fit", *FEW, "--trainer.max_steps=1", version))
    assert "runs/lab/mine holds a run already: continue it with --resume auto" in line
    after = {p: p.stat().st_mtime_ns for p in (workplace / "runs/lab/mine").rglob("*") if p.name != ".lock"}
    assert after == before
    assert fit("--trainer.max_steps=1", version, "--resume=auto") == 0
    # Another configuration under the same name is not that run.
    line = refused(capsys, lab("fit", *FEW, "--trainer.max_steps=2", version, "--resume=auto"))
    assert "runs/lab/mine holds a run already" in line


def test_two_runs_at_once_never_share_a_folder(tmp_path):
    """Many claim a folder at the same moment: each gets one of its own."""
    together, folders = threading.Barrier(16), [RunFolder(tmp_path, None, {}) for _ in range(16)]

    def claim(folder):
        together.wait()
        folder.claim(again=False)

    threads = [threading.Thread(target=claim, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(f.version for f in folders) == sorted(f"version_{n}" for n in range(16))
    assert all(f.settings == {"version": f.version} for f in folders)


def test_a_new_run_has_a_number_above_all_others(tmp_path):
    """The newest run is the one with the highest number: the hole that a removed folder leaves stays open."""
    for number in (0, 3):
        (tmp_path / f"version_{number}").mkdir()
    folder = RunFolder(tmp_path, None, {})
    folder.claim(again=False)
    assert folder.version == "version_4"


def test_a_locked_folder_is_refused(tmp_path):
    first, second = (RunFolder(tmp_path, "mine", {}) for _ in range(2))
    first.claim(again=False)
    with pytest.raises(ConfigError, match="mine belongs to a run that is running"):
        second.claim(again=True)
    (tmp_path / "mine" / "config.yaml").touch()
    first.release()
    second.claim(again=True)
    second.release()


def test_a_folder_in_which_nothing_was_written_is_removed(workplace, capsys):  # noqa: F811
    refused(capsys, lab("fit", "--model.policy.path=no/such/model"))
    assert not list((workplace / "runs").rglob("version_*"))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])  # on a CPU Lightning makes bf16-mixed of 16-mixed
def test_precisions_that_lose_updates_are_refused(workplace, capsys, precision):  # noqa: F811
    line = refused(capsys, lab("fit", f"--trainer.precision={precision}"))
    assert f"trainer.precision must be one of 32-true, bf16-mixed, 64-true, got {precision}" in line


def test_scaled_gradients_are_refused_where_there_are_any():
    """On a GPU: 16-mixed clips gradients while they are scaled."""
    with pytest.raises(
        ConfigError, match=r"^trainer.precision must be one of 32-true, bf16-mixed, 64-true, got 16-mixed"
    ):
        check_trainer(SimpleNamespace(precision="16-mixed"))


@pytest.fixture
def heard():
    """A signal for which the program has no handler fails the test, and does not end it."""

    def unheard(number, frame):
        raise AssertionError(f"nobody has heard {signal.Signals(number).name}")

    before = {number: signal.signal(number, unheard) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("when", ["in the imports", "before training", "in a step"])
def test_asked_to_end_is_status_75(workplace, capsys, monkeypatch, name, when):  # noqa: F811
    def ask(*_):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.2)

    target = "hdpo.data.datamodule.OpenMathDataModule.setup"
    if when == "in the imports":
        target = "hdpo.cli.importlib.import_module"
    if when == "in a step":
        target = "hdpo.callbacks.cliffs.CliffDetection.on_train_batch_start"
    original = __import__("pydoc").locate(target)
    monkeypatch.setattr(target, lambda *a, **k: (ask(), original(*a, **k))[1])
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert fit("--trainer.max_steps=3") == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert f"hdpo: ended ({name}); fit goes on with --resume auto" in capsys.readouterr().err
    if when == "in a step":
        assert checkpoints(run_folder(workplace)) == ["last-000001.ckpt"]
        monkeypatch.undo()
        monkeypatch.chdir(workplace)
        assert fit("--trainer.max_steps=3", "--resume=auto") == 0
        assert len(list((run_folder(workplace) / "evaluations").iterdir())) == 4
    assert threading.active_count() < 50


def test_asked_twice_it_ends_at_once_and_goes_on_from_the_last_checkpoint(workplace, capsys, monkeypatch):  # noqa: F811
    from hdpo.losses import update

    def ask(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    def never(*_):
        raise AssertionError("the step has ended")

    monkeypatch.setattr(update, "_clip", lambda *a: ask() or never())
    assert fit("--trainer.max_steps=3") == 75
    assert "hdpo: ended (SIGINT twice); fit goes on with --resume auto" in capsys.readouterr().err
    assert checkpoints(run_folder(workplace)) == [], "nothing is saved in the middle of an update"
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert fit("--trainer.max_steps=1", "--resume=auto") == 0


def test_training_that_stops_itself_is_status_3(workplace, capsys, monkeypatch):  # noqa: F811
    def stop(*args, **kwargs):
        raise TrainingStopped("the reason")

    monkeypatch.setattr("hdpo.losses.update.select_rollouts", stop)
    assert fit("--trainer.max_steps=3") == 3
    assert capsys.readouterr().err.splitlines()[-1] == "hdpo: stopped: the reason"
    assert checkpoints(run_folder(workplace)) == []


def test_a_full_disk_is_one_line_and_status_3(workplace, capsys, monkeypatch):  # noqa: F811
    from hdpo.callbacks import evaluation

    write = evaluation.write_gzip

    def full(path, records):
        if "000002" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, records)

    monkeypatch.setattr(evaluation, "write_gzip", full)
    assert fit("--trainer.max_steps=3") == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hdpo: stopped: [Errno 28] No space left on device")
    assert "go on with --resume auto" in line
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert fit("--trainer.max_steps=3", "--resume=auto") == 0
    assert len(list((run_folder(workplace) / "evaluations").iterdir())) == 4


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errno.EROFS, ConfigError, "trainer.logger.init_args.save_dir: cannot create the folder .*: Read-only file"),
        (
            errno.EACCES,
            ConfigError,
            "trainer.logger.init_args.save_dir: cannot create the folder .*: Permission denied",
        ),
        (errno.ENOSPC, OSError, "No space left on device"),  # space can be made: status 3, as later in a run
    ],
)
def test_a_folder_that_cannot_be_made_names_its_key(tmp_path, monkeypatch, error, kind, message):
    def fails(path, *_, **__):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(kind, match=message):
        RunFolder(tmp_path / "runs", "mine", {}).claim(again=False)


def test_before_the_first_step_there_is_nothing_to_save(workplace, capsys, monkeypatch):  # noqa: F811
    """A disk that is full when config.yaml is written, and a run that is asked to end while it loads."""
    from hdpo.commands import run

    def full(*_):
        raise OSError(28, "No space left on device", "config.yaml")

    monkeypatch.setattr(run.SavedConfig, "save_config", full)
    assert fit("--trainer.max_steps=3") == 3
    assert "No space left on device: 'config.yaml'; free space" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert fit("--trainer.max_steps=1") == 0
    before = checkpoints(run_folder(workplace, 1))
    monkeypatch.setattr("hdpo.data.OpenMathDataModule.load_state_dict", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert fit("--trainer.max_steps=2", f"--ckpt_path={run_folder(workplace, 1)}/checkpoints/last.ckpt") == 75
    assert checkpoints(run_folder(workplace, 1)) == before
    assert not list(workplace.rglob("last-000000*"))


def test_the_configuration_of_a_continued_run_is_that_of_the_command(workplace):  # noqa: F811
    assert fit("--trainer.max_steps=1") == 0
    assert fit("--trainer.max_steps=2", f"--ckpt_path={run_folder(workplace)}/checkpoints/last.ckpt") == 0
    config = yaml.safe_load((run_folder(workplace) / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    assert Path(config["trainer"]["logger"]["init_args"]["save_dir"]).name == "runs"


@pytest.mark.parametrize("lock", [{}, {".lock": ""}], ids=["without lock file", "with lock file"])
def test_a_refused_command_leaves_a_finished_run_as_it_was(tmp_path, lock):
    run = tmp_path / "version_0"
    run.mkdir()
    files = {"config.yaml": "a: 1", "finished": "", "metrics.csv": "step,loss", "metrics.0.csv": "x", **lock}
    for name, text in files.items():
        (run / name).write_text(text)
    before = {p.name: p.read_text() for p in run.iterdir()}
    folder = RunFolder(tmp_path, "version_0", {})
    folder.claim(again=True)
    assert not (run / "finished").exists()
    assert (run / "metrics.1.csv").read_text() == "step,loss", "Lightning would delete it"
    (run / "config.yaml").write_text("a: 2")
    (run / "hparams.yaml").touch()
    (run / "events.out.tfevents.1.host.2.0").touch()
    folder.withdraw()
    folder.release()
    assert {p.name: p.read_text() for p in run.iterdir()} == before


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_has_begun_is_not_withdrawn(tmp_path, again):
    if again:
        (tmp_path / "mine/evaluations").mkdir(parents=True)
    folder = RunFolder(tmp_path, "mine", {})
    folder.claim(again=again)
    (folder.path / "config.yaml").touch()
    (folder.path / "evaluations").mkdir(exist_ok=True)
    (folder.path / "evaluations/step_000001.jsonl.gz").touch()
    folder.withdraw()
    folder.release()
    assert {p.name for p in folder.path.iterdir()} >= {"config.yaml", "evaluations"}


@pytest.mark.parametrize("files", [(), ("notes.txt",)])
def test_a_refused_command_without_a_logger_leaves_the_working_folder_as_it_was(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).write_text("mine")
    arguments = ["fit", "--config", "lab", "--trainer.max_steps=1", "--trainer.logger=false", "--model.pass_k=[0]"]
    assert main(arguments) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == list(files)
