"""The stories: right answers (read off the text by another program), disjoint splits, one order forever."""

import re
from collections import Counter
from itertools import islice

import pytest

from hdpo.errors import ConfigError
from hdpo.lab.problems import rows, split_of


def answer_from_text(problem: str) -> tuple[int, int]:
    """Read a story as a human would; returns (answer, number of operations). Shares no code with the generator."""
    story, question = problem.split(". ")
    first, *clauses = story.split(", ")
    name, has, start, thing = first.split()
    assert has == "has"
    assert name.isalpha()
    assert question == f"How many {thing} now?"
    amount = int(start)
    for clause in clauses:
        if clause in ("doubles them", "triples them"):
            amount = amount * (2 if clause.startswith("d") else 3)
        else:
            verb, number = clause.split()
            gains = {"buys": True, "finds": True, "gets": True, "gives": False, "loses": False, "sells": False}
            amount = amount + int(number) if gains[verb] else amount - int(number)
        assert 1 <= amount <= 99
    return amount, len(clauses)


@pytest.mark.parametrize("split", ["warmup", "train", "validation"])
def test_answers_and_solutions_are_right(split):
    for row in rows(1200, split=split, seed=3):
        answer, num_operations = answer_from_text(row["problem"])
        assert row["expected_answer"] == str(answer)
        assert row["problem_source"] == f"tier{num_operations}"
        steps, final = row["generated_solution"].split(" So ")
        assert final == f"\\boxed{{{answer}}}"
        equations = re.findall(r"(\d+)([-+*])(\d+)=(\d+)\.", steps)
        assert len(equations) == num_operations
        assert steps == " ".join("{}{}{}={}.".format(*e) for e in equations)
        for (a, operator, b, result), following in zip(equations, [*equations[1:], None], strict=True):
            assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
            assert following is None or following[0] == result
        assert equations[-1][3] == str(answer)


def test_columns_are_openmathinstructs():
    row = next(rows(1))
    assert list(row) == ["problem", "generated_solution", "expected_answer", "problem_source"]
    assert all(isinstance(value, str) for value in row.values())


def test_splits_share_no_problem_whatever_the_seed():
    problems = {
        split: {row["problem"] for seed in (0, 1) for row in rows(3000, split=split, seed=seed, tiers=[1, 2])}
        for split in ("warmup", "train", "validation")
    }
    assert not problems["warmup"] & problems["train"]
    assert not problems["warmup"] & problems["validation"]
    assert not problems["train"] & problems["validation"]
    assert all(split_of(problem) == split for split, texts in problems.items() for problem in texts)


def test_split_depends_on_words_only_and_has_its_shares():
    problems = [row["problem"] for split in ("warmup", "train", "validation") for row in rows(500, split=split)]
    assert all(split_of(f"  {p.upper()}\n") == split_of(p) for p in problems)
    assert split_of("Ben has 6 shells, loses 4. How many shells now?") == "warmup"  # pinned: policies rely on it
    shares = Counter(split_of(f"{p} {i}") for i in range(10) for p in problems)
    assert shares["warmup"] / 15_000 == pytest.approx(0.45, abs=0.02)
    assert shares["validation"] / 15_000 == pytest.approx(0.10, abs=0.02)


def test_order_is_deterministic_and_a_longer_run_only_adds():
    first = list(rows(300, split="train", seed=5))
    assert first == list(islice(rows(split="train", seed=5), 300))
    assert first != list(rows(300, split="train", seed=6))
    assert len({row["problem"] for row in first}) == 300


def test_first_rows_are_pinned():
    """The generator feeds a policy that exists already: a changed wording would silently ruin its scores."""
    assert next(rows(1, split="train", tiers=[2])) == {
        "problem": "Tom has 26 books, finds 6, buys 3. How many books now?",
        "generated_solution": "26+6=32. 32+3=35. So \\boxed{35}",
        "expected_answer": "35",
        "problem_source": "tier2",
    }


def test_equal_tiers_take_turns_and_weights_are_kept_in_every_prefix():
    assert [row["problem_source"][-1] for row in rows(9, tiers=[2, 4, 6])] == list("246246246")
    weighted = Counter(row["problem_source"] for row in rows(100, tiers={1: 3, 5: 1, 6: 0}))
    assert weighted == {"tier1": 75, "tier5": 25}


def test_a_tiers_problems_do_not_depend_on_the_other_tiers():
    alone = list(rows(20, tiers=[5]))
    mixed = [row for row in rows(120) if row["problem_source"] == "tier5"]
    assert alone == mixed


def test_one_tier_problems_are_distinct_in_large_numbers():
    texts = [row["problem"] for row in rows(20_000, split="train", tiers=[1])]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of warmup, train, validation"),
        ({"tiers": [7]}, "there are tiers 1 to 6"),
        ({"tiers": [1, 6, 6]}, "names a tier twice"),
        ({"tiers": []}, "not all zero"),
        ({"tiers": {1: 0.0}}, "not all zero"),
        ({"tiers": {1: -1.0, 2: 2.0}}, "not negative"),
        ({"num_problems": -1}, "must not be negative"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, message):
    with pytest.raises(ConfigError, match=message):
        rows(**arguments)


def test_an_exhausted_tier_says_so(monkeypatch):
    monkeypatch.setattr("hdpo.lab.problems.NAMES", ("Ana",))
    monkeypatch.setattr("hdpo.lab.problems.THINGS", ("eggs",))
    monkeypatch.setattr("hdpo.lab.problems._MAX_DRAWS", 500)
    with pytest.raises(ConfigError, match=r"tier 1 has no more than .* ask for fewer rows"):
        list(rows(tiers=[1], split="validation"))
