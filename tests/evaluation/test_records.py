import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.evaluation.intervals import mean_interval
from hdpo.evaluation.metrics import GreedyAccuracy, PassAtK
from hdpo.evaluation.records import (
    COLUMNS,
    Evaluation,
    evaluation_files,
    metric_values,
    read_records,
    recompute,
    record_path,
    write_gzip,
)
from tests.evaluation.simulate import rates, rows

ROWS = rows(rates(), rng=np.random.default_rng(1))


@pytest.fixture
def path(tmp_path):
    return record_path(tmp_path / "evaluations", 100)


@pytest.fixture
def evaluation(path):
    write_gzip(path, ROWS)
    return read_records(path)


def test_what_is_read_is_what_was_found(path, evaluation):
    assert set(ROWS[0]) == set(COLUMNS)
    assert (evaluation.step, evaluation.split, evaluation.num_samples) == (100, "validation", 8)
    assert evaluation.rows == tuple(("", row) for row in range(60))
    assert evaluation.sources[:3] == ("gsm8k", "math", "gsm8k")
    for row in ROWS:
        text = evaluation.greedy if row["greedy"] else evaluation.samples[row["row"]]
        assert text[row["row"] if row["greedy"] else row["sample"]] == str(int(row["outcome"] == "correct"))
    assert evaluation_files(path.parent) == {100: path}
    assert [p.name for p in path.parent.iterdir()] == ["step_000100.jsonl.gz"]
    # The order of the rows does not matter, and equal rows make equal files.
    write_gzip(path, ROWS[::-1])
    assert read_records(path) == evaluation
    first = path.read_bytes()
    write_gzip(path, ROWS[::-1])
    assert path.read_bytes() == first


def test_problems_of_a_named_set_are_grouped_under_its_name(path):
    names = {"gsm8k": "gsm8k", "math": "math500"}
    write_gzip(path, [{**row, "dataset": names[row["source"]]} for row in ROWS])
    found = read_records(path)
    assert found.rows == tuple(sorted(found.rows))
    assert {name for name, _ in found.rows} == {"gsm8k", "math500"}
    expected = {"gsm8k": "gsm8k", "math500": "math500/math"}
    assert found.sources == tuple(expected[name] for name, _ in found.rows)


def test_any_text_survives(path):
    text = 'π & "√2"\n\u2028\x00\x1b[1m \ud83d|`'
    write_gzip(path, [{**row, "completion": text, "answer": text} for row in ROWS])
    assert read_records(path).num_samples == 8
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    assert len(lines) == len(ROWS) + 1
    assert json.loads(lines[5])["completion"] == text


def test_verdicts(path):
    outcomes = ["correct", "wrong", "no_answer", "timeout", "error", "invalid_reference", "correct", "wrong"]
    made = rows([1.0], rng=np.random.default_rng(0))
    for row, outcome in zip(made, [*outcomes, "error"], strict=True):
        row["outcome"] = outcome
    write_gzip(path, made)
    found = read_records(path)
    assert (found.samples, found.greedy, found.num_without_verdict) == (("100???10",), "?", 4)


def test_several_sets_of_one_evaluation(path):
    both = rows([1.0, 0.0], rng=np.random.default_rng(0), dataset="a") + rows(
        [1.0], 3, rng=np.random.default_rng(0), dataset="b"
    )
    write_gzip(path, both)
    found = read_records(path)
    assert found.rows == (("a", 0), ("a", 1), ("b", 0))
    assert found.samples == ("1" * 8, "0" * 8, "111")
    assert found.num_samples == 3


def test_equal_problems_have_one_hash(path, evaluation):
    def problems(change):
        write_gzip(path, [{**row, **change(row)} for row in ROWS])
        return read_records(path).problems

    assert problems(lambda row: {"step": 7, "outcome": "wrong", "seed": 0}) == evaluation.problems
    assert problems(lambda row: {"problem_hash": "other"} if row["row"] == 3 else {}) != evaluation.problems
    assert problems(lambda row: {"row": 100} if row["row"] == 3 else {}) != evaluation.problems


def test_columns_of_a_later_version_are_ignored(path, evaluation):
    write_gzip(path, [{**row, "new": None} for row in ROWS])
    assert read_records(path) == evaluation


