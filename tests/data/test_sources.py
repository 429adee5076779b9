import json
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hdpo.data.config import ColumnMapping, EvaluationSource, SourceConfig
from hdpo.data.sources import Problem, Source
from hdpo.errors import ConfigError
from tests.helpers.openmath_fixture import openmath_rows

GSM8K = [
    {
        "question": "Natalia sold 48 clips, then half as many. How many?",
        "answer": "Half is 48/2 = <<48/2=24>>24.\n#### 72",
    },
    {"question": "And in dollars?", "answer": "It is #### not yet.\n#### 1,072"},
    {"question": "Unanswered?", "answer": "Nobody knows."},
]
MATH_500 = [
    {
        "problem": "Convert $(0,3)$ to polar coordinates.",
        "solution": "We have $r = 3$. So \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
]
DEEPMATH = [
    {
        "question": "Evaluate the limit $\\lim_{x \\to 0} \\sin(x)/x$.",
        "final_answer": "1",
        "difficulty": 4.5,
        "topic": "Mathematics -> Calculus -> Limits",
        "r1_solution_1": "First. \\boxed{1}",
        "r1_solution_2": "Second. \\boxed{1}",
        "r1_solution_3": "Third. \\boxed{1}",
    }
]


def rows_of_python(number: int, start: int = 0):
    for i in range(start, start + number):
        yield {"problem": f"{i} + 1?", "generated_solution": "add", "expected_answer": i + 1, "problem_source": None}


def not_rows():
    return iter([{"problem": "a", "generated_solution": "b", "expected_answer": "c", "problem_source": "d"}, "text"])


def write(folder: Path, rows, form: str, stem: str = "data") -> Path:
    path = folder / f"{stem}.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def read(**config) -> list[Problem]:
    """All problems but their places, which have a test of their own."""
    source = Source(SourceConfig(**{"path": "x", **config} | {k: str(v) for k, v in config.items() if k == "path"}))
    return [problem._replace(place=("", 0)) for problem in source]


def test_a_problem_knows_its_file_and_its_row_there(tmp_path):
    for stem in ("a", "b"):
        write(tmp_path, list(rows_of_python(2)), "jsonl", stem)
    problems = list(Source(SourceConfig(path=str(tmp_path / "*.jsonl"))))
    assert [p.place for p in problems] == [(str(tmp_path / f"{stem}.jsonl"), n) for stem in "ab" for n in (1, 2)]


def expected(rows) -> list[Problem]:
    keys = ("problem", "generated_solution", "expected_answer", "problem_source")
    return [Problem(*(str(row[key] or "").strip() for key in keys)) for row in rows]


ROWS = list(openmath_rows(60))


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl", "json"])
def test_every_local_format_gives_the_same_problems(tmp_path, form):
    assert read(path=write(tmp_path, ROWS, form)) == expected(ROWS)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_globs_and_folders_are_read_in_the_order_of_names(tmp_path, form):
    for number in (2, 0, 1):
        write(tmp_path, ROWS[number * 20 : (number + 1) * 20], form, f"train-{number:05}")
    assert read(path=tmp_path / f"*.{form}") == expected(ROWS)
    assert read(path=tmp_path) == expected(ROWS)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_file_whose_name_looks_like_a_glob(tmp_path, form):
    file = write(tmp_path, ROWS[:20], form, "data[1]")
    write(tmp_path, ROWS[20:], form, "data1")
    assert read(path=file) == expected(ROWS[:20])
    file.unlink()
    assert read(path=file) == expected(ROWS[20:])


def test_a_folder_keeps_its_splits_apart(tmp_path):
    write(tmp_path, ROWS[:40], "parquet", "train-00000-of-00001")
    write(tmp_path, ROWS[40:], "parquet", "test-00000-of-00001")
    assert read(path=tmp_path) == expected(ROWS[:40])
    assert read(path=tmp_path, split="test") == expected(ROWS[40:])
    with pytest.raises(ConfigError, match=r"^data\.source: cannot read .*split 'dev'") as caught:
        read(path=tmp_path, split="dev")
    assert "\n" not in str(caught.value)


def test_folders_of_save_to_disk(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    assert read(path=tmp_path / "one") == expected(ROWS)
    assert read(path=tmp_path / "two", split="test") == expected(ROWS[:3])
    with pytest.raises(ConfigError, match="there is no split 'dev', only train, test"):
        read(path=tmp_path / "two", split="dev")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_gsm8k(tmp_path, form):
    columns = ColumnMapping(problem="question", solution="answer", answer="answer", source=None)
    problems = read(
        path=write(tmp_path, GSM8K, form), columns=columns, answer_pattern=r"####\s*(.+)", source_name="gsm8k"
    )
    assert [p.answer for p in problems] == ["72", "1,072", ""]
    assert [p.source for p in problems] == ["gsm8k"] * 3
    assert problems[0].problem == GSM8K[0]["question"]
    assert problems[0].solution == GSM8K[0]["answer"]


def test_math_500(tmp_path):
    path = write(tmp_path, MATH_500, "jsonl", "test")
    columns = ColumnMapping(solution="solution", answer="answer", source="subject")
    row = MATH_500[0]
    assert read(path=path, columns=columns) == [Problem(row["problem"], row["solution"], row["answer"], "Precalculus")]
    # Without an answer's column, what the solution boxes is the answer; without a source's, the file is.
    boxed = read(path=path, columns=ColumnMapping(solution="solution", answer=None, source=None))
    assert boxed == [Problem(row["problem"], row["solution"], row["answer"], "test.jsonl")]
    assert read(path=path, columns=ColumnMapping(solution=None, answer="answer", source="level"))[0] == Problem(
        row["problem"], "", row["answer"], "2"
    )


def test_deepmath(tmp_path):
    columns = ColumnMapping(problem="question", solution="r1_solution_1", answer="final_answer", source="topic")
    problems = read(path=write(tmp_path, DEEPMATH, "parquet"), columns=columns)
    row = DEEPMATH[0]
    assert problems == [Problem(row["question"], row["r1_solution_1"], "1", row["topic"])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_answers_of_mixed_types_are_read(tmp_path, encoding):
    path = tmp_path / "mixed.jsonl"
    answers = [5, "1/2", 0.5, None, 0]
    text = "\n".join(json.dumps({**ROWS[0], "expected_answer": a}) for a in answers)
    path.write_text(text, encoding=encoding)
    assert [p.answer for p in read(path=path)] == ["5", "1/2", "0.5", "", "0"]


def test_python_functions():
    path = f"python:{__name__}:rows_of_python"
    problems = read(path=path, kwargs={"number": 2, "start": 5})
    assert problems == [
        Problem("5 + 1?", "add", "6", "rows_of_python"),
        Problem("6 + 1?", "add", "7", "rows_of_python"),
    ]


def test_sources_are_streamed():
    endless = Source(SourceConfig(path=f"python:{__name__}:rows_of_python", kwargs={"number": 10**12}))
    assert next(iter(endless)).answer == "1"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "missing.parquet"}, "data.source.path: there is no file .*missing.parquet"),
        ({"path": "./missing"}, "there is no file .*missing"),
        ({"path": "data/*.parquet"}, "there is no file"),
        ({"path": "pkg://hdpo.nowhere/x.parquet"}, "no installed package 'hdpo.nowhere'"),
        ({"path": "no/such/hub/id"}, "there is no file no/such/hub/id"),
        ({"path": "python:hdpo"}, "of the form python:package.module:function"),
        ({"path": "python:hdpo.files"}, "of the form python:package.module:function"),
        ({"path": "python:hdpo.nothing:rows"}, "No module named 'hdpo.nothing'"),
        ({"path": "python:hdpo.files:rows"}, "has no attribute 'rows'"),
        ({"path": f"python:{__name__}:rows_of_python"}, "data.source.kwargs: .*missing.*'number'"),
        ({"path": f"python:{__name__}:not_rows"}, "its row 2 is a str"),
        ({"path": "nvidia/OpenMathInstruct-2"}, r"cannot read nvidia/OpenMathInstruct-2 \(split 'train'\)"),
    ],
)
def test_bad_paths_give_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(**config)
    assert "\n" not in str(caught.value)


