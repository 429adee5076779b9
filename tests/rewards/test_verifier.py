"""MathVerifier with math-verify in its workers."""

import copy
import pickle
import random
import subprocess
import sys
import textwrap
import threading

import pytest

from hdpo.rewards import Grade, MathVerifier, Outcome
from hdpo.rewards.pool import WorkerPool
from tests.rewards.helpers import boxed, outcomes
from tests.rewards.latex_pairs import PAIRS


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(num_workers=2, timeout=20.0) as verifier:
        yield verifier


def test_the_table_through_the_workers(verifier):
    rows = PAIRS * 2
    random.Random(0).shuffle(rows)
    grades = verifier.grade([f"Thus \\boxed{{{answer}}}." for _, _, answer, _ in rows], [row[1] for row in rows])
    assert [grade.outcome is Outcome.CORRECT for grade in grades] == [row[3] for row in rows]
    assert all(grade.reward == float(grade.outcome is Outcome.CORRECT) for grade in grades)
    assert set(outcomes(grades)) == {"correct", "wrong"}


def test_strict_reads_the_last_box_only(verifier):
    completions = [r"\boxed{4} no, \boxed{5}", r"\boxed{5} no, \boxed{4}", "it is 5", r"\boxed{}", r"\boxed{ }", ""]
    assert outcomes(verifier.grade(completions, ["5"] * 6)) == ["correct", "wrong"] + ["no_answer"] * 4


def test_nemo_reads_the_whole_completion():
    with MathVerifier(profile="nemo", num_workers=1) as nemo:
        completions = ["it is 5", r"so $\boxed{5}$", r"$\frac{1}{2}$", "no idea", "  "]
        expected = ["correct", "correct", "wrong", "no_answer", "no_answer"]
        assert outcomes(nemo.grade(completions, ["5"] * 5)) == expected


def test_nothing_to_grade(verifier):
    assert verifier.grade([], []) == []
    assert verifier.parseable([]) == []


def test_parseable(verifier):
    references = ["5", None, "", "  ", r"\frac{1}{0}", "}", r"\frac{1}{2}", "5", r"\text{Monday}"]
    assert verifier.parseable(references) == [True, False, False, False, False, False, True, True, True]


def test_counters_and_invalid_references():
    with MathVerifier(num_workers=1) as verifier:
        assert set(verifier.counters) == {outcome.value for outcome in Outcome} | {"respawns"}
        verifier.parseable(["5"])
        assert sum(verifier.counters.values()) == 0
        pending = verifier.submit([*boxed("5", "6", "6"), "", "\\boxed{5}"], ["5", "5", "5", "5", "\\frac{1}{0}"])
        assert pending.result() == pending.result()  # counted once
        expected = {"correct": 1, "wrong": 2, "no_answer": 1, "invalid_reference": 1}
        assert +verifier.counters == expected
        verifier.grade(boxed("5"), ["5"])
    verifier.grade(boxed("5"), ["5"])  # after close: started anew, and counted on
    verifier.close()
    assert +verifier.counters == {**expected, "correct": 3}


def test_equal_pairs_are_graded_once(verifier, monkeypatch):
    sent = []
    submit = WorkerPool.submit
    monkeypatch.setattr(WorkerPool, "submit", lambda self, requests: sent.extend(requests) or submit(self, requests))
    completions = ["first \\boxed{5.5}", "then \\boxed{5.5}", "\\boxed{6}", "\\boxed{5.5}", "nothing"]
    for _ in range(2):
        assert [g.reward for g in verifier.grade(completions, ["5.5", "5.5", "5.5", "6", "5.5"])] == [1, 1, 0, 0, 0]
    assert sent == [("grade", "5.5", "5.5"), ("grade", "6", "5.5"), ("grade", "5.5", "6")], "also in a second call"


def test_plain_integers_need_no_worker(verifier, monkeypatch):
    monkeypatch.setattr(WorkerPool, "submit", None)
    grades = verifier.grade(boxed("5", "-5", "12"), ["5", "5", "12"])
    assert outcomes(grades) == ["correct", "wrong", "correct"]


def test_pending_grades_do_not_depend_on_the_order_of_asking(verifier):
    first = verifier.submit(boxed("1.5", "2.5"), ["1.5", "1.5"])
    second = verifier.submit(boxed("2.5", "1.5"), ["1.5", "1.5"])
    assert outcomes(second.result()) == ["wrong", "correct"]
    assert outcomes(first.result()) == ["correct", "wrong"]
    assert first.done()


def test_from_many_threads_at_once(verifier):
    results = {}

    def grade(thread):
        answers = [f"{i + thread}.5" for i in range(40)]
        results[thread] = verifier.grade(boxed(*answers), [f"{40 + thread - i}.5" for i in range(40)])

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grades in results.values():
        assert [g.outcome is Outcome.CORRECT for g in grades] == [i == 20 for i in range(40)]
    assert len(results) == 6


def test_answers_that_never_end_and_strings_of_all_kinds():
    rtl, nul, surrogate = "\u202e5\u202c", "5\x00", "5\ud800"
    hostile = [
        "9^{9^{9^{9}}}",
        "(" * 60 + "1" + ")" * 60,
        "{" * 3000 + "}" * 3000,
        rtl,
        nul,
        surrogate,
        "x" * 1_000_000,
    ]
    answers = [text for i, bad in enumerate(hostile) for text in (bad, str(i), str(i + 1))]
    references = [text for i in range(len(hostile)) for text in ("5", str(i), str(i))]
    with MathVerifier(num_workers=2, timeout=1.0) as verifier:
        grades = verifier.grade(boxed(*answers), references)
        assert set(outcomes(grades[1::3])) == {"correct"}
        assert set(outcomes(grades[2::3])) == {"wrong"}
        assert outcomes(grades[:6:3]) == ["timeout", "timeout"]
        assert all(grade.reward == 0 for grade in grades[::3])
        assert verifier.counters["respawns"] == verifier.counters["timeout"] + verifier.counters["error"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_have_the_settings_and_their_own_workers(duplicate):
    with MathVerifier("nemo", 1, 7.0, None) as original:
        original.grade(["5"], ["5"])
        with duplicate(original) as other:
            assert (other.profile, other.num_workers, other.timeout, other.memory_limit) == ("nemo", 1, 7.0, None)
            assert other.counters["correct"] == 0
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
        thread = threading.Thread(target=lambda: out.extend(verifier.grade(["\\boxed{5}"] , ["5"])))
        thread.start()
        thread.join()
        # The thread that started the workers is gone; they are not.
        out += verifier.grade(["\\boxed{6}", "\\boxed{7}"], ["5", "7"])
        print([grade.outcome.value for grade in out], verifier.counters["respawns"])
        """,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["main", "['correct', 'wrong', 'correct'] 0"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_math_verify_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_script(
        tmp_path,
        r"""
        from hdpo.rewards import MathVerifier, VerifierError
        with MathVerifier() as verifier:
            grade = lambda: verifier.grade(["\\boxed{5.0}"], ["5"])
            for use in (verifier.start, grade, lambda: verifier.parseable(["5"])):
                try:
                    use()
                except VerifierError as error:
                    print(error)
            print(verifier.counters["respawns"])
        """,
    )
    line = "the answer checker's worker process does not start: ModuleNotFoundError: No module named 'math_verify'"
    assert done.stdout.splitlines() == [line] * 3 + ["0"], done.stderr
    assert done.stderr == ""
