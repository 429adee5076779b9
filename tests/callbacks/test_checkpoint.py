"""A checkpoint's path holds a whole checkpoint at every moment."""

import os

import pytest

from hdpo.callbacks import checkpoint as module

CALLS = [(os, "replace"), (os, "symlink"), (os, "unlink"), (os, "rename"), (module.shutil, "rmtree")]


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


def write(path, folder, content):
    """Write a checkpoint as a run does."""
    written = module._siblings(path)[0]
    module._remove(written)
    if folder:
        written.mkdir()
        (written / "part").write_text(content)
    else:
        written.write_text(content)
    module._put_in_place(path)


def read(path):
    return (path / "part" if path.is_dir() else path).read_text()


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
                original(*args, **kwargs)
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
        write(tmp_path / "last.ckpt", before, "old")
        first = total[0]
        write(tmp_path / "last.ckpt", now, "new")
        total = total[0] - first
    assert total > 0
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "last.ckpt"
        write(path, before, "old")
        with monkeypatch.context() as patch:
            kill_at(patch, number, after=after)
            with pytest.raises(Killed):
                write(path, now, "new")
        assert read(path) in ("old", "new"), number
        # The next run cleans up.
        write(path, now, "newer")
        assert read(path) == "newer"
        assert set(folder.iterdir()) == {path, path.resolve()}


def test_a_folder_that_was_copied_is_replaced(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "part").write_text("copy")
    write(path, True, "new")
    assert read(path) == "new"
    assert set(tmp_path.iterdir()) == {path, path.resolve()}
    assert not path.readlink().is_absolute()  # a run's folder can be moved
