"""Files that appear whole or not at all, and what a configuration may name."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hdpo
from hdpo.errors import ConfigError
from hdpo.files import find_config, import_object, resolve_path, run_folder, whole_file, whole_folder, write_text

SHIPPED = Path(hdpo.__file__).parent.parent / "configs"


def test_a_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    with whole_file(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        assert partial.parent == path.parent, "a file can only be put in place from its own file system"
        with partial.open("ab") as file:
            file.write(b"whole")
    assert path.read_bytes() == b"halfwhole"
    with whole_file(str(path)) as partial:
        partial.write_bytes(b"other")
    assert path.read_bytes() == b"other"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")

    def fail():
        with whole_file(path) as partial:
            partial.write_text("after")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, synced = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or synced(number))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_text(tmp_path / "file", "Größe: ≤ 3\n")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == "Größe: ≤ 3\n".encode()


def test_the_files_of_a_folder_appear_together_beside_what_is_there(tmp_path):
    folder = tmp_path / "new" / "policy"
    for content in ("one", "two"):
        with whole_folder(folder) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "weights").write_text(content)
            assert not (folder / "inner" / "weights").exists() or content == "two"
        assert (folder / "inner" / "weights").read_text() == content
        (folder / "notes.txt").write_text("the user's")
    assert sorted(p.name for p in folder.rglob("*")) == ["inner", "notes.txt", "weights"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folders_files_are_on_disk_before_they_take_their_places(tmp_path, monkeypatch):
    calls, synced, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or synced(number))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with whole_folder(tmp_path / "policy") as partial:
        (partial / "config").touch()
        (partial / "weights").touch()
    assert calls == ["fsync", "fsync", "replace", "replace"]


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path, error):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "weights").write_text("before")

    def fail():
        with whole_folder(tmp_path / "policy") as partial:
            (partial / "weights").write_text("half")
            raise error

    with pytest.raises(OSError, match="No space left on device") as caught:
        fail()
    assert caught.value.errno == 28
    assert (tmp_path / "policy" / "weights").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_run_writes_into_its_loggers_folder(tmp_path):
    assert run_folder(SimpleNamespace(log_dir=str(tmp_path / "a"), default_root_dir="b")) == tmp_path / "a"
    assert run_folder(SimpleNamespace(log_dir=None, default_root_dir="b")) == Path("b")


def test_a_configuration_of_the_users_comes_before_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("lab") == str(SHIPPED / "lab.yaml")
    assert find_config("strategy/ddp.yaml") == str(SHIPPED / "strategy" / "ddp.yaml")
    assert find_config("strategy/ddp") == str(SHIPPED / "strategy" / "ddp.yaml")
    (tmp_path / "lab").write_text("seed_everything: 1")
    assert find_config("lab") == "lab"
    with pytest.raises(
        ConfigError, match=r"--config: there is no file 'labs', and none .*engine/vllm, .*lab, "
    ) as caught:
        find_config("labs")
    assert "\n" not in str(caught.value)


def test_a_folder_inside_of_a_package(tmp_path):
    assert resolve_path("pkg://hdpo.lab/policy") == str(Path(hdpo.__file__).parent / "lab" / "policy")
    for path in ("Qwen/Qwen2.5", "/absolute", "./relative"):
        assert resolve_path(path) == path
    for path, reason in (
        ("pkg://no_such_package/x", "there is no installed package 'no_such_package'"),
        ("pkg://no.such.package/x", "there is no installed package 'no.such.package'"),
        ("pkg://hdpo.files/x", "there is no installed package 'hdpo.files'"),  # a module has no folder
        ("pkg://hdpo.lab/nothing", "the package 'hdpo.lab' has no 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            resolve_path(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_an_object_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine_of_test_files.py").write_text("import no_such_library\n")
    (tmp_path / "other_of_test_files.py").write_text("value = 3\n")
    (tmp_path / "broken_of_test_files.py").write_text("import math\n\nhalf = math.halve(2)\nvalue = 3\n")
    (tmp_path / "wrong_of_test_files.py").write_text("value = = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_object("reward", "other_of_test_files:value") == 3
    for path, reason in (
        ("math.gcd", "is not of the form package.module:name"),
        (":gcd", "is not of the form package.module:name"),
        ("math:", "is not of the form package.module:name"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("mine_of_test_files:f", "No module named 'no_such_library'"),
        ("math:gcdx", "the module math has no 'gcdx'"),
        ("broken_of_test_files:value", "AttributeError: module 'math' has no attribute 'halve'"),
        ("wrong_of_test_files:value", "SyntaxError: invalid syntax .*, line 1"),
    ):
        with pytest.raises(ConfigError, match=f"reward: .*{reason}"):
            import_object("reward", path)
    assert "mine_of_test_files" not in sys.modules