def test_an_interrupted_write_leaves_the_old_file(path, evaluation):
    with pytest.raises(TypeError):
        write_gzip(path, [ROWS[3], {"row": object()}])
    assert read_records(path) == evaluation
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: ...}, f"line 2: has no '{name}'") for name in COLUMNS),
        *(({name: [0]}, f"line 2: '{name}' must be {kind}") for name, (kind, _) in COLUMNS.items()),
        ({"row": True}, "line 2: 'row' must be an integer"),
        ({"greedy": 0}, "line 2: 'greedy' must be a boolean"),
        ({"step": 3}, "line 2: step 3 in an evaluation with 100"),
        ({"split": "test"}, "line 2: split test in an evaluation with validation"),
        ({"sample": 0}, r"line 2: repeats the completion of line 1 \(row 0\)"),
        ({"sample": 9}, "row 0 lacks completions"),
        ({"greedy": True}, "row 0 lacks completions"),
    ],
)
def test_a_broken_row_is_named(path, change, message):
    changed = {key: value for key, value in {**ROWS[1], **change}.items() if value is not ...}
    write_gzip(path, [ROWS[0], changed, *ROWS[2:]])
    with pytest.raises(ConfigError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"step": 1\n', mtime=0), "line 1: not JSON"),
        (gzip.compress(b"\xff\xfe\x00\n", mtime=0), "not gzipped UTF-8 text"),
        (gzip.compress(b"[1, 2]\n", mtime=0), "line 1: not a JSON object"),
        (gzip.compress(b"\n\n", mtime=0), "holds no evaluation records"),
        (b"{}", "not gzipped"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-12], "not gzipped"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:15] + b"xxxxxxxxxxx", "not gzipped"),
    ],
)
def test_broken_files_are_named(path, content, message):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(path):
    with pytest.raises(ConfigError, match=r"step_000100\.jsonl\.gz: there is no such file"):
        read_records(path)


def test_pass_at_k_by_enumeration():
    found = Evaluation(0, "test", "", (("", 0), ("", 1)), ("a", "b"), ("10010", "00000"), "01")
    for k in range(1, 6):
        subsets = list(combinations("10010", k))
        expected = np.mean(["1" in subset for subset in subsets])
        assert metric_values(found, f"pass@{k}").tolist() == pytest.approx([expected, 0.0], abs=1e-12)
        assert metric_values(found, f"any@{k}").tolist() == [1.0, 0.0]
    late = replace(found, samples=("00010", "10000"))
    assert metric_values(late, "any@3").tolist() == [0.0, 1.0]
    assert metric_values(found, "greedy_accuracy").tolist() == [0.0, 1.0]


def test_recomputed_numbers_are_the_logged_metrics(evaluation):
    """What is logged during training and what is recomputed from rows agree, overall and by source."""
    result = recompute(evaluation, (1, 4, 8))
    assert list(result) == ["all", "gsm8k", "math"]
    for name, values in result.items():
        own = [i for i, source in enumerate(evaluation.sources) if name in ("all", source)]
        passes, greedy = PassAtK(k=(1, 4, 8)), GreedyAccuracy()
        passes.update(torch.tensor([[c == "1" for c in evaluation.samples[i]] for i in own]))
        greedy.update(torch.tensor([evaluation.greedy[i] == "1" for i in own]))
        logged = passes.compute() | {"greedy_accuracy": greedy.compute()}
        assert set(values) == {"num_problems", *logged}
        assert values["num_problems"] == len(own)
        for metric, value in logged.items():
            interval = mean_interval(metric_values(evaluation, metric)[own], [evaluation.sources[i] for i in own])
            actual = values[metric]["value"], values[metric]["low"], values[metric]["high"]
            assert actual == pytest.approx((value.item(), *interval), abs=1e-6)


def test_results_are_strict_json_even_for_one_problem():
    two = Evaluation(0, "test", "", (("", 0), ("", 1)), ("all", "math"), ("1", "1"), "01")
    result = recompute(two, (1,))
    json.dumps(result, allow_nan=False)
    assert set(result) == {"all", "source all", "math"}
    assert result["all"]["num_problems"] == 2
    assert result["math"]["pass@1"]["low"] < 0.3 < result["math"]["pass@1"]["high"] == 1.0


def test_a_k_beyond_every_problems_samples_is_left_out_while_another_is_there():
    two = Evaluation(0, "test", "", (("", 0), ("", 1)), ("a", "b"), ("10", "00"), "10")
    assert recompute(two, (1, 2, 8)) == recompute(two, (1, 2))
    with pytest.raises(ConfigError, match="pass@4 needs at least 4 samples"):
        recompute(two, (8, 4))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("pass@9", "pass@9 needs at least 9 samples per problem"),
        ("any@0", "k >= 1"),
        ("accuracy", "there is no metric 'accuracy'"),
    ],
)
def test_bad_metrics(evaluation, metric, message):
    with pytest.raises(ConfigError, match=message):
        metric_values(evaluation, metric)


def test_a_large_number_of_samples():
    found = Evaluation(0, "test", "", (("", 0),), ("a",), ("1" + "0" * 1023,), "0")
    assert math.isclose(metric_values(found, "pass@512")[0], 0.5)


def test_the_commands_start_without_torch():
    code = "import sys, hdpo.commands.sweep; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
