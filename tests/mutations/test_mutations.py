"""The mutations fit the code, and a sample of them is noticed; ``make mutants`` runs all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.mutation import MUTATIONS, applied
from tests.mutations.runner import ROOT

pytestmark = pytest.mark.slow


def test_every_mutation_fits_the_code():
    assert len({m.key for m in MUTATIONS}) == len(MUTATIONS) > 150
    for mutation in MUTATIONS:
        compile(applied(mutation, ROOT), mutation.file, "exec")
        assert all((ROOT / test).is_file() for test in mutation.tests), mutation


@pytest.mark.timeout(1200)
def test_a_sample_of_mutations_is_noticed(tmp_path):
    """Some of each room, in a process of its own: it forks pytest once per mutation."""
    options = ["--sample", "12", "--results", str(tmp_path / "results.jsonl"), "--no_baseline"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutations", *options],
        cwd=ROOT, env=os.environ | {"PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("12 killed")
    assert len(Path(tmp_path / "results.jsonl").read_text().splitlines()) == 12


def test_a_survivor_is_reported_and_what_is_done_is_not_done_again(tmp_path):
    """The runner itself: a change that no test can notice survives, one that a test notices does not."""
    from tests.mutations.mutation import Mutation
    from tests.mutations.runner import Results

    test = ("tests/test_files.py",)
    harmless = Mutation("hdpo/files.py", '"""Write a text file', '"""Writes a text file', test)
    noticed = Mutation("hdpo/files.py", "os.replace(partial, path)", "partial.unlink()", test)
    broken = Mutation("hdpo/files.py", "import importlib\n", "import importlib +\n", test)
    script = (
        "import sys; from pathlib import Path; from tests.mutations import runner; "
        "from tests.mutations.mutation import Mutation; "
        f"runner.run([{harmless!r}, {noticed!r}, {broken!r}], runner.Results(Path(sys.argv[1])))"
    )
    path = tmp_path / "results.jsonl"
    before = (ROOT / "hdpo" / "files.py").read_text()
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=True, capture_output=True)
        rows = Results(path).rows
        assert [rows[m.key]["status"] for m in (harmless, noticed, broken)] == ["survived", "killed", "broken"]
        assert rows[noticed.key]["by"].startswith("tests/test_files.py::test_")
        assert len(path.read_text().splitlines()) == 3
    assert (ROOT / "hdpo" / "files.py").read_text() == before, "the working tree is left alone"
