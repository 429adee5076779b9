import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hdpo.errors import ConfigError
from hdpo.evaluation.records import record_path, write_gzip
from hdpo.evaluation.runs import find_runs, flat_config, name_settings, write_compact
from tests.evaluation.simulate import rates, rows, write_run

ROWS = rows(rates(6), rng=np.random.default_rng(0))
KL = {"model__divergence": {"class_path": "hdpo.losses.ForwardKL"}}
FROZEN = {"model__teacher": {"class_path": "hdpo.teacher.FrozenTeacher"}}


def run(folder, **options):
    return write_run(folder, evaluations={0: ROWS, 100: ROWS}, **options)


def labels(folder, *ignore):
    runs = find_runs([folder])
    return dict(zip((r.folder.name for r in runs), name_settings(runs, ignore)[0], strict=True))


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    run(tmp_path / "a" / "version_0", weight=0.1, seed=1, arm="hdpo", pass_k=(1, 2))
    write_run(tmp_path / "a" / "version_1", evaluations={0: ROWS})
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.yaml").write_text("architecture: qwen2")  # a config.yaml without evaluations
    first, second = find_runs([tmp_path, tmp_path / "a"])
    assert (first.weight, first.seed, first.arm, list(first.of_split("validation"))) == (0.0, 0, None, [0])
    assert (second.weight, second.seed, second.arm, second.pass_k) == (0.1, 1, "hdpo", (1, 2))
    assert list(second.of_split("validation")) == [0, 100]
    assert second.of_split("test") == {}
    assert second.spent("validation", 100)["tokens"] == 1000
    assert second.folder == tmp_path / "a" / "version_0"


def test_evaluations_of_both_splits_are_one_run(tmp_path):
    folder = run(tmp_path / "run")
    made = [{**row, "split": "test", "step": 100} for row in ROWS]
    write_gzip(record_path(folder / "tests", 100), made)
    (found,) = find_runs([tmp_path])
    assert list(found.of_split("test")) == [100]
    assert list(found.of_split("validation")) == [0, 100]


def test_flat_configurations():
    nested = {"a": {"class_path": "x.Y", "init_args": {"b": [1], "c": {"d": {}}}}, "e": {"class_path": "x.Z"}}
    assert flat_config(nested) == {"a": "x.Y", "a.b": [1], "a.c.d": {}, "e": "x.Z"}


def test_nine_runs_of_three_methods_are_three_settings(tmp_path):
    for seed in range(3):
        run(tmp_path / f"jsd-{seed}", weight=1.0, seed=seed)
        run(tmp_path / f"kl-{seed}", weight=1.0, seed=seed, **KL)
        run(tmp_path / f"answer-{seed}", weight=1.0, seed=seed, data__prompts={"privileged_context": "answer"})
    found = labels(tmp_path)
    assert len(found) == 9
    for seed in range(3):
        assert found[f"kl-{seed}"] == "ForwardKL"
        assert found[f"jsd-{seed}"] == "JSD"
        assert found[f"answer-{seed}"] == "privileged_context answer, JSD"


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"weight": 0.1}, "weight 0.1"),
        ({"weight": 0.1, **FROZEN}, "weight 0.1, FrozenTeacher"),
        ({"weight": 0.0, **FROZEN}, "weight 0"),  # nobody teaches there
        ({"model__optimizer__init_args": {"lr": 3e-5, "betas": [0.9, 0.99]}}, "lr 3e-05"),
        ({"model__policy": {"path": "models/big/"}}, "path big"),
        ({"data__source": {"kwargs": {"seed": 1}}}, "seed 1"),  # of the problems, not of the run
        ({"distillation__topk": 8, "weight": 1.0}, "weight 1, topk 8"),
        ({"trainer__callbacks": [{"class_path": "my.Penalty"}]}, 'callbacks [{"class_path": "my.Penalty"}]'),
    ],
)  # fmt: skip
def test_what_a_run_differs_in_is_its_label(tmp_path, changes, label):
    run(tmp_path / "base")
    run(tmp_path / "two", weight=2.0)
    run(tmp_path / "run", seed=5, **changes)
    found = labels(tmp_path)
    assert found["run"].startswith(label) or found["run"].endswith(label)
    assert len({found["base"], found["two"]}) == 2


