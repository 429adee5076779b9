"""``show``: a run's samples and records as a person reads them."""

import gzip
import json
import re
import subprocess
import sys

import pytest

from hdpo.callbacks import Evaluation, SampleLogger
from hdpo.cli import main
from tests.helpers import toy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show") / "run"
    callbacks = [Evaluation(summary=False), SampleLogger(every_n_steps=1, num_prompts=2, num_completions=2)]
    trainer = toy.trainer(folder, max_steps=2, callbacks=callbacks, val_check_interval=1)
    trainer.fit(toy.module(), datamodule=toy.datamodule(folder.parent, num_val_problems=3))
    return folder


def shown(capsys, *args) -> str:
    assert main(["show", *map(str, args)]) == 0
    return capsys.readouterr().out


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def blocks(text):
    return [part for part in text.split("\n\n") if part.strip()]


def test_the_last_steps_samples(run, capsys):
    last = [row for row in samples(run) if row["step"] == 1]
    found = blocks(shown(capsys, run))
    assert len(found) == len(last) > 0
    for row, text in zip(last, found, strict=True):
        assert text.startswith(f"step 1  {'cliff' if row['is_cliff'] else 'prompt'}  {row['source']}  mean reward")
        assert row["problem"].split("\n")[0] in text
        assert f"expected: {row['reference']}" in text
        for title, completions in (("plain", row["completions"]), ("privileged", row["privileged"])):
            assert text.count(f"  {title}: ") == len(completions)
            for one in completions:
                assert f"{title}: {one['outcome']}, reward {one['reward']:g}, {one['tokens']} tokens" in text
    one = blocks(shown(capsys, run, "--num_completions=1"))
    assert all(text.count("  plain: ") == 1 for text in one)


def test_cliffs_and_steps(run, capsys):
    rows = samples(run)
    assert any(row["is_cliff"] for row in rows)
    assert not all(row["is_cliff"] for row in rows)
    for step in (0, 1):
        text = shown(capsys, run, "--step", step)
        assert set(re.findall(r"^step (\d)", text, re.M)) == {str(step)}
        cliffs = [row for row in rows if row["is_cliff"] and row["step"] == step]
        if cliffs:
            text = shown(capsys, run, "--cliffs", "--step", step)
            assert re.findall(r"^step \d  (\w+)", text, re.M) == ["cliff"] * len(cliffs)
            assert "  privileged: " in text


def test_one_problem_over_all_evaluations(run, capsys):
    text = shown(capsys, run, "--problem", 1)
    signs = {"correct": "1", "wrong": "0", "no_answer": "-"}
    for step in (0, 1, 2):
        lines = gzip.decompress((run / "evaluations" / f"step_{step:06}.jsonl.gz").read_bytes()).splitlines()
        rows = [row for row in map(json.loads, lines) if row["row"] == 1]
        verdicts = "".join(signs[row["outcome"]] for row in rows if not row["greedy"])
        (greedy,) = [row for row in rows if row["greedy"]]
        assert f"validation at step {step}: samples {verdicts}, greedy {greedy['outcome']} (" in text
    assert f"{rows[0]['source']}  expected: {rows[0]['reference']}  id {rows[0]['problem_hash']}" in text
    assert text.count("sample 0: ") == text.count("greedy: ") == 1, "the texts are those of the last evaluation"
    assert greedy["completion"].split("\n")[0] in text
    # By its id too; and a training problem by the id that show prints.
    assert shown(capsys, run, "--problem", rows[0]["problem_hash"]) == text
    trained = shown(capsys, run, "--step", 0)
    name = re.search(r"id (\w{16})$", trained, re.M)[1]
    (row, *_) = [row for row in samples(run) if row["step"] == 0]
    text = shown(capsys, run, "--problem", name)
    assert row["problem"].split("\n")[0] in text
    assert set(re.findall(r"id (\w{16})$", text, re.M)) == {name}


def test_a_problem_of_two_sets_is_shown_of_each(run, capsys, tmp_path):
    (tmp_path / "evaluations").mkdir()
    for step in (0, 1):
        name = f"evaluations/step_{step:06}.jsonl.gz"
        lines = map(json.loads, gzip.decompress((run / name).read_bytes()).splitlines())
        first = [row | {"dataset": "a"} for row in lines if row["row"] == 1]
        second = [row | {"dataset": "b", "row": 0, "outcome": "no_answer", "answer": None} for row in first]
        text = "".join(json.dumps(row) + "\n" for row in first + second)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    text = shown(capsys, tmp_path, "--problem", first[0]["problem_hash"])
    found = re.findall(r"^validation (\w) at step (\d): samples ([01-]+), greedy (\w+) \(", text, re.M)
    assert [(name, step) for name, step, *_ in found] == [("a", "0"), ("b", "0"), ("a", "1"), ("b", "1")]
    assert {(samples, greedy) for name, _, samples, greedy in found if name == "b"} == {
        ("-" * (len(first) - 1), "no_answer")
    }
    assert text.count("  greedy: ") == 2
    # The last evaluation may be without it.
    (tmp_path / "evaluations/step_000002.jsonl.gz").write_bytes(
        gzip.compress((json.dumps(first[0] | {"problem_hash": "0" * 16, "dataset": "c"}) + "\n").encode())
    )
    assert shown(capsys, tmp_path, "--problem", first[0]["problem_hash"]) == text
    assert shown(capsys, tmp_path, "--problem", "b:0").count("validation b at step") == 2
    assert "validation a" not in shown(capsys, tmp_path, "--problem", "b:0")


def test_control_characters_are_spelled_out(run, capsys, tmp_path):
    (row, *_) = samples(run)
    row["completions"][0]["text"] = "one\n\x1b[31mtwo"
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 1, "sou')
    text = shown(capsys, tmp_path)
    assert "      one\n      \\x1b[31mtwo\n" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--step", "7"), r"has no sample at step 7; there are samples of steps 0, 1$"),
        (("--problem", "99"), r"has no problem 99; there are samples"),
        (("--prblem", "99"), r"show: .*see show --help"),
    ],
)
def test_mistakes_are_one_line(run, capsys, args, message):
    assert main(["show", str(run), *args]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.strip())
    assert error.count("\n") == 1


def test_a_pager_may_be_closed_before_the_end(run):
    command = [sys.executable, "-m", "hdpo", "show", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "samples.jsonl: there is no such file; name a run's folder" in capsys.readouterr().err
    (tmp_path / "samples.jsonl").write_text("[1]\n")
    assert main(["show", str(tmp_path)]) == 2
    assert "samples.jsonl, line 1: not a JSON object" in capsys.readouterr().err
