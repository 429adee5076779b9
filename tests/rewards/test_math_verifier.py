"""MathVerifier with math-verify in its workers."""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import sympy

from hdpo.rewards import Grade, MathVerifier, Outcome
from hdpo.rewards.workers import WorkerPool
from tests.rewards.helpers import boxed, child_processes, needs_proc, outcomes
from tests.rewards.hostile_answers import hostile_answers
from tests.rewards.verdicts import DISAGREEMENTS, VERDICTS, completions


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(num_workers=2, timeout=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize("name", VERDICTS)
def test_the_table_of_verdicts(verifier, name):
    rows = VERDICTS[name]
    grades = verifier.grade(completions(rows), [row[0] for row in rows])
    judged = [row[:2] for row, grade in zip(rows, grades, strict=True) if (grade.outcome == "correct") != row[2]]
    assert judged == [row[1:] for row in DISAGREEMENTS if row[0] == name]
    assert all(grade.reward == float(grade.outcome is Outcome.CORRECT) for grade in grades)
    assert set(outcomes(grades)) <= {"correct", "wrong", "no_answer"}
    assert all(verifier.usable([row[0] for row in rows]))


def test_the_table_is_large_and_its_rows_differ():
    rows = [row[:2] for rows in VERDICTS.values() for row in rows]
    assert len(set(rows)) == len(rows) >= 300
    assert all(reason for rows in VERDICTS.values() for *_, reason in rows)


def test_boxes_that_differ_are_no_answer_at_all(verifier):
    texts = [
        r"\boxed{4} no, \boxed{5}",
        r"\boxed{5} no, \boxed{4}",
        "it is 5",
        r"\boxed{}",
        r"\boxed{ }",
        "",
        "9" * 1001,
    ]
    grades = verifier.grade([*texts[:-1], f"\\boxed{{{texts[-1]}}}"], ["5"] * 7)
    assert outcomes(grades) == ["no_answer"] * 7
    assert [grade.detail for grade in grades[:3]] == ["several different boxes"] * 2 + [""]


def test_nemo_reads_the_whole_completion():
    with MathVerifier(profile="nemo", num_workers=1) as nemo:
        completions = ["it is 5", r"so $\boxed{5}$", r"$\frac{1}{2}$", "no idea", "  "]
        expected = ["correct", "correct", "wrong", "no_answer", "no_answer"]
        assert outcomes(nemo.grade(completions, ["5"] * 5)) == expected


def test_identity_is_what_verdicts_depend_on(monkeypatch):
    identity = MathVerifier().identity()
    assert identity == json.loads(json.dumps(identity))
    assert identity == MathVerifier(num_workers=7, batch_timeout=None).identity()
    assert identity["versions"]["sympy"] == sympy.__version__
    for other in ({"profile": "nemo"}, {"timeout": 7.0}, {"memory_limit": None}):
        assert identity != MathVerifier(**other).identity()
    rules = Path(importlib.util.find_spec("hdpo.rewards.mathematics").origin)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == rules else b""))
    assert identity != MathVerifier().identity(), "other code, other verdicts"


def test_nothing_to_grade(verifier):
    assert verifier.grade([], []) == []
    assert verifier.usable([]) == []


def test_usable(verifier):
    references = ["5", None, "", "  ", r"\frac{1}{0}", "}", r"\frac{1}{2}", "5", r"\text{Monday}"]
    assert verifier.usable(references) == [True, False, False, False, False, False, True, True, True]


def test_outcomes_and_a_second_start():
    with MathVerifier(num_workers=1) as verifier:
        pending = verifier.submit([*boxed("5", "6", "6"), "", "\\boxed{5}"], ["5", "5", "5", "5", "\\frac{1}{0}"])
        assert pending.result() == pending.result()
        assert outcomes(pending.result()) == ["correct", "wrong", "wrong", "no_answer", "invalid_reference"]
    assert outcomes(verifier.grade(boxed("5.0"), ["5"])) == ["correct"], "after close: started anew"
    verifier.close()


def test_equal_pairs_are_graded_once(verifier, monkeypatch):
    sent = []
    submit = WorkerPool.submit
    monkeypatch.setattr(WorkerPool, "submit", lambda pool, new, budget: sent.extend(new) or submit(pool, new, budget))
    completions = ["first \\boxed{2x}", "then \\boxed{2x}", "\\boxed{3x}", "\\boxed{2x}", "nothing"]
    grades = verifier.grade(completions, ["x+x", "x+x", "x+x", "3x", "x+x"])
    assert [grade.reward for grade in grades] == [1, 1, 0, 0, 0]
    expected = [("grade", "2x", "x+x"), ("grade", "3x", "x+x"), ("grade", "2x", "3x")]
    assert [pickle.loads(request) for request in sent] == expected


def test_plain_integers_need_no_worker(verifier, monkeypatch):
    monkeypatch.setattr(WorkerPool, "submit", None)
    grades = verifier.grade(boxed("5", "-5", "12"), ["5", "5", "12"])
    assert outcomes(grades) == ["correct", "wrong", "correct"]


def test_pending_grades_do_not_depend_on_the_order_of_asking(verifier):
    first = verifier.submit(boxed("2x", "3x"), ["x+x", "x+x"])
    second = verifier.submit(boxed("3x", "2x"), ["x+x", "x+x"])
    assert outcomes(second.result()) == ["wrong", "correct"]
    assert outcomes(first.result()) == ["correct", "wrong"]
    assert first.done()


def test_from_many_threads_at_once(verifier):
    results = {}

    def grade(thread):
        answers = [f"{i + thread}x" for i in range(40)]
        results[thread] = verifier.grade(boxed(*answers), [f"{40 + thread - i}x" for i in range(40)])

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grades in results.values():
        assert [g.outcome is Outcome.CORRECT for g in grades] == [i == 20 for i in range(40)]
    assert len(results) == 6