def test_a_class_by_another_path_is_the_same(tmp_path):
    run(tmp_path / "a", weight=1.0)
    short = {"class_path": "hdpo.JSD", "init_args": {"tail": "exact"}}
    run(tmp_path / "b", weight=1.0, seed=1, model__divergence=short)
    run(tmp_path / "c", weight=1.0, model__divergence={**short, "init_args": {"tail": "paper"}})
    assert labels(tmp_path) == {"a": "tail exact", "b": "tail exact", "c": "tail paper"}


def test_output_does_not_make_a_setting(tmp_path):
    run(tmp_path / "a", weight=1.0)
    output = {"checkpoint": {"every_n_steps": 9}, "best_checkpoint": {"monitor": None}, "ckpt_path": "x"}
    output |= {"progress": {"every_n_steps": 3}}
    shown = {"trainer__log_every_n_steps": 3, "trainer__enable_progress_bar": False}
    run(tmp_path / "b", weight=1.0, seed=7, **output, **shown)
    run(tmp_path / "validated", weight=1.0, ckpt_path="a/last.ckpt", verbose=True)  # as `validate` leaves it
    assert set(labels(tmp_path).values()) == {"weight 1"}


def test_an_option_that_a_later_version_brought_is_no_setting_where_it_is_off(tmp_path):
    run(tmp_path / "earlier", seed=0)
    run(tmp_path / "later", seed=1, model__policy={"compile": False, "gather_dtype": None})
    assert set(labels(tmp_path).values()) == {"weight 0"}
    run(tmp_path / "on", seed=2, model__policy={"compile": True})
    assert labels(tmp_path) == {"earlier": "weight 0", "later": "weight 0", "on": "compile true"}


@pytest.mark.parametrize("value", [0, False, None])
def test_an_argument_of_the_users_own_function_is_one_also_where_it_looks_off(tmp_path, value):
    run(tmp_path / "default", seed=0, data__source={"path": "python:mine:rows"})
    run(tmp_path / "given", seed=1, data__source={"path": "python:mine:rows", "kwargs": {"part": value}})
    found = labels(tmp_path)
    assert found["default"] != found["given"]
    assert found["given"] == f"part {json.dumps(value)}"


def test_keys_that_are_put_aside(tmp_path):
    for seed in range(2):
        run(tmp_path / f"a{seed}", seed=seed, model__policy={"path": f"start_{seed}"})
        run(tmp_path / f"b{seed}", seed=seed, weight=1.0, model__policy={"path": f"start_{seed}"})
    assert len(set(labels(tmp_path).values())) == 4
    assert set(labels(tmp_path, "model.policy").values()) == {"weight 0", "weight 1"}


def test_arms_name_settings_where_they_identify_them(tmp_path):
    for seed in range(2):
        run(tmp_path / f"grpo-{seed}", seed=seed, arm="grpo")
        run(tmp_path / f"kl-{seed}", weight=1.0, seed=seed, arm="forward_kl", **KL)
        run(tmp_path / f"h1-{seed}", weight=1.0, seed=seed, arm="hdpo")
        run(tmp_path / f"h2-{seed}", weight=0.1, seed=seed, arm="hdpo")
        run(tmp_path / f"by-hand-{seed}", weight=5.0, seed=seed)
    found = labels(tmp_path)
    assert found["grpo-0"] == found["grpo-1"] == "grpo"
    assert found["kl-0"] == "forward_kl"
    assert (found["h1-0"], found["h2-1"]) == ("hdpo, weight 1", "hdpo, weight 0.1")
    assert found["by-hand-0"] == "weight 5, JSD"
    assert len(set(found.values())) == 5


