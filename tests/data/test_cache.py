import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdpo.data import preparation
from hdpo.data.cache import tokenizer_fingerprint
from hdpo.data.config import ColumnMapping, ProblemSet, SourceConfig
from hdpo.data.prompts import PromptConfig
from hdpo.errors import ConfigError
from hdpo.rewards import MathVerifier
from tests.data import slow_source
from tests.data.helpers import prepare_in_child, problems, slow, splits
from tests.helpers.openmath_fixture import QWEN_TEMPLATE, tiny_tokenizer, write_openmath_parquet
from tests.helpers.toy import BoxedVerifier

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def readings(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0


def comparable(found):
    """Everything that a run gets to see, as plain containers."""
    prompts = {name: vars(data.prompts(range(len(data)))) for name, data in found.items()}
    plain = {
        name: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        for name, fields in prompts.items()
    }
    return plain, {name: (data.report, data.fingerprint) for name, data in found.items()}


def test_second_reading_is_the_cache(tmp_path, tokenizer):
    wanted = splits(slow(tmp_path))
    first = problems(tmp_path / "cache", tokenizer).load(wanted)
    second = problems(tmp_path / "cache", tokenizer).load(wanted)
    assert readings(tmp_path) == 1, "one pass for both splits"
    assert comparable(first) == comparable(second)
    assert len(first["train"]) + len(first["validation"]) == 40 == first["train"].report.rows_read
    assert min(map(len, first.values())) > 0
    assert not list((tmp_path / "cache").glob(".*tmp"))


def test_a_set_is_the_same_alone_and_beside_another(tmp_path, tokenizer):
    wanted = splits(slow(tmp_path))
    together = problems(tmp_path / "one", tokenizer).load(wanted)
    apart = problems(tmp_path / "two", tokenizer)
    assert comparable({"validation": apart.load(wanted[:1])["validation"]}) == comparable(
        {"validation": together["validation"]}
    )
    assert len(list((tmp_path / "two").glob("*.arrow"))) == 1, "training was not prepared"
    assert comparable(apart.load(wanted)) == comparable(together)


def test_every_dropped_row_is_listed_beside_the_problems(tmp_path, tokenizer, capsys):
    rows = [
        {"problem": "What is 1 + 1?", "generated_solution": "Two.", "expected_answer": "2", "problem_source": "s"},
        {"problem": "What is  1 + 1?", "generated_solution": "2.", "expected_answer": "2", "problem_source": "s"},
        {"problem": "What is 2 + 2?", "generated_solution": "", "expected_answer": "4", "problem_source": "s"},
        {"problem": "Broken \ud83d.", "generated_solution": "x", "expected_answer": "4", "problem_source": "s"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    store = problems(tmp_path / "cache", tokenizer, val_fraction=0.0)
    (wanted,) = splits(SourceConfig(path=str(path)))[1:]
    data = store.load([wanted])["train"]
    key = store.keys([wanted])["train"]
    assert f"dropped for train: {tmp_path}/cache/{key}.dropped.jsonl" in capsys.readouterr().err.splitlines()
    lines = (tmp_path / "cache" / f"{key}.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": str(path), "row": 2, "reason": "duplicate", "text": "What is  1 + 1?"},
        {"file": str(path), "row": 3, "reason": "missing_solution", "text": "What is 2 + 2?"},
        {"file": str(path), "row": 4, "reason": "not_unicode", "text": "Broken \ud83d."},
    ]
    beside = json.loads((tmp_path / "cache" / f"{key}.json").read_text())
    assert beside["report"] == vars(data.report)
    assert beside["report"]["dropped"] == {"duplicate": 1, "missing_solution": 1, "not_unicode": 1}


def python_rows(rows):
    return iter(rows)


COLUMNS = [
    {"tests": ["assert f(1) == 2", ""], "nested": {"a": [1, 2.5, None, {"ü": "\n"}]}, "number": 10**30, "flag": True},
    {"tests": [], "nested": {}, "number": -0.1, "flag": False},
    {"tests": None, "nested": [[]], "number": "1e5", "flag": "\ud800"},
]


def test_extra_columns_survive_exactly(tmp_path, tokenizer):
    base = {"generated_solution": "s", "expected_answer": "1", "problem_source": "s"}
    rows = [{**base, **extra, "problem": f"{i}?"} for i, extra in enumerate(COLUMNS)]
    columns = ColumnMapping(extra=list(COLUMNS[0]))
    source = SourceConfig(path=f"python:{__name__}:python_rows", kwargs={"rows": rows}, columns=columns)
    store = problems(tmp_path / "cache", tokenizer, val_fraction=0.0)
    for _ in range(2):  # as prepared, and as read
        data = store.load(splits(source)[1:])["train"]
        prompts = data.prompts([2, 0, 1])
        assert list(prompts.columns) == list(COLUMNS[0])
        for name, values in prompts.columns.items():
            assert repr(values) == repr([COLUMNS[i][name] for i in (2, 0, 1)])


def test_rows_become_prompts_in_the_order_asked_for(tmp_path, tokenizer):
    data = problems(tmp_path, tokenizer).load(splits(slow(tmp_path)))["train"]
    prompts = data.prompts([4, 2, 4], [6, 7, 8], [True, True, False])
    assert len(data) == 29
    for name, values in (("problem", prompts.problem), ("answer", prompts.reference), ("solution", prompts.solution)):
        column = data.column(name)
        assert values == [column[4], column[2], column[4]]
    assert set(prompts.source) <= set(data.sources()) == {"even", "odd"}
    for problem, solution, ids, privileged in zip(
        prompts.problem, prompts.solution, prompts.prompt_ids, prompts.privileged_ids, strict=True
    ):
        assert problem in tokenizer.decode(ids)
        assert solution in tokenizer.decode(privileged)
    assert (prompts.row.tolist(), prompts.index.tolist()) == ([4, 2, 4], [6, 7, 8])
    assert prompts.valid.tolist() == [True, True, False]
    assert (prompts.row.dtype, prompts.index.dtype, prompts.valid.dtype) == (torch.int64, torch.int64, torch.bool)
    assert prompts.columns == {}
    default = data.prompts([1, 0])
    assert default.index.tolist() == [0, 1]
    assert default.valid.all()
    assert len(data.prompts([])) == 0
    for row in (-1, 29):
        with pytest.raises(IndexError, match=f"row {row} of a data set of 29 problems"):
            data.prompts([0, row])


# What the key depends on


SELECTION_CHANGES = {
    "val_fraction": 0.5,
    "test_fraction": 0.2,
    "split_by": "row",
    "max_prompt_tokens": 400,
    "max_privileged_tokens": 400,
    "keep_duplicates": True,
    "prompts": PromptConfig(privileged_context="answer"),
    "verifier": BoxedVerifier(),
}
SET_CHANGES = {"num_problems": 5, "splits": None, "held_out": ("first",), "labelled": False}
SOURCE_CHANGES = {
    "path": f"python:{__name__}:python_rows",
    "name": "other",
    "split": "test",
    "revision": "abc",
    "columns": ColumnMapping(source=None),
    "answer_pattern": r"\d+",
    "source_name": "other",
    "kwargs": {"log": "x", "number": 3},
}


@pytest.mark.parametrize("what", [*SELECTION_CHANGES, *SET_CHANGES, *SOURCE_CHANGES])
def test_everything_that_matters_changes_the_key(tmp_path, tokenizer, what):
    source = slow(tmp_path)
    first, train = ProblemSet("first", "data.test_source", source), splits(source)[1]

    def key(wanted=train, **options):
        return problems(tmp_path, tokenizer, **options).keys([first, wanted])["train"]

    if what in SELECTION_CHANGES:
        changed = key(**{what: SELECTION_CHANGES[what]})
    elif what in SET_CHANGES:
        changed = key(replace(train, **{what: SET_CHANGES[what]}))
    else:
        changed = key(replace(train, source=replace(source, **{what: SOURCE_CHANGES[what]})))
    assert changed != key()
    assert key() == key(num_val_problems=7), "another set's limit"


def test_verifiers_are_told_apart_by_what_their_verdicts_depend_on(tmp_path, tokenizer):
    def key(verifier):
        return problems(tmp_path, tokenizer, verifier=verifier).keys(splits(slow(tmp_path)))["train"]

    keys = [key(v) for v in (None, BoxedVerifier(), MathVerifier(), MathVerifier(profile="nemo"))]
    assert len(set(keys)) == 4
    assert key(MathVerifier()) == keys[2]


def test_a_set_that_holds_another_out_depends_on_its_content(tmp_path, tokenizer):
    store, train = problems(tmp_path, tokenizer), replace(splits(slow(tmp_path))[1], held_out=("test",))
    test = ProblemSet("test", "data.test_source", slow(tmp_path, number=3))
    keys = [store.keys([t, train])["train"] for t in (test, replace(test, source=slow(tmp_path, number=4)))]
    assert keys[0] != keys[1]


def test_files_templates_and_tokenizers_change_the_key(tmp_path, tokenizer):
    path = write_openmath_parquet(tmp_path / "a.parquet", 20)

    def key(tokenizer=tokenizer, **options):
        return problems(tmp_path, tokenizer, **options).keys(splits(SourceConfig(path=str(path))))["train"]

    unchanged = key()
    assert key(tiny_tokenizer()) == unchanged
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == fingerprint, "the last call's padding is no part of what it is"
    assert key() == unchanged
    assert key(tiny_tokenizer(QWEN_TEMPLATE + " ")) != unchanged
    assert key(tiny_tokenizer(special_tokens=("<|more|>",))) != unchanged
    template = tmp_path / "mine.jinja"
    keys = []
    for text in (QWEN_TEMPLATE, QWEN_TEMPLATE + " "):  # the same name, another text
        template.write_text(text)
        keys.append(key(prompts=PromptConfig(chat_template=str(template))))
    assert len({unchanged, *keys}) == 3
    os.utime(path, (1, 1))
    touched = key()
    assert touched != unchanged
    write_openmath_parquet(path, 40)
    os.utime(path, (1, 1))
    assert key() not in (unchanged, touched)


def test_another_version_of_tokenizers_changes_the_key(tmp_path, tokenizer, monkeypatch):
    store, wanted = problems(tmp_path, tokenizer), splits(slow(tmp_path))
    key = store.keys(wanted)["train"]
    for library in ("tokenizers", "transformers"):
        information = tmp_path / library / f"{library}-99.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 99.0\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(information.parent))
            assert store.keys(wanted)["train"] != key
    assert store.keys(wanted)["train"] == key


def test_code_changes_the_key(tmp_path):
    """A copy of the package, with one file after the other really changed."""
    ignored = shutil.ignore_patterns("__pycache__", "policy")
    shutil.copytree(ROOT / "hdpo", tmp_path / "hdpo", ignore=ignored)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    script = """
from pathlib import Path
import hdpo
from tests.data.helpers import problems, slow, splits, tiny_tokenizer
from hdpo.rewards import MathVerifier
folder, tokenizer = Path(hdpo.__file__).parents[1], tiny_tokenizer()
def key():
    return problems(folder / "cache", tokenizer, verifier=MathVerifier()).keys(splits(slow(folder)))["train"]
keys = [key(), key()]
for file in ("hdpo/data/prompts.py", "hdpo/losses.py", "tests/data/slow_source.py", "hdpo/rewards/mathematics.py"):
    with (folder / file).open("a") as stream:
        stream.write("# changed\\n")
    keys.append(key())
print(hdpo.__file__, *keys)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    file, first, same, data, losses, source, rewards = run.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert first == same != data
    assert data == losses, "code that the problems do not depend on"
    assert len({losses, source, rewards}) == 3


def test_answers_and_columns_change_the_fingerprint(tmp_path, tokenizer):
    def fingerprint(**changes):
        row = {"problem": "1+1?", "generated_solution": "2.", "expected_answer": "2", "problem_source": "s", "t": 1}
        source = SourceConfig(
            path=f"python:{__name__}:python_rows",
            kwargs={"rows": [{**row, **changes}]},
            columns=ColumnMapping(extra=["t"]),
        )
        return problems(tmp_path, tokenizer, val_fraction=0.0).load(splits(source)[1:])["train"].fingerprint

    same = fingerprint()
    assert fingerprint(generated_solution="Two.") == same, "another solution is no other problem"
    assert len({same, fingerprint(problem="1+2?"), fingerprint(expected_answer="3"), fingerprint(t=2)}) == 4


# What can go wrong


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "other", "no_report", "no_problems"])
def test_damaged_files_are_prepared_again(tmp_path, tokenizer, damage, caplog):
    store, wanted = problems(tmp_path, tokenizer), splits(slow(tmp_path))
    good = comparable(store.load(wanted))
    key = store.keys(wanted)["train"]
    path, report = tmp_path / f"{key}.arrow", tmp_path / f"{key}.json"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":  # one bit in the middle of the problems
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "text":
        path.write_text("not an Arrow file")
    elif damage == "other":
        other = store.keys(wanted)["validation"]
        for ending in ("arrow", "json"):
            shutil.copy(tmp_path / f"{other}.{ending}", tmp_path / f"{key}.{ending}")
    elif damage == "no_report":
        report.write_text("{")
    else:
        path.unlink()
    again = store.load(wanted)
    assert readings(tmp_path) == 2
    assert caplog.text.count("prepared again") == 1
    assert comparable(again) == good
    store.load(wanted)
    assert readings(tmp_path) == 2


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_preparation_leaves_nothing_that_looks_finished_and_who_waited_takes_over(tmp_path, tokenizer, caplog):
    kwargs = {"number": 1800, "pause_at": 1750}
    process = multiprocessing.get_context("spawn").Process(target=prepare_in_child, args=(str(tmp_path), kwargs))
    process.start()
    _wait_for((tmp_path / "log.paused").exists)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(problems(tmp_path, tokenizer).load, splits(slow(tmp_path, **kwargs)))
        _wait_for(lambda: f"waiting for another process that prepares data in {tmp_path}" in caplog.text)
        assert not [*tmp_path.glob("*.arrow"), *tmp_path.glob("*.json")]
        assert any(file.stat().st_size > 10_000 for file in tmp_path.glob(".*.tmp"))
        (tmp_path / "log.go").touch()
        os.kill(process.pid, signal.SIGKILL)
        found = waiting.result()
    process.join(30)
    assert sum(map(len, found.values())) == 1800
    assert readings(tmp_path) == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_who_starts_together_prepares_once(tmp_path, tokenizer):
    stores = [problems(tmp_path, tokenizer) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda store: store.load(splits(slow(tmp_path, number=600))), stores)
    assert readings(tmp_path) == 1
    assert comparable(one) == comparable(two)


def test_sets_that_were_complete_survive_a_failure(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(slow_source.time, "sleep", lambda seconds: 1 / 0)
    store, test = problems(tmp_path, tokenizer), ProblemSet("test", "data.test_source", slow(tmp_path))
    with pytest.raises(ZeroDivisionError):
        store.load([test, *splits(slow(tmp_path, pause_at=30))])
    assert [path.name for path in tmp_path.glob("*.arrow")] == [f"{store.keys([test])['test']}.arrow"]


def test_an_error_in_the_middle_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(slow_source.time, "sleep", lambda seconds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        problems(tmp_path, tokenizer).load(splits(slow(tmp_path, pause_at=30)))
    assert {path.name for path in tmp_path.iterdir()} <= {"prepare.lock", "log", "log.paused"}


def test_other_sets_problems_are_held_out(tmp_path, tokenizer):
    evaluation = ProblemSet("test", "data.test_source", slow(tmp_path, number=15), 10)
    train = replace(splits(slow(tmp_path))[1], splits=None, held_out=("test",))
    found = problems(tmp_path, tokenizer).load([evaluation, train])
    test, rest = set(found["test"].column("problem")), set(found["train"].column("problem"))
    assert len(test) == 10
    assert rest == {f"What is {i} + {i}?" for i in range(40)} - test
    assert found["train"].report.dropped == {"held_out": 10}


def test_nothing_left_is_one_line_that_says_where_the_reasons_are(tmp_path, tokenizer):
    wanted = replace(splits(slow(tmp_path, damaged=True))[1], splits=None)
    message = r"data.source: no train problem is left of .*no final answer: 40.*; what was dropped stands in (.*)"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message) as caught:
            problems(tmp_path, tokenizer).load([wanted])
        assert "\n" not in str(caught.value)
        lines = Path(re.search(message, str(caught.value))[1]).read_text().splitlines()
        assert [json.loads(line)["reason"] for line in lines] == ["missing_answer"] * 40
    assert readings(tmp_path) == 1


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache_dir: cannot create .*file"):
        problems(tmp_path / "file" / "cache", tokenizer)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, tokenizer):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = slow(tmp_path, number=1500)
    (tmp_path / "cache").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"data.cache_dir: cannot write to .*cache") as caught:
            problems(tmp_path / "cache", tokenizer).load(splits(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["prepare.lock"]


def test_progress_is_told_without_a_terminal(tmp_path, tokenizer, capfd, monkeypatch):
    monkeypatch.setattr(preparation.time, "monotonic", iter(range(0, 10_000, 10)).__next__)
    problems(tmp_path, tokenizer).load(splits(slow(tmp_path, number=2000), num_problems=2000))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Preparing")]
    assert len(lines) == 2  # of four chunks, ten seconds each
    assert lines[0].startswith("Preparing python:tests.data.slow_source:rows: 1,024 of 4,000 problems, 1,024 rows read")
