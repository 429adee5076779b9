import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from hdpo.analysis.sweep import main
from tests.analysis.simulate import evaluation, rates, write_run


class FakeFit:
    """Runs ``fit`` as far as a sweep can see: it writes a run's folder, unless told to fail or to be interrupted."""

    def __init__(self):
        self.calls = []
        self.fail = self.interrupt = None

    def __call__(self, args):
        assert args[0] == "fit"
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", action="append")
        for name in ("save_dir", "name", "version"):
            parser.add_argument(f"--trainer.logger.init_args.{name}", dest=name)
        parser.add_argument("--model.distillation_weight", dest="weight", type=float)
        parser.add_argument("--seed_everything", dest="seed", type=int)
        parser.add_argument("--ckpt_path")
        parser.add_argument("--trainer.max_steps", dest="max_steps", type=int, default=10)
        options = parser.parse_args(args[1:])
        self.calls.append(options)
        folder = Path(options.save_dir) / options.name / options.version
        if options.version == self.fail:
            return 2
        if options.version == self.interrupt:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            raise KeyboardInterrupt
        rows = evaluation(rates(10), rng=np.random.default_rng(len(self.calls)))
        write_run(folder, weight=options.weight, seed=options.seed, evaluations={options.max_steps: rows})
        return 0

    @property
    def versions(self):
        return [call.version for call in self.calls]


@pytest.fixture
def fit():
    return FakeFit()


@pytest.fixture
def arguments(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("model: {}")
    configs = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    return [*configs, "--weights", "0,0.01", "--seeds", "2", "--out", str(tmp_path / "runs" / "sweep")]


ALL = ["lambda_0-seed_0", "lambda_0.01-seed_0", "lambda_0-seed_1", "lambda_0.01-seed_1"]


def test_every_weight_and_seed_and_then_the_report(fit, arguments, tmp_path, capsys):
    assert main([*arguments, "--", "--trainer.max_steps", "7"], fit) == 0
    assert fit.versions == ALL
    for call in fit.calls:
        assert call.config == [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
        assert (call.save_dir, call.name) == (str(tmp_path / "runs"), "sweep")
        assert call.max_steps == 7
        assert call.ckpt_path is None
        assert call.version == f"lambda_{call.weight:g}-seed_{call.seed}"
    report = json.loads((tmp_path / "runs" / "sweep" / "report" / "report.json").read_text())
    assert len(report["runs"]) == 4
    assert {row["num_seeds"] for row in report["differences"]} == {2}
    assert report["notes"] == []
    assert "(4 of 4)" in capsys.readouterr().out


def test_finished_runs_are_skipped(fit, arguments, tmp_path, capsys):
    main(arguments, fit)
    # Stopped between the last evaluation and the marker: finished, too.
    (tmp_path / "runs" / "sweep" / ALL[1] / "done").unlink()
    assert main(arguments, fit) == 0
    assert fit.versions == ALL
    assert capsys.readouterr().out.count("finished before, skipped") == 4


def test_an_interrupted_run_is_resumed(fit, arguments, tmp_path):
    fit.interrupt = ALL[2]
    with pytest.raises(KeyboardInterrupt):
        main(arguments, fit)
    fit.interrupt = None
    assert main(arguments, fit) == 0
    assert fit.versions == [*ALL[:3], *ALL[2:]]
    assert fit.calls[3].ckpt_path == str(tmp_path / "runs" / "sweep" / ALL[2] / "checkpoints" / "last.ckpt")
    assert fit.calls[4].ckpt_path is None


def test_a_run_stopped_in_its_last_evaluation_is_resumed(fit, arguments, tmp_path):
    """After its last checkpoint: ``fit`` makes up for the evaluation (tests/callbacks/test_evaluation.py)."""
    main(arguments, fit)
    folder = tmp_path / "runs" / "sweep" / ALL[1]
    (folder / "done").unlink()
    (folder / "evaluations" / "step_000010.jsonl").rename(folder / "evaluations" / "step_000000.jsonl")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert main(arguments, fit) == 0
    assert fit.versions == [*ALL, ALL[1]]
    assert fit.calls[4].ckpt_path == str(folder / "checkpoints" / "last.ckpt")
    assert (folder / "done").exists()


def test_a_run_without_a_checkpoint_starts_anew(fit, arguments, tmp_path):
    main(arguments, fit)
    folder = tmp_path / "runs" / "sweep" / ALL[1]
    (folder / "done").unlink()
    (folder / "evaluations" / "step_000010.jsonl").rename(folder / "evaluations" / "step_000005.jsonl")
    (folder / "events.out.tfevents.1").touch()
    assert main(arguments, fit) == 0
    assert fit.versions == [*ALL, ALL[1]]
    assert fit.calls[-1].ckpt_path is None
    assert not (folder / "events.out.tfevents.1").exists()
    assert [p.name for p in (folder / "evaluations").iterdir()] == ["step_000010.jsonl"]


def test_a_failed_run_ends_the_sweep(fit, arguments, tmp_path, capsys):
    fit.fail = ALL[1]
    assert main(arguments, fit) == 2
    assert fit.versions == ALL[:2]
    assert "lambda_0.01-seed_0 ended with status 2" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "sweep" / "report").exists()
    fit.fail = None
    assert main(arguments, fit) == 0
    assert fit.versions == [*ALL[:2], *ALL[1:]]


def test_more_weights_and_seeds_extend_a_sweep(fit, arguments):
    main(arguments, fit)
    arguments = [{"0,0.01": "0,0.01,1", "2": "3"}.get(a, a) for a in arguments]
    assert main(arguments, fit) == 0
    assert fit.versions[4:] == [
        "lambda_1-seed_0",
        "lambda_1-seed_1",
        *(f"lambda_{w}-seed_2" for w in ("0", "0.01", "1")),
    ]


def test_runs_of_another_sweep_are_not_taken_for_this_ones(fit, arguments, tmp_path):
    main(arguments, fit)
    with pytest.raises(ValueError, match="lambda_0-seed_0 was made with other arguments"):
        main([*arguments, "--", "--trainer.max_steps", "9"], fit)
    (tmp_path / "b.yaml").write_text("model: {topk: 8}")
    with pytest.raises(ValueError, match="another configuration"):
        main(arguments, fit)
    assert len(fit.calls) == 4


def test_a_foreign_folder_is_refused_before_anything_runs(fit, arguments, tmp_path):
    foreign = tmp_path / "runs" / "sweep" / ALL[3] / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(ValueError, match=r"lambda_0\.01-seed_1 exists and was not made by a sweep"):
        main(arguments, fit)
    assert foreign.exists()
    assert fit.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0,0.01": "0,much"}, "--weights must be numbers"),
        ({"0,0.01": "0,-1"}, "--weights must be finite and not negative"),
        ({"0,0.01": "0,nan"}, "--weights must be finite"),
        ({"0,0.01": "0.1,0.10"}, "names a weight twice"),
        ({"2": "0"}, "--seeds must be at least 1"),
    ],
)
def test_bad_input(fit, arguments, change, message):
    with pytest.raises(ValueError, match=message):
        main([change.get(a, a) for a in arguments], fit)
    assert fit.calls == []


def test_a_missing_config_is_named(fit, tmp_path):
    with pytest.raises(ValueError, match="--config: there is no file"):
        main(["--config", str(tmp_path / "missing.yaml")], fit)
    with pytest.raises(SystemExit):
        main([], fit)
