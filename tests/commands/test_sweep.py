"""Sweeps of a ``fit`` that takes no time: a script that writes what ``fit`` would, or fails, or hangs."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from hdpo.commands import sweep
from hdpo.errors import ConfigError
from hdpo.evaluation.comparison import build_report
from hdpo.evaluation.records import write_gzip
from hdpo.evaluation.runs import find_runs
from tests.evaluation.simulate import rates, rows

FAKE_FIT = """
import argparse, json, os, shutil, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("command")
parser.add_argument("--config", action="append")
for name in ("save_dir", "name", "version"):
    parser.add_argument(f"--trainer.logger.init_args.{name}", dest=name)
parser.add_argument("--model.distillation_weight", dest="weight", type=float, default=0.5)
parser.add_argument("--model.update.max_grad_norm", dest="norm", type=float, default=1.0)
parser.add_argument("--seed_everything", dest="seed", type=int)
parser.add_argument("--resume")
parser.add_argument("--trainer.max_steps", dest="max_steps", type=int, default=10)
options = parser.parse_args()
assert options.command == "fit"
folder = Path(options.save_dir) / options.name / options.version
calls = Path(os.environ["CALLS"])
with calls.open("a") as file:
    call = {**vars(options), "threads": os.environ["OMP_NUM_THREADS"], "started": time.time()}
    file.write(json.dumps(call) + "\\n")
behaviour = json.loads(Path(os.environ["BEHAVIOUR"]).read_text()).get(options.version)
print("fit of", options.version, flush=True)
if behaviour == "fail":
    sys.exit("hdpo: error: no such luck")
if behaviour == "hang":
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    time.sleep(60)
time.sleep(float(behaviour or 0))
config = {
    "seed_everything": options.seed,
    "model": {"distillation_weight": options.weight, "update": {"max_grad_norm": options.norm}},
}
(folder / "config.yaml").write_text(json.dumps(config))
(folder / "evaluations").mkdir(exist_ok=True)
shutil.copy(calls.parent / "evaluation.jsonl.gz", folder / "evaluations" / f"step_{options.max_steps:06d}.jsonl.gz")
(folder / "finished").touch()
with calls.open("a") as file:
    file.write(json.dumps({"version": options.version, "ended": time.time()}) + "\\n")
