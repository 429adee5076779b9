"""Checkpoints: whole at every moment, finite or not at all, and refused in one line where they cannot be read."""

import os
import pickle
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from hdpo import checkpoints as module
from hdpo.checkpoints import check_state, read_header, save_checkpoint, saved_checkpoints
from hdpo.commands.export import export_checkpoint
from hdpo.errors import ConfigError, TrainingStopped
from hdpo.optim import LinearWarmup
from hdpo.policy import PolicyConfig
from tests.helpers.small_disk import small_disk

CALLS = [(os, "replace"), (os, "symlink"), (os, "unlink"), (os, "rename"), (os, "fsync"), (module.shutil, "rmtree")]


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


class Trainer:
    """What saving needs of a trainer: one process, one policy, one optimizer."""

    is_global_zero = True
    strategy = SimpleNamespace(barrier=lambda *_: None, broadcast=lambda value: value, root_device=torch.device("cpu"))

    def __init__(self, folder=False):
        self.folder, self.global_step = folder, 0
        self.lightning_module = torch.nn.Linear(2, 1)
        self.optimizers = [torch.optim.AdamW(self.lightning_module.parameters())]

    def save_checkpoint(self, path, weights_only):
        content = {"state_dict": {"policy.model.w": torch.zeros(3, 2)}, "global_step": self.global_step}
        if self.folder:
            path.mkdir(parents=True)
            torch.save(content, path / "part")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)


def step_of(link):
    return torch.load(link / "part" if link.is_dir() else link, weights_only=True)["global_step"]


def write(folder, step, *, as_folder=False):
    trainer = Trainer(as_folder)
    trainer.global_step = step
    save_checkpoint(trainer, folder, "last", num_kept=2)