def test_bad_files_give_one_line(tmp_path):
    good = write(tmp_path, ROWS, "parquet")
    with pytest.raises(
        ConfigError, match=r"data.source.columns.answer: .* has no column 'answer', only 'problem', 'gen"
    ):
        read(path=good, columns=ColumnMapping(answer="answer"))
    with pytest.raises(ConfigError, match=r"^data.val_source.columns.problem: .*'question'"):
        list(Source(SourceConfig(path=str(good), columns=ColumnMapping(problem="question")), "data.val_source"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{'problem'\n")
    with pytest.raises(ConfigError, match=r"broken.jsonl: row 2: "):
        read(path=broken)
    broken.write_text('["text"]')
    with pytest.raises(ConfigError, match=r"broken.jsonl: row 1: expected an object, found str"):
        read(path=broken)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"data.source.path: .*cut.parquet: row 1: Parquet magic bytes not") as caught:
        read(path=cut)
    assert "\n" not in str(caught.value)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ConfigError, match="has no rows"):
        read(path=empty)
    text = tmp_path / "data.csv"
    text.touch()
    with pytest.raises(ConfigError, match=r"files of format \.csv"):
        read(path=text)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"there is no file ending in \.parquet"):
        read(path=tmp_path / "folder")
    with pytest.raises(ConfigError, match="of format json, parquet"):
        read(path=tmp_path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        ({"problem": ["2+2?"]}, {}, r"columns.problem: .*, row 2: column 'problem' must hold text, not list \(\['2"),
        ({"problem": 7}, {}, "columns.problem: .*, row 2: column 'problem' must hold text, not int"),
        ({"generated_solution": {"a": 1}}, {}, "columns.solution: .*, row 2: .* must hold text, not dict"),
        ({"expected_answer": [4]}, {}, "columns.answer: .*, row 2: .* must hold text, not list"),
        ({"hint": 3.5}, {"context": "hint"}, "columns.context: .*, row 2: column 'hint' must hold text, not float"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_file_row_and_column(tmp_path, form, change, columns, message):
    row = {**ROWS[0], "hint": None if form == "jsonl" else change.get("hint")}
    if form == "parquet":  # where a column has one type
        row |= change
        message = message.replace("row 2", "row 1")
    path = write(tmp_path, [row, {**row, **change}], form)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path=path, columns=ColumnMapping(**columns))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_within_their_file(tmp_path):
    for form, row in (("jsonl", 2), ("parquet", 1)):
        write(tmp_path, ROWS[:3], form, "a")
        write(tmp_path, [ROWS[3], {**ROWS[4], "problem": 1}] if row == 2 else [{**ROWS[4], "problem": 1}], form, "b")
        with pytest.raises(ConfigError, match=rf"b\.{form}, row {row}: column 'problem'"):
            read(path=tmp_path / f"*.{form}")


EXTRA = [
    {
        "tests": ["assert f(1) == 2"],
        "limit": 5,
        "mixed": [1, 1.0, True, None, "1", {"a": [0.1, -0.0]}],
        "ü": {"x": "é"},
    },
    {"tests": [], "limit": None, "mixed": {}, "ü": "\n"},
]


def test_extra_columns_and_contexts_are_read_as_they_are(tmp_path):
    rows = [{**row, **extra, "hint": f"hint {i}"} for i, (row, extra) in enumerate(zip(ROWS, EXTRA, strict=False))]
    columns = ColumnMapping(context="hint", extra=["tests", "limit", "mixed", "ü", "problem"])
    problems = read(path=write(tmp_path, rows, "jsonl"), columns=columns)
    assert [p.context for p in problems] == ["hint 0", "hint 1"]
    names = columns.extra  # compared as text: 1, 1.0 and True are equal, but not the same
    assert [json.dumps(p.extra) for p in problems] == [json.dumps({name: row[name] for name in names}) for row in rows]
    parquet = read(
        path=write(tmp_path, [{**ROWS[0], "tests": ["a", "b"]}], "parquet"), columns=ColumnMapping(extra=["tests"])
    )
    assert parquet[0].extra == {"tests": ["a", "b"]}


def odd_rows(value):
    yield {**ROWS[0], "odd": value}


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {"a": {2}}, Counter("a"), b"x", object])
def test_extra_values_that_json_would_change_are_refused(value):
    source = {"path": f"python:{__name__}:odd_rows", "kwargs": {"value": value}}
    with pytest.raises(
        ConfigError, match=r"columns.extra: .*odd_rows, row 1: column 'odd' must hold what JSON can hold"
    ):
        read(**source, columns=ColumnMapping(extra=["odd"]))


