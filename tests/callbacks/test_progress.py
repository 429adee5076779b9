"""What one sees while it runs: a bar in a terminal, lines elsewhere."""

import io
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from hdpo.callbacks import Evaluation, Progress, progress
from hdpo.cli import main
from hdpo.errors import ConfigError
from tests.helpers import toy


class Clock:
    """Time that passes only in steps and evaluations."""

    now = 100.0

    def monotonic(self):
        return self.now


def run(bar, clock, *, steps=12, interval=4, sizes=(3, 2), seconds=10.0, evaluation=30.0):
    """The calls of a fit whose steps take 10 s and whose evaluations, of two sets, take 30 s."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=SimpleNamespace(value="fit")), global_step=0, max_steps=steps,
        val_check_batch=interval, enable_validation=True, num_val_batches=list(sizes),
        num_test_batches=[], num_predict_batches=[],
        sanity_checking=False, progress_bar_metrics={}, callback_metrics={},
    )  # fmt: skip
    trainer.state.fn = type("Fn", (str,), {"value": "fit"})("fit")

    def evaluate():
        bar.on_validation_start(trainer, None)
        for _ in range(sum(sizes)):
            clock.now += evaluation / sum(sizes)
            bar.on_validation_batch_end(trainer, None, None, None, 0)
        trainer.callback_metrics = {"val/pass@8": 0.75, "val/any@8": 0.5, "val/tier1/pass@8": 0.25, "loss": 1.0}
        trainer.progress_bar_metrics["pass@8"] = 0.75
        bar.on_validation_end(trainer, None)

    bar.on_train_start(trainer, None)
    evaluate()
    for step in range(1, steps + 1):
        trainer.global_step = step
        clock.now += seconds
        trainer.progress_bar_metrics |= {"reward": 0.5, "cliffs": step / 16}
        bar.on_train_batch_end(trainer, None, None, SimpleNamespace(metrics={"time/step": seconds}), step)
        if step % interval == 0:
            evaluate()
    bar.on_train_end(trainer, None)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_where_there_is_no_terminal(capsys, clock):
    run(Progress(every_n_steps=5, every_n_seconds=1e9), clock)
    lines = capsys.readouterr().err.splitlines()
    evaluated = "evaluation at step {} | pass@8 0.750 | 30 s"
    # What is left at step n: 12 - n steps of 10 s, and the evaluations after 4, 8 and 12 that are still to come.
    assert lines == [
        evaluated.format(0),
        "step 1/12 | pass@8 0.750 | reward 0.500 | cliffs 0.062 | 10 s per step | 3 min 20 s left",
        evaluated.format(4),
        "step 5/12 | pass@8 0.750 | reward 0.500 | cliffs 0.312 | 10 s per step | 2 min 10 s left",
        evaluated.format(8),
        "step 10/12 | pass@8 0.750 | reward 0.500 | cliffs 0.625 | 10 s per step | 50 s left",
        "step 12/12 | pass@8 0.750 | reward 0.500 | cliffs 0.750 | 10 s per step | 30 s left",
        evaluated.format(12),
    ]


def test_slow_runs_speak_at_least_once_in_a_while(capsys, clock):
    run(Progress(every_n_steps=100, every_n_seconds=20.0), clock, steps=4, interval=100, evaluation=50.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" |")[0] for line in lines] == [
        "evaluating: batch 2/5", "evaluating: batch 4/5", "evaluation at step 0", "step 1/4", "step 3/4", "step 4/4"
    ]  # fmt: skip
    assert lines[0].endswith("| 20 s | 30 s left")


def test_one_bar_in_a_terminal(monkeypatch, clock):
    written, real = io.StringIO(), progress.Console
    monkeypatch.setattr(
        progress, "Console", lambda stderr: real(file=written, force_terminal=True, width=100, color_system=None)
    )
    bar = Progress(every_n_steps=1)
    updates, show = [], bar._show
    monkeypatch.setattr(bar, "_show", lambda *args: updates.append(args) or show(*args))
    run(bar, clock, steps=4, interval=2)
    assert bar._bars is None, "the terminal is given back"
    assert [(name, done, total) for name, _, done, total in updates if name == "fit"] == [
        ("fit", step, 4) for step in range(1, 5)
    ]
    text = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", written.getvalue())
    assert "evaluation at step 2 | pass@8 0.750" in text
    assert "step 4/4 | pass@8 0.750 | reward 0.500 | cliffs 0.250" in text
    assert "Epoch" not in text


def test_other_ranks_are_silent(capsys, clock):
    bar = Progress(every_n_steps=1)
    bar.disable()
    run(bar, clock)
    assert capsys.readouterr().err == ""


def test_a_real_run_says_what_it_measured(tmp_path, capsys):
    bar = Progress(every_n_steps=1)
    trainer = toy.trainer(
        tmp_path,
        max_steps=2,
        val_check_interval=2,
        callbacks=[Evaluation(summary=False), bar],
        enable_progress_bar=True,
    )
    trainer.fit(toy.module(), datamodule=toy.datamodule(tmp_path, num_val_problems=3))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step ", "evaluation "))]
    value = trainer.callback_metrics["val/pass@2"].item()
    assert [line.split(" |")[0] for line in lines] == [
        "evaluation at step 0", "step 1/2", "step 2/2", "evaluation at step 2"
    ]  # fmt: skip
    assert f"| pass@2 {value:.3f} |" in lines[-1]
    reward, cliffs = (float(trainer.progress_bar_metrics[name]) for name in ("reward", "cliffs"))
    assert f"| reward {reward:.3f} | cliffs {cliffs:.3f} |" in lines[2]


@pytest.mark.parametrize(
    ("settings", "present"),
    [
        ((), True),
        (("--trainer.enable_progress_bar=false",), False),
        (("--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.RichProgressBar}]",), False),
    ],
)
def test_the_command_line_brings_it_unless_there_is_another(tmp_path, monkeypatch, settings, present):
    from hdpo.commands.run import HDPOCLI

    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(HDPOCLI, "_run_subcommand", lambda self, name: found.extend(self.trainer.callbacks))
    options = [
        "--progress.every_n_steps=7",
        "--progress.every_n_seconds=8",
        "--model.verifier=tests.helpers.toy.BoxedVerifier",
    ]
    assert main(["fit", "--config", "lab", *options, *settings]) == 0
    bars = [callback for callback in found if isinstance(callback, Progress)]
    assert [(bar.every_n_steps, bar.every_n_seconds) for bar in bars] == [(7, 8.0)] * present
    assert any(isinstance(c, RichProgressBar) for c in found) == (len(settings) == 1 and "Rich" in settings[0])


def test_intervals_are_positive():
    with pytest.raises(ConfigError, match=r"progress\.every_n_steps"):
        Progress(every_n_steps=0)
    with pytest.raises(ConfigError, match=r"progress\.every_n_seconds"):
        Progress(every_n_seconds=0)