def kill_at(monkeypatch, number, *, after):
    """Break off before (or after) call ``number`` that changes the file system; return how many there were."""
    count = [0]

    def counted(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number and not after:
                raise Killed
            mine = count[0]
            try:
                return original(*args, **kwargs)
            finally:
                if mine == number:
                    raise Killed

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return count


@pytest.mark.parametrize("folders", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, folders, after):
    before, now = folders
    with monkeypatch.context() as patch:
        total = kill_at(patch, 0, after=False)
        write(tmp_path / "count", 4, as_folder=before)
        write(tmp_path / "count", 6, as_folder=before)
        first = total[0]
        write(tmp_path / "count", 8, as_folder=now)
        total = total[0] - first
    assert total > 5
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        write(folder, 4, as_folder=before)
        write(folder, 6, as_folder=before)
        with monkeypatch.context() as patch:
            kill_at(patch, number, after=after)
            with pytest.raises(Killed):
                write(folder, 8, as_folder=now)
        assert step_of(folder / "last.ckpt") in (6, 8), number
        assert all(step_of(path) in (4, 6, 8) for path in saved_checkpoints(folder))
        # The next run goes on and cleans up.
        write(folder, 10, as_folder=now)
        assert step_of(folder / "last.ckpt") == 10
        assert {p.name for p in folder.iterdir()} <= {"last.ckpt", *(p.name for p in saved_checkpoints(folder))}
        assert len(saved_checkpoints(folder)) == 2


def test_the_one_before_is_kept_and_a_step_saved_twice_takes_the_link(tmp_path):
    for step in (2, 4, 6, 6):
        write(tmp_path, step)
    assert [p.name for p in saved_checkpoints(tmp_path)] == ["last-000006.1.ckpt", "last-000006.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "last-000006.1.ckpt"  # relative: a run's folder can be moved


@pytest.mark.parametrize("num_kept", [1, 2])
def test_checkpoints_of_later_steps_give_way(tmp_path, num_kept):
    """They are of a run that was killed, and whose place another has taken from an earlier step on."""
    trainer = Trainer()
    for step, kept in ((90, [90]), (100, [100, 90]), (10, [10]), (20, [20, 10]), (20, [20, 20])):
        trainer.global_step = step
        save_checkpoint(trainer, tmp_path, "best", num_kept=num_kept)
        assert step_of(tmp_path / "best.ckpt") == step
        assert [step_of(path) for path in saved_checkpoints(tmp_path, "best")] == kept[:num_kept]


def test_a_folder_that_was_copied_is_replaced(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "part").write_text("a copy")
    write(tmp_path, 8, as_folder=True)
    assert step_of(tmp_path / "last.ckpt") == 8


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path, where):
    write(tmp_path, 4)
    trainer = Trainer()
    trainer.global_step = 6
    weight = trainer.lightning_module.weight
    weight.grad = torch.ones_like(weight)
    trainer.optimizers[0].step()
    tensor = weight if where == "weights" else trainer.optimizers[0].state[weight]["exp_avg_sq"]
    save_checkpoint(trainer, tmp_path, "last", num_kept=2)
    with torch.no_grad():
        tensor[0, 1] = float("inf")
    trainer.global_step = 8
    with pytest.raises(TrainingStopped, match=r"after step 8 .* are not finite, so nothing was saved; the last good"):
        save_checkpoint(trainer, tmp_path, "last", num_kept=2)
    assert step_of(tmp_path / "last.ckpt") == 6


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The write fails in the middle."""
    write(tmp_path, 4)

    class Large(Trainer):
        def save_checkpoint(self, path, weights_only):
            module.DirectIO().save_checkpoint({"state_dict": {"policy.model.w": torch.zeros(1 << 20)}}, path)

    trainer = Large()
    trainer.global_step = 8
    with (
        small_disk(1 << 20),
        pytest.raises(TrainingStopped, match=r"the checkpoint of step 8 cannot be written to .*; the last good"),
    ):
        save_checkpoint(trainer, tmp_path, "last", num_kept=2)
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "last-000004.ckpt"}


def test_a_defect_while_saving_keeps_its_traceback(tmp_path):
    class Broken(Trainer):
        def save_checkpoint(self, path, weights_only):
            raise RuntimeError("a shape mismatch")

    with pytest.raises(RuntimeError, match="a shape mismatch"):
        save_checkpoint(Broken(), tmp_path, "last", num_kept=2)


# ---------------------------------------------------------------------- reading


class Evil:
    def __reduce__(self):
        return (os.system, ("touch run-by-a-pickle",))


def test_the_header_says_step_and_shapes(tmp_path):
    write(tmp_path, 7)
    assert read_header("--ckpt_path", tmp_path / "last.ckpt") == (7, {"policy.model.w": (3, 2)})


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "there is no file or folder"),
    (lambda path: path.write_bytes(b""), "is not a checkpoint, or it is cut off or broken"),
    (lambda path: path.write_bytes(b"PK\x03\x04 something"), "is not a checkpoint, or it is cut off or broken"),
    (lambda path: path.write_text("a text\n" * 99), "is not a checkpoint, or it is cut off or broken"),
    (lambda path: path.mkdir(), r"cut off or broken \(meta.pt is missing\)"),
    (lambda path: torch.save([1, 2], path), "is not a checkpoint, or it is cut off or broken"),
    (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint, or it is cut off or broken"),
    (lambda path: torch.save({"state_dict": {"w": torch.zeros(2)}, "global_step": 3}, path), "of something else"),
    (lambda path: path.write_bytes(pickle.dumps({"state_dict": Evil()})), "is not a checkpoint"),
    (lambda path: torch.save({"state_dict": {"policy.w": Evil()}, "global_step": 3}, path), "is not a checkpoint"),
], ids=["missing", "empty", "zip", "text", "folder", "list", "no step", "foreign", "pickle", "code"])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_file_and_cause(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    make(path)
    with pytest.raises(ConfigError, match=f"--ckpt_path: .*{message}") as caught:
        read_header("--ckpt_path", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run-by-a-pickle").exists()


def test_cut_off_and_garbled_files_never_get_through_as_something_else(tmp_path):
    """Fuzz: any cut, and bytes overwritten anywhere, end in our one line or leave the header as it was."""
    write(tmp_path, 7)
    content = (tmp_path / "last.ckpt").read_bytes()
    path, numbers = tmp_path / "fuzzed.ckpt", random.Random(0)
    refused = 0
    for number in range(300):
        data = bytearray(content)
        if number % 2:
            del data[numbers.randrange(len(data)) :]
        else:
            start = numbers.randrange(len(data))
            data[start : start + 8] = numbers.randbytes(8)
        path.write_bytes(bytes(data))
        try:
            header = read_header("--ckpt_path", path)
        except ConfigError:
            refused += 1
        else:
            assert number % 2 == 0, "a file that is cut off is never whole"
            assert isinstance(header.step, int)
    assert refused >= 150


def test_folders_with_missing_or_cut_off_parts(tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = tmp_path / "whole"
    dcp.save({"state_dict": {"policy.model.w": torch.zeros(300, 2)}}, storage_writer=dcp.FileSystemWriter(whole))
    torch.save({"global_step": 5}, whole / "meta.pt")
    assert read_header("--ckpt_path", whole) == (5, {"policy.model.w": (300, 2)})
    (part,) = whole.glob("*.distcp")
    for name in (part.name, ".metadata", "meta.pt"):
        for cut in (True, False):
            broken = tmp_path / f"{name}{cut}"
            shutil.copytree(whole, broken)
            data = (broken / name).read_bytes()
            (broken / name).write_bytes(data[: len(data) // 2]) if cut else (broken / name).unlink()
            with pytest.raises(ConfigError, match=r"--ckpt_path: .* is not a checkpoint, or it is cut off or broken"):
                read_header("--ckpt_path", broken)


@pytest.mark.parametrize("where", ["index", "values"])
def test_a_pickle_in_a_folder_runs_no_code(tmp_path, monkeypatch, where):
    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    folder, evil = tmp_path / "x.ckpt", Evil() if where == "values" else 0.1
    content = {"state_dict": {"policy.w": torch.zeros(3, 2)}, "optimizer_0": {"lr": evil}}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder))
    torch.save({"global_step": 5}, folder / "meta.pt")
    if where == "index":
        assert read_header("--ckpt_path", folder) == (5, {"policy.w": (3, 2)})
        (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"^--ckpt_path: \S+ is not a checkpoint, or it is cut off or broken \(.*\)$"):
        read_header("--ckpt_path", folder)
    with pytest.raises(ConfigError, match="cut off or broken"):
        export_checkpoint(PolicyConfig("pkg://hdpo.lab/policy"), folder, tmp_path / "out")
    assert not (tmp_path / "run-by-a-pickle").exists()


# ---------------------------------------------------------------------- whose it is


class Module(torch.nn.Module):
    """What a checkpoint is compared with."""

    def __init__(self, optimizer, fn="fit", average=False, schedule=LinearWarmup):
        super().__init__()
        self.policy, self.optimizer, self.schedule = torch.nn.Linear(2, 1), optimizer, schedule
        self.trainer = SimpleNamespace(state=SimpleNamespace(fn=fn), ckpt_path="x.ckpt")
        if average:
            self.teacher = torch.nn.Linear(2, 1)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        # The schedule adds a setting: the learning rate at first.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer)}}


def adamw(lr=0.1, **options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, **options)


def content(module, **changes):
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    optimizer.step()
    for _ in range(7):
        schedule.step()
    return {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "global_step": 7,
        **changes,
    }


def test_a_checkpoint_of_the_same_run_fits(tmp_path):
    kept = content(Module(adamw(betas=(0.9, 0.9))))
    torch.save(kept, tmp_path / "x")
    loaded = torch.load(tmp_path / "x", weights_only=True)
    assert check_state(Module(adamw(betas=[0.9, 0.9], foreach=True)), loaded) == 7
    # An evaluation needs no optimizer; under FSDP2 the weights come apart.
    assert check_state(Module(adamw(lr=1.0), fn="validate"), loaded) == 7
    assert check_state(Module(adamw(betas=[0.9, 0.9]), average=True), {**kept, "state_dict": {}}) == 7


@pytest.mark.parametrize(("mine", "theirs", "message"), [
    (Module(adamw()), Module(adamw(), average=True), r"does not fit model.teacher: shape of teacher.weight"),
    (Module(adamw(), average=True), Module(adamw()), r"shape of teacher.weight: none in the checkpoint, \(1, 2\) in"),
    (Module(adamw()), Module(adamw(lr=0.2)), r"that of the checkpoint x.ckpt has initial_lr 0.2, and not 0.1"),
    (Module(adamw(weight_decay=0.5)), Module(adamw()), "has weight_decay 0.01, and not 0.5"),
    (Module(adamw()), Module(torch.optim.Adam), r"that of the checkpoint x.ckpt has"),
    (Module(adamw()), Module(lambda p: torch.optim.SGD(p, lr=0.1)), r"that of the checkpoint x.ckpt has"),
], ids=["average more", "average less", "lr", "decay", "Adam", "SGD"])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(mine, theirs, message):
    with pytest.raises(ConfigError, match=message):
        check_state(mine, content(theirs))


SCHEDULES = {
    "warm-up": LinearWarmup,
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 100),
    "longer": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 200),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 5]),
    "function": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
    "one after the other": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_same_schedule_fits_wherever_it_stands(tmp_path, schedule):
    torch.save(content(Module(adamw(), schedule=schedule)), tmp_path / "x")
    loaded = torch.load(tmp_path / "x", weights_only=True)
    assert check_state(Module(adamw(), schedule=schedule), loaded) == 7
    del loaded["lr_schedulers"]
    assert check_state(Module(adamw(), schedule=schedule), loaded) == 7


@pytest.mark.parametrize(("mine", "theirs", "message"), [
    ("warm-up", lambda o: LinearWarmup(o, num_warmup_steps=20), "has total_iters 20, and not 50"),
    ("warm-up", lambda o: LinearWarmup(o, start_factor=0.5), "has start_factor 0.5, and not 0.1"),
    ("cosine", SCHEDULES["longer"], "has T_max 200, and not 100"),
    ("cosine", LinearWarmup, "has T_max None, and not 100"),
    ("function", SCHEDULES["cosine"], "has T_max 100, and not None"),
])  # fmt: skip
def test_another_schedule_is_refused(mine, theirs, message):
    message = rf"^model.lr_scheduler: that of the checkpoint x.ckpt {message}: resume with the config.yaml of its run"
    module, other = Module(adamw(), schedule=SCHEDULES[mine]), Module(adamw(), schedule=theirs)
    with pytest.raises(ConfigError, match=message):
        check_state(module, content(other))
    module.trainer.state.fn = "validate"
    assert check_state(module, content(other)) == 7


def test_a_checkpoint_of_another_shape_or_with_bad_weights_is_refused():
    module = Module(adamw())
    other = content(module, state_dict={**module.state_dict(), "policy.weight": torch.ones(2, 2)})
    with pytest.raises(ConfigError, match=r"fit model.policy.path: shape of policy.weight: \(2, 2\) in"):
        check_state(module, other)
    bad = content(module, state_dict={**module.state_dict(), "policy.bias": torch.tensor([float("inf")])})
    with pytest.raises(ConfigError, match=r"the checkpoint x.ckpt holds weights that are not finite"):
        check_state(module, bad)


def test_a_flipped_bit_in_a_weight_is_found(tmp_path):
    """PyTorch reads it without a word."""
    torch.save({"state_dict": {"policy.w": torch.full((64,), 1.5)}, "global_step": 1}, tmp_path / "x.ckpt")
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    place = data.index(torch.full((64,), 1.5).numpy().tobytes())
    data[place] ^= 1
    (tmp_path / "x.ckpt").write_bytes(bytes(data))
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["policy.w"][0] != 1.5
    with pytest.raises(ConfigError, match=r"cut off or broken \(x/data/0 is not what was written\)"):
        read_header("--ckpt_path", tmp_path / "x.ckpt")