def test_columns_that_are_missing_are_named(tmp_path):
    path = write(tmp_path, ROWS[:2], "parquet")
    with pytest.raises(ConfigError, match=r"data.source.columns.extra\[1\]: .* has no column 'tests', only 'problem'"):
        read(path=path, columns=ColumnMapping(extra=["problem", "tests"]))
    with pytest.raises(ConfigError, match=r"data.source.columns.context: .* has no column 'hint'"):
        read(path=path, columns=ColumnMapping(context="hint"))


@pytest.mark.parametrize("name", ["prompts", "completions", "references"])
def test_an_extra_column_may_not_hide_what_verifiers_are_given(name):
    with pytest.raises(ConfigError, match=f"columns.extra: verifiers use the name '{name}' for something else"):
        ColumnMapping(extra=[name])


def test_missing_values_of_pandas_are_missing(tmp_path):
    path = write(tmp_path, [{**ROWS[0], "expected_answer": float("nan")}], "parquet")
    assert read(path=path)[0].answer == ""


def test_the_hub_is_asked_for_configuration_split_and_revision(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS[:2]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = read(path="some/data", name="main", split="dev", revision="1234567", kwargs={"token": "t"})
    assert problems == expected(ROWS[:2])
    assert asked == [(("some/data", "main"), {"split": "dev", "revision": "1234567", "streaming": True, "token": "t"})]


def test_bad_configuration():
    with pytest.raises(ConfigError, match="is no regular expression: missing"):
        SourceConfig(answer_pattern="(")
    for options, message in (
        ({"num_samples": 0}, "num_samples must be a number of at least 1, got 0"),
        ({"num_problems": 0}, "num_problems must be a number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a number of at least 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"answer_pattern": "("}, "is no regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluationSource(**options)


def test_parquet_is_read_in_bounded_memory(tmp_path):
    """Reading the first row must not decode the whole file."""
    rows = [{**ROWS[i % len(ROWS)], "generated_solution": f"{i} " * 500} for i in range(20_000)]
    path = tmp_path / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2000)
    stream = iter(Source(SourceConfig(path=str(path))))
    before = pyarrow.total_allocated_bytes()
    for _ in range(3000):
        next(stream)
    time.sleep(0.2)  # for a reader that works ahead
    assert pyarrow.total_allocated_bytes() - before < 12e6 < sum(len(row["generated_solution"]) for row in rows) / 4
