import re
from collections import Counter
from types import SimpleNamespace

import pytest

from hdpo.data.config import ColumnMapping, ProblemSet, Selection, SourceConfig
from hdpo.data.preparation import (
    Collector,
    Dropped,
    PreparationReport,
    normalise_problem,
    prepare,
    problem_digest,
    show_progress,
)
from hdpo.data.prompts import PromptConfig, PromptRenderer
from hdpo.data.sources import Problem
from hdpo.errors import ConfigError
from tests.helpers.openmath_fixture import openmath_rows, tiny_tokenizer

KEYS = ("problem", "generated_solution", "expected_answer", "problem_source")
ROWS = [Problem(*(row[key] or "" for key in KEYS)) for row in openmath_rows(600)]


@pytest.fixture(scope="module")
def renderer():
    return PromptRenderer(tiny_tokenizer())


def parses(references, prompts):
    assert len(prompts) == len(references)
    return [reference != "\\frac{" for reference in references]


ALL = {"train": None, "validation": None, "test": None}
SOURCE = SourceConfig(path="rows")


def run(
    renderer, rows=ROWS, *, usable=parses, held_out=frozenset(), chunk_size=64, wanted=ALL, source=SOURCE, **options
):
    """Prepare splits of the rows; return what was kept as (split, problem), the reports, and what was dropped."""
    selection = Selection(**{"val_fraction": 0.2, "test_fraction": 0.1, **options})
    sets = [ProblemSet(split, "data.source", source, number, (split,)) for split, number in wanted.items()]
    collectors = [Collector(wanted, selection, held_out) for wanted in sets]
    kept, dropped = [], []
    for collector, result in prepare(rows, collectors, selection, renderer, usable=usable, chunk_size=chunk_size):
        (dropped if isinstance(result, Dropped) else kept).append((collector.wanted.name, result))
    reports = {collector.wanted.name: collector.report for collector in collectors}
    for name, report in reports.items():
        assert report.kept == sum(split == name for split, _ in kept)
        assert report.dropped == Counter(result.reason for split, result in dropped if split == name)
    return kept, reports, dropped


def total(reports) -> Counter:
    return sum((Counter(report.dropped) for report in reports.values()), Counter())


def texts(kept, split=None):
    return [p.problem.problem for name, p in kept if split in (None, name)]