def test_answers_that_never_end_and_strings_of_all_kinds():
    slow = ["(x+y+z)^{300}", "(a+b+c)^{299}"]
    odd = ["\u202e5\u202c", "5\x00", "5\ud800", "}" * 500, "x" * 200, "x" * 1_000_000]
    answers = [text for i, bad in enumerate(slow + odd) for text in (bad, f"{i}x", f"{i + 1}x")]
    references = [text for i in range(len(slow + odd)) for text in ("x+1", f"x{i}", f"x{i}")]
    with MathVerifier(num_workers=2, timeout=1.0) as verifier:
        grades = verifier.grade(boxed(*answers), references)
        assert set(outcomes(grades[1::3])) == {"correct"}
        assert set(outcomes(grades[2::3])) == {"wrong"}
        assert outcomes(grades[:6:3]) == ["timeout", "timeout"]
        assert set(outcomes(grades[6::3])) <= {"wrong", "no_answer"}
        assert all(grade.reward == 0 for grade in grades[::3])
        assert verifier.respawns == sum(outcome in ("timeout", "error") for outcome in outcomes(grades))


@pytest.mark.slow
@needs_proc
def test_hostile_answers_are_all_accounted_for_in_time():
    before = child_processes()
    with MathVerifier(num_workers=2, timeout=1.0, batch_timeout=8.0) as verifier:
        verifier.start()
        for seed in range(3):
            texts, references = zip(*hostile_answers(400, seed), strict=True)
            started = time.monotonic()
            grades = verifier.grade(texts, references)
            assert time.monotonic() - started < 8 + 5, "the bound, and the start of a worker on a busy machine"
            assert len(grades) == 400
            assert not any(grade.reward for grade in grades)
            assert set(outcomes(grades)) <= {"wrong", "no_answer", "timeout", "error"}
            assert outcomes(grades).count("timeout") < 150
        assert outcomes(verifier.grade(boxed("x+x", "3x"), ["2x", "2x"])) == ["correct", "wrong"]
    assert child_processes() == before


@pytest.mark.slow
def test_the_benchmark_of_verdicts(tmp_path):
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "benchmarks/verdicts.py",
        "--num-hostile",
        "60",
        "--json",
        str(tmp_path / "verdicts.json"),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["class"]: row for row in json.loads((tmp_path / "verdicts.json").read_text())["rows"]}
    assert set(rows) == {*VERDICTS, "all", "hostile"}
    pairs = sum(map(len, VERDICTS.values()))
    assert rows["all"]["pairs"] == pairs
    assert rows["all"]["strict"] == pytest.approx(1 - len(DISAGREEMENTS) / pairs)
    assert rows["all"]["bare"] < 0.8
    assert sum(rows["hostile"][outcome.value] for outcome in Outcome) == 60


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_have_the_settings_and_their_own_workers(duplicate):
    with MathVerifier("nemo", num_workers=1, timeout=7.0, memory_limit=None) as original:
        original.grade(["5"], ["5"])
        with duplicate(original) as other:
            assert (other.profile, other.num_workers, other.timeout, other.memory_limit) == ("nemo", 1, 7.0, None)
            original.close()
            assert other.grade(["5"], ["5"]) == [Grade(Outcome.CORRECT, 1.0)]


def run_script(tmp_path, body, **kwargs):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, **kwargs)


def test_in_a_script_without_a_guard_in_a_thread_and_without_close(tmp_path):
    # Files that would shadow modules of the standard library, were the working directory on the worker's path.
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    done = run_script(
        tmp_path,
        r"""
        import sys
        sys.path.remove(sys.path[0])
        print("main")
        import threading
        from hdpo.rewards import MathVerifier
        verifier = MathVerifier(num_workers=2)
        out = []
        thread = threading.Thread(target=lambda: out.extend(verifier.grade(["\\boxed{2x}"], ["x+x"])))
        thread.start()
        thread.join()
        # The thread that started the workers is gone; they are not.
        out += verifier.grade(["\\boxed{3x}", "\\boxed{4x}"], ["5x", "x+3x"])
        print([grade.outcome.value for grade in out], verifier.respawns)
        """,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["main", "['correct', 'wrong', 'correct'] 0"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_math_verify_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = run_script(
        tmp_path,
        r"""
        from hdpo.rewards import MathVerifier, VerifierError
        with MathVerifier() as verifier:
            grade = lambda: verifier.grade(["\\boxed{2x}"], ["x+x"])
            for use in (verifier.start, grade, lambda: verifier.usable(["x+1"])):
                try:
                    use()
                except VerifierError as error:
                    print(error)
            print(verifier.respawns)
        """,
    )
    line = "the answer checker's worker process does not start: ModuleNotFoundError: No module named 'math_verify'"
    assert done.stdout.splitlines() == [line] * 3 + ["0"], done.stderr
    assert done.stderr == ""


def test_the_page_on_verdicts_says_what_the_table_says():
    page = (Path(__file__).parents[2] / "docs/verifier.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[2] for row in cells if len(row) == 4 and " / " in row[2]}
    differing = Counter(name for name, *_ in DISAGREEMENTS)
    expected = {name: f"{len(rows) - differing[name]} / {len(rows)}" for name, rows in VERDICTS.items()}
    total = sum(map(len, VERDICTS.values()))
    assert found == expected | {"all": f"{total - len(DISAGREEMENTS)} / {total}"}
    for name, reference, answer in DISAGREEMENTS:
        assert f"| {name} | `` {reference} `` | `` {answer} `` |" in page