"""


class Place:
    """A folder with configurations, a fake ``fit`` and what it is told to do."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "runs" / "sweep"
        for name in ("a.yaml", "b.yaml", "grpo.yaml", "hdpo.yaml"):
            (folder / name).write_text("model: {}")
        write_gzip(folder / "evaluation.jsonl.gz", rows(rates(6), rng=np.random.default_rng(0)))
        (folder / "fake_fit.py").write_text(textwrap.dedent(FAKE_FIT))
        self.behave({})

    def behave(self, behaviour):
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def arguments(self, *more, seeds="2"):
        configs = ["--config", str(self.folder / "a.yaml"), "--config", str(self.folder / "b.yaml")]
        return [*configs, "--seeds", seeds, "--out", str(self.out), *more]

    def arms(self):
        return ["--arms", str(self.folder / "grpo.yaml"), str(self.folder / "hdpo.yaml")]

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [argparse.Namespace(**json.loads(line)) for line in lines]

    @property
    def started(self):
        return [call.version for call in self.calls if hasattr(call, "started")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    monkeypatch.setattr(sweep, "FIT", [sys.executable, str(tmp_path / "fake_fit.py")])
    monkeypatch.setattr(sweep, "_READ", "")  # which takes seconds
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("BEHAVIOUR", str(tmp_path / "behaviour.json"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place.reports = []
    monkeypatch.setattr("hdpo.commands.report.main", lambda arguments: place.reports.append(arguments) or 0)
    return place


def test_arms_and_seeds_and_then_the_report(place, capsys):
    assert sweep.main(place.arguments(*place.arms(), "--", "--trainer.max_steps", "7")) == 0
    assert place.started == ["grpo-seed_0", "hdpo-seed_0", "grpo-seed_1", "hdpo-seed_1"]
    for call in place.calls[::2]:
        files = [place.folder / name for name in ("a.yaml", "b.yaml", f"{call.version.split('-')[0]}.yaml")]
        assert call.config == [str(file) for file in files]
        assert (call.save_dir, call.name, call.max_steps) == (str(place.out.parent), "sweep", 7)
        assert call.version.endswith(f"-seed_{call.seed}")
        assert call.resume == "auto"
        assert call.threads == str(os.cpu_count())
        assert (place.out / call.version / "fit.log").read_text() == f"fit of {call.version}\n"
    assert place.reports == [[str(place.out)]]
    assert "(4 of 4)" in capsys.readouterr().out
    identity = json.loads((place.out / "hdpo-seed_1" / "sweep.json").read_text())
    assert (identity["arm"], identity["seed"]) == ("hdpo", 1)
    assert len(identity["config_sha256"]) == 3
    assert {"commit", "code"} <= identity.keys()


def test_any_keys_in_all_combinations(place):
    values = ["--set", "model.update.max_grad_norm=0.5,2", "--weights", "0,1"]
    assert sweep.main(place.arguments(*values, seeds="7,3")) == 0
    found = [(call.seed, call.weight, call.norm) for call in place.calls[::2]]
    assert found == [(seed, weight, norm) for seed in (7, 3) for weight in (0.0, 1.0) for norm in (0.5, 2.0)]
    assert place.started[1] == "distillation_weight_0-max_grad_norm_2-seed_7"
    assert {s["label"] for s in build_report(find_runs([place.out]))["settings"]} == {
        "weight 0, max_grad_norm 0.5", "weight 0, max_grad_norm 2", "weight 1, max_grad_norm 0.5",
        "weight 1, max_grad_norm 2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k=1,2", ("k", ["1", "2"])),
        ("k=1e-4,null,true", ("k", ["1e-4", "null", "true"])),
        ("k=[1,4],[1,8]", ("k", ["[1, 4]", "[1, 8]"])),
        ("k=a.B,c.D", ("k", ["a.B", "c.D"])),
        ("k={class_path: a.B}", ("k", ['{"class_path": "a.B"}'])),
        ("k=0.10", ("k", ["0.1"])),
        ("k=2024-01-31,[2024-02-01]", ("k", ["2024-01-31", '["2024-02-01"]'])),
    ],
)
def test_values(text, expected):
    assert sweep._values(text) == expected


def test_several_at_a_time(place):
    place.behave(dict.fromkeys(("grpo-seed_0", "hdpo-seed_0", "grpo-seed_1", "hdpo-seed_1"), "0.7"))
    assert sweep.main(place.arguments(*place.arms(), "--jobs", "2")) == 0
    started = {c.version: c.started for c in place.calls if hasattr(c, "started")}
    ended = {c.version: c.ended for c in place.calls if hasattr(c, "ended")}
    assert started["hdpo-seed_0"] < ended["grpo-seed_0"], "the first two overlap"
    running = [sum(started[o] <= t < ended[o] for o in started) for t in started.values()]
    assert max(running) == 2
    assert {c.threads for c in place.calls if hasattr(c, "started")} == {str(max(1, os.cpu_count() // 2))}


def test_finished_runs_are_skipped(place, capsys):
    sweep.main(place.arguments(*place.arms()))
    capsys.readouterr()
    assert sweep.main(place.arguments(*place.arms())) == 0
    assert len(place.started) == 4
    assert "4 of 4 runs were finished before" in capsys.readouterr().out
    assert sweep.main(place.arguments(*place.arms(), seeds="3")) == 0
    assert place.started[4:] == ["grpo-seed_2", "hdpo-seed_2"], "more seeds extend it"


def test_a_failed_run_is_reported_and_the_others_go_on(place, capsys):
    place.behave({"hdpo-seed_0": "fail"})
    assert sweep.main(place.arguments(*place.arms())) == 1
    assert len(place.started) == 4
    printed = capsys.readouterr().out
    assert "== hdpo-seed_0 FAILED with status 1: hdpo: error: no such luck (" in printed
    assert "1 of 4 runs failed (hdpo-seed_0)" in printed
    assert place.reports == [[str(place.out)]]
    place.behave({})
    assert sweep.main(place.arguments(*place.arms())) == 0
    assert place.started[4:] == ["hdpo-seed_0"]


def run_sweep(place, *arguments):
    code = (
        f"import sys; from hdpo.commands import sweep; sweep.FIT, sweep._READ = {sweep.FIT!r}, ''; "
        "sys.exit(sweep.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *place.arguments(*arguments)], stdout=subprocess.PIPE, text=True
    )


def hanging(place, version):
    """Wait until the fit of a version hangs; returns its process id."""
    for _ in range(600):
        if (place.out / version / "checkpoints" / "last.ckpt").exists():
            break
        time.sleep(0.05)
    (pid,) = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdecimal() and {version, str(place.out.parent)} <= set((path / "cmdline").read_text().split("\0"))
    ]
    return pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_continues_where_it_was(place, how):
    place.behave({"grpo-seed_1": "hang"})
    process = run_sweep(place, *place.arms())
    child = hanging(place, "grpo-seed_1")
    with pytest.raises(ConfigError, match="another sweep is working in"):
        sweep.main(place.arguments(*place.arms()))
    process.send_signal(how)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == (75 if how == signal.SIGTERM else -9)
    assert ("repeat the command to continue" in printed) == (how == signal.SIGTERM)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists(), "its run ended with it"
    place.behave({})
    assert sweep.main(place.arguments(*place.arms())) == 0
    assert place.started == ["grpo-seed_0", "hdpo-seed_0", "grpo-seed_1", "grpo-seed_1", "hdpo-seed_1"]
    assert (place.out / "grpo-seed_1" / "checkpoints" / "last.ckpt").exists(), "what there was to resume from is kept"


def test_a_run_without_a_checkpoint_starts_anew(place):
    sweep.main(place.arguments(*place.arms()))
    folder = place.out / "hdpo-seed_0"
    (folder / "finished").unlink()
    (folder / "events.out.tfevents.1").touch()
    assert sweep.main(place.arguments(*place.arms())) == 0
    assert place.started[4:] == ["hdpo-seed_0"]
    assert not (folder / "events.out.tfevents.1").exists()


def test_runs_of_another_sweep_are_not_taken_for_this_ones(place):
    sweep.main(place.arguments(*place.arms()))
    with pytest.raises(ConfigError, match="grpo-seed_0 was made with other arguments"):
        sweep.main(place.arguments(*place.arms(), "--", "--trainer.max_steps", "9"))
    (place.folder / "hdpo.yaml").write_text("model: {topk: 8}")
    with pytest.raises(ConfigError, match="hdpo-seed_0 was made with other arguments or another configuration"):
        sweep.main(place.arguments(*place.arms()))
    assert len(place.started) == 4


def test_runs_of_other_code_are_continued_deliberately(place, monkeypatch):
    sweep.main(place.arguments(*place.arms()))
    version = {**sweep.code_version(), "code": "other", "commit": "newer"}
    monkeypatch.setattr(sweep, "code_version", lambda: version)
    with pytest.raises(ConfigError, match=r"grpo-seed_0 was made by other code \(commit .*\): add --other_code"):
        sweep.main(place.arguments(*place.arms()))
    assert sweep.main(place.arguments(*place.arms(), "--other_code", seeds="3")) == 0
    assert place.started[4:] == ["grpo-seed_2", "hdpo-seed_2"]
    # A commit that leaves the code as it is changes nothing.
    monkeypatch.setattr(sweep, "code_version", lambda: {**version, "commit": "newest"})
    assert sweep.main(place.arguments(*place.arms(), "--other_code", seeds="3")) == 0


def test_a_foreign_folder_is_refused_before_anything_runs(place):
    foreign = place.out / "hdpo-seed_1" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(ConfigError, match=r"hdpo-seed_1 exists and was not made by a sweep"):
        sweep.main(place.arguments(*place.arms()))
    assert foreign.exists()
    assert place.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lr"], "--set must be KEY=V1,V2"),
        (["--set", "lr="], "--set must be KEY=V1,V2"),
        (["--set", "lr=[1"], "--set must be KEY=V1,V2"),
        (["--set", "lr=1,1.0,1"], "--set names a value twice"),
        (["--set", "lr=a/b,a_b"], "two runs would share the folder"),
        (["--seeds", "0"], "--seeds must be at least one"),
        (["--seeds", "1,1"], "--seeds must be at least one, different"),
        (["--seeds", "1,x"], "--seeds must be a number of seeds, or seeds"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--arms", "nowhere"], "--config: there is no file 'nowhere'"),
        (["--out", __file__], "--out: .*test_sweep.py is a file; name a folder"),
        (["--wieghts", "0"], "sweep: .*--wieghts"),
        (["--jobs", "many"], "sweep: .*jobs"),
    ],
)
def test_bad_input(place, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sweep.main(place.arguments(*arguments))
    assert "\n" not in str(caught.value)
    assert place.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "UNKNOWN.KEY=1,2"], "unrecognized arguments: --UNKNOWN.KEY 1"),
        (["--set", "model.distillation_weight=1,x"], "model.distillation_weight.*Got value: x"),
        (["--arms", "good.yaml", "twice.yaml"], "twice.yaml, line 2: not YAML .*model stands twice"),
    ],
)
def test_what_fit_refuses_is_told_once_before_any_run_starts(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text("model: {}\n")
    Path("twice.yaml").write_text("model: {}\nmodel: {}\n")
    assert sweep.main(["--config", "lab", "--seeds", "2", "--out", "runs/sweep", *arguments]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert re.fullmatch(f"hdpo: error: .*{message}.*\n", told.err)
    assert not list(Path("runs").rglob("fit.log"))


def test_a_missing_config_is_named(place):
    with pytest.raises(ConfigError, match="--config: there is no file"):
        sweep.main(["--config", str(place.folder / "missing.yaml")])
    with pytest.raises(ConfigError, match=r"sweep: .*config"):
        sweep.main([])