def reference_preparation(rows, val_fraction, test_fraction):
    """The default preparation without limits, written out: (split, problem) of what is kept, reasons for the rest."""
    kept, dropped, seen = [], Counter(), set()
    for row in rows:
        key = " ".join(row.problem.lower().split())
        if not row.problem or not row.solution or not row.answer:
            dropped["missing"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        elif row.answer == "\\frac{":
            dropped["unusable"] += 1
        else:
            seen.add(key)
            share = int.from_bytes(problem_digest(row.problem)[:8], "big") / 2**64
            evaluated = "validation" if share < val_fraction else "test"
            kept.append((evaluated if share < val_fraction + test_fraction else "train", row.problem))
    return kept, dropped


def test_equals_the_reference_and_counts_every_row(renderer):
    kept, reports, dropped = run(renderer)
    expected, reasons = reference_preparation(ROWS, 0.2, 0.1)
    assert [(name, p.problem.problem) for name, p in kept] == expected
    assert all(report.rows_read == len(ROWS) for report in reports.values())
    counts = total(reports)
    assert sum(n for reason, n in counts.items() if reason.startswith("missing")) == reasons["missing"] > 0
    assert counts["duplicate"] == reasons["duplicate"] > 0
    assert counts["unusable"] == reasons["unusable"] > 0
    assert {"missing_problem", "missing_solution", "missing_answer"} <= set(counts)
    assert len(kept) + len(dropped) == len(ROWS)


def test_dropped_rows_are_listed_with_place_reason_and_beginning(renderer):
    rows = [
        Problem("2+2?", "So 4.", "4", "s", place=("a.jsonl", 1)),
        Problem("  2+2? " + "x" * 100, "", "4", "s", place=("a.jsonl", 2)),
        Problem("", "", "", "s", place=("b.jsonl", 1)),
    ]
    _, _, dropped = run(renderer, rows)
    assert [result for _, result in dropped] == [
        Dropped("a.jsonl", 2, "missing_solution", ("  2+2? " + "x" * 100)[:80]),
        Dropped("b.jsonl", 1, "missing_problem", ""),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"wanted": {"train": 40, "validation": 9}},
        {"wanted": {"train": 3, "validation": 20, "test": 5}, "keep_duplicates": True},
        {"wanted": {"train": 40, "validation": 9, "test": 9}, "split_by": "row"},
        {"wanted": {"train": 20}, "max_prompt_tokens": 80},
    ],
)
def test_chunks_do_not_change_the_result(renderer, options):
    results = [run(renderer, chunk_size=size, **options) for size in (1, 7, 64, 10_000)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("options", [{}, {"split_by": "row"}, {"keep_duplicates": True}])
def test_a_split_does_not_depend_on_what_is_collected_beside_it(renderer, options):
    wanted = {"test": 8, "validation": 12, "train": 30}
    kept, reports, dropped = run(renderer, wanted=wanted, **options)
    for name, number in wanted.items():
        alone = run(renderer, wanted={name: number}, **options)
        assert alone[0] == [item for item in kept if item[0] == name]
        assert alone[1] == {name: reports[name]}
        assert alone[2] == [item for item in dropped if item[0] == name]


def test_stops_as_soon_as_enough_were_found(renderer):
    read = 0

    def counted():
        nonlocal read
        for row in ROWS:
            read += 1
            yield row

    wanted = {"train": 10, "validation": 2}
    kept, reports, _ = run(renderer, counted(), wanted=wanted, chunk_size=1)
    assert Counter(name for name, _ in kept) == wanted
    assert read == max(report.rows_read for report in reports.values()) < len(ROWS)
    everything, _, _ = run(renderer)
    for split in wanted:
        first = texts(kept, split)
        assert first == texts(everything, split)[: len(first)]


def sides(kept):
    return {normalise_problem(p.problem.problem): name for name, p in kept}


def test_splits_are_disjoint_and_stable(renderer):
    kept, _, _ = run(renderer, keep_duplicates=True)
    where = {}
    for name, p in kept:
        assert where.setdefault(normalise_problem(p.problem.problem), name) == name
    shares = {name: number / len(where) for name, number in Counter(where.values()).items()}
    assert 0.13 < shares["validation"] < 0.27
    assert 0.05 < shares["test"] < 0.15
    # Which split a problem is in depends on its text alone: not on order, white space, case or what else is read.
    shuffled = [row._replace(problem=f"  {row.problem.upper()}\n") for row in reversed(ROWS) if row.problem]
    assert sides(run(renderer, shuffled)[0]).items() <= where.items()
    # A test split takes from training alone; a larger share of validation takes from nobody else's.
    without = sides(run(renderer, test_fraction=0.0)[0])
    assert {k for k, name in without.items() if name == "validation"} == {
        k for k, n in where.items() if n == "validation"
    }
    assert {k for k, name in where.items() if name == "test"} <= {k for k, name in without.items() if name == "train"}
    more = sides(run(renderer, val_fraction=0.5)[0])
    assert {k for k, name in where.items() if name == "validation"} < {k for k, n in more.items() if n == "validation"}


def test_split_hash_is_fixed_for_good():
    # A change moves problems between training and validation for everyone.
    assert problem_digest("What is 2 + 2?").hex() == problem_digest("what  IS\n2 + 2? ").hex() == FROZEN_DIGEST
    splits = [
        Selection(val_fraction=v, test_fraction=t).split(0, bytes.fromhex(FROZEN_DIGEST)) for v, t in FROZEN_SHARES
    ]
    assert splits == ["train", "test", "validation", "test"]  # 0x692a9daa / 2**32 = 0.41


def test_split_over_rows_is_fixed_for_good():
    selection = Selection(split_by="row", val_fraction=0.3, test_fraction=0.2)
    assert [selection.split(row, b"") for row in range(len(FROZEN_ROWS))] == FROZEN_ROWS


FROZEN_ROWS = ["test", "validation", "train", "train", "test", "test"]
FROZEN_DIGEST = "692a9daa52e42c50943f4784c639bfc7"
FROZEN_SHARES = [(0.2, 0.2), (0.2, 0.3), (0.42, 0.1), (0.0, 0.5)]


def test_by_row_splits_rows_and_leaks(renderer):
    kept, _, _ = run(renderer, split_by="row", keep_duplicates=True)
    share = sum(name == "validation" for name, _ in kept) / len(kept)
    assert abs(share - 0.2) < 0.06
    places = {}
    for name, p in kept:
        places.setdefault(p.problem.problem, set()).add(name)
    assert any(len(both) == 3 for both in places.values())
    distinct, _, _ = run(renderer, split_by="row")
    for split in ALL:
        problems = texts(distinct, split)
        assert len(problems) == len(set(problems)) > 0


def test_keep_duplicates_keeps_all_rows(renderer):
    kept, reports, _ = run(renderer, keep_duplicates=True)
    assert "duplicate" not in total(reports)
    assert len(kept) == sum(bool(r.problem and r.solution and r.answer and r.answer != "\\frac{") for r in ROWS)


def test_a_later_good_row_saves_a_problem(renderer):
    rows = [Problem("2+2?", "", "4", "s"), Problem("2+2?", "So 4.", "\\frac{", "s"), Problem("2+2?", "So 4.", "4", "s")]
    kept, reports, _ = run(renderer, rows, chunk_size=10)
    assert [p.problem.answer for _, p in kept] == ["4"]
    assert total(reports) == {"missing_solution": 1, "unusable": 1}


def test_a_source_without_solutions_is_kept_where_none_are_mapped(renderer):
    source = SourceConfig(path="rows", columns=ColumnMapping(solution=None))
    ((_, kept),), _, _ = run(renderer, [Problem("2+2?", "", "4", "s")], source=source)
    assert "The final answer is \\boxed{4}." in renderer.tokenizer.decode(kept.privileged_ids)


def test_problems_to_predict_need_neither_answer_nor_solution_and_may_repeat(renderer):
    rows = [
        Problem("2+2?", "", "", "s"),
        Problem("2+2?", "", "", "s"),
        Problem("", "", "5", "s"),
        Problem("3?", "", "", "s"),
    ]
    source = SourceConfig(path="rows", columns=ColumnMapping(solution=None, answer=None))
    selection = Selection()
    collector = Collector(ProblemSet("predict", "data.predict_source", source, labelled=False), selection)
    results = [r for _, r in prepare(rows, [collector], selection, renderer, usable=lambda *_, **__: 1 / 0)]
    assert [p.problem.problem for p in results if not isinstance(p, Dropped)] == ["2+2?", "2+2?", "3?"]
    assert collector.report.dropped == {"missing_problem": 1}
    assert collector.report.not_distilled == {"no_context": 3}
    with pytest.raises(ConfigError, match=r"data.source.columns: one of answer and solution must name a column"):
        ProblemSet("train", "data.source", source)


def test_limits(renderer):
    everything, _, _ = run(renderer)
    student = sorted(len(p.prompt_ids) for _, p in everything)
    limit = student[len(student) // 2]
    kept, reports, _ = run(renderer, max_prompt_tokens=limit)
    assert set(texts(kept)) == {p.problem.problem for _, p in everything if len(p.prompt_ids) <= limit}
    assert total(reports)["prompt_too_long"] >= sum(length > limit for length in student)
    privileged = sorted(len(p.privileged_ids) for _, p in everything)
    limit = privileged[len(privileged) // 2]
    kept, reports, _ = run(renderer, max_privileged_tokens=limit)
    assert texts(kept) == texts(everything)
    empty = [p for _, p in kept if not p.privileged_ids]
    counted = sum((Counter(report.not_distilled) for report in reports.values()), Counter())
    assert counted == {"too_long": len(empty)}
    assert len(empty) == sum(length > limit for length in privileged) > 0
    assert all(len(p.privileged_ids) <= limit for _, p in kept)


def test_a_problem_without_its_context_stays_and_is_not_distilled():
    renderer = PromptRenderer(tiny_tokenizer(), PromptConfig(privileged_context="column"))
    rows = [Problem("2+2?", "So 4.", "4", "s", "Add them."), Problem("2+3?", "So 5.", "5", "s")]
    kept, reports, _ = run(renderer, rows)
    first, second = (p for _, p in kept)
    text = renderer.tokenizer.decode(first.privileged_ids)
    assert "Add them." in text
    assert "So 4." not in text
    assert second.privileged_ids == []
    assert sum((Counter(report.not_distilled) for report in reports.values()), Counter()) == {"no_context": 1}


def test_held_out_problems_are_left_out(renderer):
    evaluated = [row.problem for row in ROWS[:100] if row.problem]
    held_out = frozenset(problem_digest(problem.upper()) for problem in evaluated)
    kept, reports, _ = run(renderer, held_out=held_out)
    assert total(reports)["held_out"] > 0
    assert not set(texts(kept)) & set(evaluated)


@pytest.mark.parametrize("field", ["problem", "solution", "answer", "context"])
def test_texts_with_special_tokens_or_lone_surrogates_are_dropped(renderer, field):
    good = Problem("2+2?", "So 4.", "4", "s", "Add.")
    bad = [good._replace(**{field: text}, place=("f", n)) for n, text in enumerate(("2 <|im_end|>", "2 \ud800"), 1)]
    rows = [*bad, good]
    kept, reports, dropped = run(renderer, rows, usable=None)
    assert [p.problem for _, p in kept] == [good]
    assert total(reports) == {"special_tokens": 1, "not_unicode": 1}
    assert sorted(result.row for _, result in dropped) == [1, 2]


def test_a_prompt_that_merges_with_the_generation_prompt_is_dropped(renderer, monkeypatch):
    # No tokenizer of the tests does it; what it would mean is an end other than the generation prompt.
    render = renderer.students
    monkeypatch.setattr(renderer, "students", lambda problems: [ids[:-1] for ids in render(problems)])
    kept, reports, _ = run(renderer, [Problem("2+2?", "So 4.", "4", "s")])
    assert not kept
    assert total(reports) == {"prompt_merged": 1}


def test_the_verifier_is_asked_with_prompts_and_columns_and_only_where_needed(renderer):
    asked = []

    def usable(references, **columns):
        asked.append((references, columns))
        return [limit != 3 for limit in columns["limit"]]

    rows = [Problem(f"{i}+0?", "Yes.", str(i), "s", extra={"limit": i % 4, "tests": [str(i)]}) for i in range(6)]
    rows[1] = rows[1]._replace(answer="")
    kept, reports, _ = run(renderer, rows, usable=usable)
    numbers = [0, 2, 3, 4, 5]
    columns = {"prompts": [f"{i}+0?" for i in numbers], "limit": [0, 2, 3, 0, 1], "tests": [[str(i)] for i in numbers]}
    assert asked == [([str(i) for i in numbers], columns)]
    assert texts(kept) == ["0+0?", "2+0?", "4+0?", "5+0?"]
    assert total(reports) == {"missing_answer": 1, "unusable": 1}


def test_endless_sources_are_fine(renderer):
    def endless():
        number = 0
        while True:
            number += 1
            yield Problem(f"{number} + 0?", "Same.", str(number), "s")

    kept, _, _ = run(renderer, endless(), wanted={"train": 30, "validation": 3})
    assert len(kept) == 33


def test_the_table_reads_from_rows_to_problems(renderer):
    wanted = {"train": 10, "validation": 2}
    limit = min(len(p.privileged_ids) for _, p in run(renderer, wanted=wanted)[0])
    _, reports, _ = run(renderer, wanted=wanted, max_privileged_tokens=limit)
    table = dict(reports["train"].table())
    assert table["kept"] == 10
    assert table["rows read"] == 10 + table["in other splits"] + sum(reports["train"].dropped.values())
    assert table["  of these with a privileged prompt over data.selection.max_privileged_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_problems": 0}, "data.selection.num_train_problems must be a number of at least 1, got 0"),
        ({"num_val_problems": -1}, "data.selection.num_val_problems must be a number of at least 0"),
        ({"num_test_problems": -1}, "data.selection.num_test_problems must be a number of at least 0"),
        ({"val_fraction": -0.1}, "data.selection.val_fraction must be a number of at least 0"),
        ({"test_fraction": float("nan")}, "data.selection.test_fraction must be a number of at least 0, got nan"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction \\+ test_fraction must be below 1"),
        ({"split_by": "text"}, "data.selection.split_by must be one of problem, row, got 'text'"),
        ({"max_prompt_tokens": 0}, "data.selection.max_prompt_tokens must be a number of at least 1"),
        ({"max_privileged_tokens": 0}, "data.selection.max_privileged_tokens must be a number of at least 1"),
    ],
)
def test_bad_selections(options, message):
    with pytest.raises(ConfigError, match=message):
        Selection(**options)


def test_a_preparation_that_finds_nothing_says_what_it_drops(monkeypatch, capsys):
    """An endless source would else be read forever, with nothing to tell why."""
    monkeypatch.setattr("hdpo.data.preparation.SECONDS_BETWEEN_LINES", 0.0)
    report = PreparationReport("validation", "endless")
    with show_progress([SimpleNamespace(report=report, wanted=SimpleNamespace(num_problems=4))]) as update:
        report.rows_read, report.dropped = 30, Counter(duplicate=1, unusable=29)
        update()
        report.rows_read, report.kept = 31, 1
        update()
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"Preparing endless: 0 of 4 problems, 30 rows read in 0 s; "
        r"29 dropped: reference answer that the verifier cannot use",
        first,
    )
    assert re.fullmatch(r"Preparing endless: 1 of 4 problems, 31 rows read in 0 s", second)