def test_two_arms_of_one_configuration_are_one_setting(tmp_path):
    run(tmp_path / "a", weight=1.0, arm="one")
    run(tmp_path / "b", weight=1.0, arm="two", seed=1)
    run(tmp_path / "c", weight=0.0, arm="grpo")
    assert labels(tmp_path) == {"a": "weight 1", "b": "weight 1", "c": "grpo"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "has no key 'model.distillation_weight'"),
        ("model: {distillation_weight: 1}", "has no key 'seed_everything'"),
        ("model: {distillation_weight: much}\nseed_everything: 0", "is not a number"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, config, message):
    folder = run(tmp_path / "run")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match=message) as caught:
        find_runs([tmp_path])
    assert str(folder / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sweep.json", "provenance.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_files_beside_it_are_named(tmp_path, name, content):
    folder = run(tmp_path / "run", arm="a")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        find_runs([tmp_path])


def test_folders_without_runs(tmp_path):
    with pytest.raises(ConfigError, match="there is no run here"):
        find_runs([tmp_path])
    with pytest.raises(ConfigError, match=r"nothing: there is no such folder"):
        find_runs([tmp_path / "nothing"])


# ---------------------------------------------------------------------- compact files


def test_a_compact_run_is_the_run(tmp_path):
    recent = {"cliff/fraction": 0.2, "privileged/pass_rate": 0.5, "loss/policy": 1.0}
    run(tmp_path / "full" / "r", weight=1.0, seed=3, arm="hdpo", recent=recent)
    (full,) = find_runs([tmp_path / "full"])
    write_compact(full, tmp_path / "small" / "r")
    (small,) = find_runs([tmp_path / "small"])
    config = full.config | {"data.cache_dir": Path(full.config["data.cache_dir"]).name}
    assert (small.config, small.arm, small.evaluations) == (config, full.arm, full.evaluations)
    assert small.spent("validation", 100)["recent"] == {"cliff/fraction": 0.2, "privileged/pass_rate": 0.5}
    assert small.spent("validation", 100)["train_seconds"] == 150.0
    content = (tmp_path / "small" / "r.run.jsonl.gz").read_bytes()
    write_compact(small, tmp_path / "small" / "r")
    assert (tmp_path / "small" / "r.run.jsonl.gz").read_bytes() == content
    assert b"so it is" not in gzip.decompress(content)


def test_a_compact_run_does_not_say_where_the_machine_keeps_its_runs(tmp_path):
    paths = {"trainer__logger__save_dir": "/home/me/runs", "data__cache_dir": "/scratch/cache"}
    run(tmp_path / "run", model__policy__path="/models/qwen", **paths)
    (full,) = find_runs([tmp_path / "run"])
    assert full.config["trainer.logger.save_dir"] == "/home/me/runs"
    write_compact(full, tmp_path / "small" / "r")
    (small,) = find_runs([tmp_path / "small"])
    changed = {key: value for key, value in small.config.items() if value != full.config[key]}
    assert changed == {"trainer.logger.save_dir": "runs", "data.cache_dir": "cache"}
    assert small.config["model.policy.path"] == "/models/qwen"


def test_a_compact_run_of_the_laboratory_takes_a_few_kilobytes(tmp_path):
    """11 evaluations of 240 problems with 8 samples on validation, 5 with 16 on test: 500 runs are about 5 MB."""
    rng = np.random.default_rng(0)
    success = np.resize([0.99, 0.97, 0.95, 0.9, 0.5, 0.1], 240)
    tiers = [f"tier{i}" for i in range(1, 7)]
    made = {step: rows(success, 8, rng=rng, sources=tiers) for step in range(0, 201, 20)}
    folder = write_run(tmp_path / "full" / "r", evaluations=made)
    for step in range(120, 201, 20):
        test = rows(success, 16, rng=rng, step=step, split="test", sources=tiers)
        write_gzip(record_path(folder / "tests", step), test)
    (full,) = find_runs([tmp_path / "full"])
    write_compact(full, tmp_path / "r")
    assert (tmp_path / "r.run.jsonl.gz").stat().st_size < 12_000


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (0, {"config": None}, "has no key"),
        (0, {"arm": ...}, "line 1: is not what"),
        (1, {"greedy": "01"}, "line 2: is not what"),
        (1, {"greedy": "01x010"}, "line 2: is not what"),
        (1, {"rows": ...}, "line 2: is not what"),
        (2, {"step": ...}, "line 3: is not what"),
    ],
)
def test_broken_compact_files_are_named(tmp_path, line, change, message):
    run(tmp_path / "full" / "r")
    (full,) = find_runs([tmp_path / "full"])
    write_compact(full, tmp_path / "small" / "r")
    path = tmp_path / "small" / "r.run.jsonl.gz"
    lines = [json.loads(text) for text in gzip.decompress(path.read_bytes()).splitlines()]
    lines[line] = {key: value for key, value in {**lines[line], **change}.items() if value is not ...}
    write_gzip(path, lines)
    with pytest.raises(ConfigError, match=message) as caught:
        find_runs([tmp_path / "small"])
    assert str(path) in str(caught.value)
