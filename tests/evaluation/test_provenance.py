import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hdpo
from hdpo.evaluation import provenance
from hdpo.evaluation.provenance import Spending, code_version, read_provenance, write_provenance


def test_the_code_is_named():
    found = code_version()
    root = Path(hdpo.__file__).parent
    assert found["hdpo"] == hdpo.__version__
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert found["commit"] == commit.stdout.strip()
    everything = provenance.provenance()
    assert (everything["torch"], everything["transformers"]) == (torch.__version__, transformers.__version__)
    assert "cores" in everything["machine"]


def test_a_package_in_another_projects_checkout_has_no_commit(tmp_path):
    package = tmp_path / "site" / "hdpo"
    (package / "evaluation").mkdir(parents=True)
    for name in ("evaluation/provenance.py", "errors.py", "files.py"):
        (package / name).write_text((Path(hdpo.__file__).parent / name).read_text())
    (package / "__init__.py").write_text("__version__ = '9'")
    (package / "evaluation" / "__init__.py").touch()

    def version():
        code = "import json; from hdpo.evaluation.provenance import code_version as v; print(json.dumps(v()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, env={"PYTHONPATH": str(package.parent)},
                              capture_output=True, text=True, check=True)  # fmt: skip
        return json.loads(done.stdout)

    first = version()
    assert (first["hdpo"], first["commit"], first["changed"]) == ("9", None, None)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert version() == first, "it is not tracked there"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    second = version()
    assert (len(second["commit"]), second["changed"], second["code"]) == (40, False, first["code"])
    with (package / "files.py").open("a") as file:
        file.write("# changed\n")
    third = version()
    assert (third["commit"], third["changed"]) == (second["commit"], True)
    assert third["code"] != first["code"]


def test_what_was_spent():
    spending = Spending(window=3)
    for step in range(5):
        metrics = {"time/step": 0.5, "spent/tokens": 100.0, "spent/completions": 3.0, "cliff/fraction": float(step)}
        if step % 2 == 0:
            metrics |= {"spent/solutions": 2.0, "privileged/pass_rate": step / 4}
        spending.add(metrics)
    found = spending.so_far()
    assert [found[k] for k in ("train_seconds", "tokens", "completions", "solutions")] == [2.5, 500, 15, 6]
    assert found["recent"]["cliff/fraction"] == pytest.approx(3.0)
    assert found["recent"]["privileged/pass_rate"] == pytest.approx(0.75), "over the steps that have one"
    # As a checkpoint keeps it.
    resumed = Spending(window=3)
    resumed.load_state_dict(json.loads(json.dumps(spending.state_dict())))
    assert resumed.so_far() == found
    for one in (spending, resumed):
        one.add({"time/step": 1.0, "spent/tokens": 1.0})
    assert resumed.so_far() == spending.so_far()


def test_the_file_names_each_code_and_each_evaluation(tmp_path, monkeypatch):
    write_provenance(tmp_path, "test", 0, {"tokens": 0})
    write_provenance(tmp_path, "test", 20, {"tokens": 5})
    write_provenance(tmp_path, "test", 20, {"tokens": 6})
    found = read_provenance(tmp_path)
    assert found["processes"] == [provenance.provenance()]
    assert found["evaluations"] == {"test/0": {"tokens": 0}, "test/20": {"tokens": 6}}
    newer = {**provenance.provenance(), "commit": "newer"}
    monkeypatch.setattr(provenance, "provenance", lambda: newer)
    write_provenance(tmp_path, "test", 40, {})
    assert [p["commit"] for p in read_provenance(tmp_path)["processes"]][1:] == ["newer"]
    assert read_provenance(tmp_path / "nothing") == {}
