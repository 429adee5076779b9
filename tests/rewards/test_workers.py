"""What happens around a worker: deadlines, deaths, replacement, clean-up. The workers obey commands here."""

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hdpo.rewards import VerifierError
from hdpo.rewards.workers import WorkerPool
from tests.rewards.helpers import boxed, child_processes, needs_proc, outcomes, runs
from tests.rewards.hostile_grader import is_socket


def grade(verifier, *answers):
    return verifier.grade(boxed(*answers), ["5"] * len(answers))


@pytest.mark.parametrize("command", ["hang", "ignore", "big", "sleep:60"])
def test_a_deadline_ends_that_answer_alone(hostile, command):
    verifier = hostile()
    grades = grade(verifier, "5", command, "6", "5 ")
    assert outcomes(grades) == ["correct", "timeout", "wrong", "correct"]
    assert grades[1].reward == 0
    assert grades[1].detail == "not graded within 0.5 s"
    assert verifier.respawns == 1
    verifier.close()
    assert verifier.respawns == 1, "the number outlives the workers"


@pytest.mark.parametrize(
    ("command", "detail", "respawns"),
    [
        ("exit", "the worker ended with exit status 3", 1),
        ("kill", f"the worker was killed by signal {int(signal.SIGSEGV)}", 1),
        ("memory", "out of memory", 1),
        ("swallowed", "GiB of memory", 1),
        ("raise:boom", "ValueError: boom", 0),
        ("raise:" + "x" * 1000, "x" * 180 + " ...", 0),
        ("leave", "SystemExit: bye", 0),
        ("alarm", "KeyboardInterrupt:", 0),
        ("recurse", "RecursionError: maximum recursion depth", 0),
    ],
)
def test_a_failure_is_an_error_of_that_answer_alone(hostile, command, detail, respawns):
    verifier = hostile(timeout=20.0, memory_limit=0.5)
    grades = grade(verifier, "5", command, "6", "5 ")
    assert outcomes(grades) == ["correct", "error", "wrong", "correct"]
    assert detail in grades[1].detail
    assert verifier.respawns == respawns


def test_a_library_that_prints_and_reads_does_not_disturb(hostile):
    grades = grade(hostile(timeout=20.0), "noise", "5", *(["stderr"] if sys.platform == "linux" else []))
    assert outcomes(grades)[:2] == ["wrong", "correct"]
    assert grades[-1].detail in ("", os.devnull), "what is printed fills no disk"


@pytest.mark.parametrize("text", ["\x00", "\ud800\udfff\udfff", "\u202e5", "∞\u2028\n.", '"\\"', "\U0001d7dd"])
def test_every_string_reaches_the_worker(hostile, text):
    grades = hostile(timeout=20.0).grade([f"\\boxed{{ord:{text}}}"], ["5"])
    assert grades[0].detail == ",".join(str(ord(character)) for character in text)


@needs_proc
def test_a_worker_cannot_run_code_in_the_trainer(hostile, tmp_path):
    verifier = hostile(timeout=20.0)
    grades = grade(verifier, f"forge:{tmp_path / 'made'}", "5")
    assert outcomes(grades) == ["error", "correct"]
    assert grades[0].detail.startswith("the worker's reply cannot be read: Expecting value")
    assert not (tmp_path / "made").exists()
    assert verifier.respawns == 1


def test_a_reply_larger_than_a_pipe(hostile):
    assert len(grade(hostile(timeout=20.0), "detail")[0].detail) == 1_000_000


def test_every_mixture_keeps_its_order(hostile):
    rng = random.Random(0)
    kinds = [("5", "correct"), ("6", "wrong"), ("exit", "error"), ("raise:", "error"), ("", "no_answer")]
    expected, answers = [], []
    for i in range(60):
        # A trailing number makes pairs distinct, so that none is graded once for all.
        command, outcome = rng.choices(kinds, [5, 5, 1, 2, 1])[0]
        answers.append(f"{command}:{i}" if command in ("6", "exit", "raise:") else command)
        expected.append(outcome)
    answers[20], expected[20] = "hang", "timeout"
    answers[41], expected[41] = "hang:2", "timeout"
    verifier = hostile(num_workers=3, timeout=1.0)
    assert outcomes(grade(verifier, *answers)) == expected
    assert verifier.respawns == 2 + sum(answer.startswith("exit") for answer in answers)


def test_workers_share_the_hanging_answers(hostile):
    verifier = hostile(num_workers=2)
    assert outcomes(grade(verifier, *(f"hang:{i}" for i in range(4)), "5")) == ["timeout"] * 4 + ["correct"]
    assert verifier.respawns == 4


def test_a_batch_keeps_its_budget(hostile):
    verifier = hostile(num_workers=2, batch_timeout=1.2)
    verifier.start()
    started = time.monotonic()
    grades = grade(verifier, *(f"hang:{i}" for i in range(40)), "5")
    assert time.monotonic() - started < 5, "40 deadlines of 0.5 s on 2 workers are 10 s"
    assert outcomes(grades) == ["timeout"] * 41
    assert grades[0].detail == "not graded within 0.5 s"
    assert grades[-1].detail == "the batch's time was used up"
    assert 4 <= verifier.respawns <= 6, "an answer that is not asked costs no worker"
    assert outcomes(grade(verifier, "5", "6")) == ["correct", "wrong"], "the next batch has its own"


def test_the_budget_ends_an_answer_before_its_deadline(hostile):
    verifier = hostile(timeout=30.0, batch_timeout=0.5)
    verifier.start()
    started = time.monotonic()
    assert outcomes(grade(verifier, "hang")) == ["timeout"]
    assert time.monotonic() - started < 15


def test_the_start_of_the_workers_is_not_on_the_budget(hostile, monkeypatch):
    monkeypatch.setenv("HOSTILE_START", "slow")
    assert outcomes(grade(hostile(batch_timeout=1.0), "5")) == ["correct"]


def test_no_budget_is_spent_on_references(hostile):
    assert hostile(batch_timeout=0.1).usable(["hang", "hang:2", "5"]) == [False, False, True]


def test_a_reference_that_hangs_or_crashes_is_not_usable(hostile):
    verifier = hostile()
    assert verifier.usable(["5", "hang", "exit", "raise:x", "6"]) == [True, False, False, False, True]


def test_a_worker_lost_between_answers_is_replaced_and_blames_nobody(hostile):
    verifier = hostile(timeout=20.0)
    pid = int(grade(verifier, "pid")[0].detail)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    grades = grade(verifier, "pid:again")
    assert outcomes(grades) == ["correct"]
    assert int(grades[0].detail) != pid
    assert verifier.respawns == 1


def test_a_stopped_worker_misses_its_deadline(hostile):
    verifier = hostile()
    os.kill(int(grade(verifier, "pid")[0].detail), signal.SIGSTOP)
    assert outcomes(grade(verifier, "x" * 1_000_000, "5")) == ["timeout", "correct"]


def test_workers_import_nothing_of_the_trainer_and_hash_alike(hostile):
    verifier = hostile(timeout=20.0)
    modules = grade(verifier, "modules")[0].detail.split(",")
    assert not {"torch", "lightning", "transformers", "numpy", "pytest"} & set(modules)
    assert grade(verifier, "hash")[0].detail == grade(hostile(timeout=20.0), "hash")[0].detail


def test_the_trainers_signals_are_left_alone(hostile):
    numbers = [signal.SIGALRM, signal.SIGINT, signal.SIGCHLD, signal.SIGTERM, signal.SIGPIPE]
    before = [signal.getsignal(number) for number in numbers]
    verifier = hostile()
    grade(verifier, "hang", "exit", "5")
    assert [signal.getsignal(number) for number in numbers] == before


def test_workers_that_do_not_start_are_one_error_and_not_a_loop(hostile, monkeypatch):
    monkeypatch.setenv("HOSTILE_START", "refuse")
    verifier = hostile(num_workers=2)
    with pytest.raises(VerifierError, match=r"does not start: RuntimeError: refuses to start"):
        verifier.start()
    with pytest.raises(VerifierError, match=r"refuses to start"):
        grade(verifier, "5")
    assert verifier.respawns == 0
    verifier.close()
    monkeypatch.delenv("HOSTILE_START")
    assert outcomes(grade(verifier, "5")) == ["correct"]


def test_a_worker_that_cannot_be_replaced_is_an_error(hostile, monkeypatch):
    monkeypatch.setattr("hdpo.rewards.workers._RESTART_PAUSE", 0.0)
    verifier = hostile(timeout=20.0)
    verifier.start()
    monkeypatch.setenv("HOSTILE_START", "refuse")
    with pytest.raises(VerifierError, match="refuses to start"):
        grade(verifier, "exit", "5")


def test_a_worker_that_fails_to_restart_once_is_tried_again(hostile, monkeypatch):
    verifier = hostile(timeout=20.0)
    verifier.start()
    monkeypatch.setenv("HOSTILE_START", "refuse")
    monkeypatch.setattr("hdpo.rewards.workers._RESTART_PAUSE", 0.0)
    attempts = []
    start_worker = WorkerPool._start_worker

    def third_time_lucky(pool, slot):
        attempts.append(slot)
        if len(attempts) == 3:
            monkeypatch.delenv("HOSTILE_START")
        return start_worker(pool, slot)

    monkeypatch.setattr(WorkerPool, "_start_worker", third_time_lucky)
    assert outcomes(grade(verifier, "exit", "5")) == ["error", "correct"]
    assert len(attempts) == 3
    assert verifier.respawns == 1


def test_close_fails_what_is_pending_and_may_be_repeated(hostile):
    verifier = hostile(timeout=60.0)
    verifier.start()
    pending = verifier.submit(boxed("", "hang", "5"), ["5", "5", "5"])
    assert not pending.done()
    while verifier._pool._tasks.qsize() > 1:  # until the worker is in the middle of the first
        time.sleep(0.01)
    started = time.monotonic()
    verifier.close()
    verifier.close()
    assert time.monotonic() - started < 30, "not after the answer's deadline"
    with pytest.raises(VerifierError, match="closed before all answers were graded"):
        pending.result()
    with pytest.raises(VerifierError, match="closed before all answers were graded"):
        pending.result()
    hostile().close()  # never started


def test_a_waiting_thread_is_released_by_close(hostile):
    verifier = hostile(timeout=60.0)
    errors = []

    def wait():
        try:
            grade(verifier, "hang")
        except VerifierError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while not (verifier._pool and verifier._pool._ready[0].done()):
        time.sleep(0.01)
    verifier.close()
    thread.join(timeout=20)
    assert errors == ["the verifier was closed before all answers were graded"]


@needs_proc
@pytest.mark.parametrize("end", ["close", "with", "garbage"])
def test_nothing_is_left(hostile, end):
    gc.collect()  # of the tests before
    before, files, threads = child_processes(), set(os.listdir("/proc/self/fd")), threading.active_count()
    verifier = hostile(num_workers=2)
    grade(verifier, "hang", "exit", "5", "memory")
    assert 1 <= len(child_processes() - before) <= 2  # the last one may still be on its way
    if end == "close":
        verifier.close()
    elif end == "with":
        with verifier:
            pass
    else:
        hostile.__closure__[0].cell_contents.clear()  # the fixture's own reference
        del verifier
        gc.collect()
    assert child_processes() == before
    assert set(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads


@needs_proc
@pytest.mark.parametrize("command", ["5", "hang"])
def test_workers_die_with_the_trainer(command, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from hostile_grader import HostileVerifier
        verifier = HostileVerifier(num_workers=1, timeout=1000.0)
        pid = verifier.grade(["\\\\boxed{{pid}}"], ["5"])[0].detail
        pending = verifier.submit(["\\\\boxed{{{command}}}"], ["5"])
        time.sleep(0.5)  # until the worker is in the middle of it
        print(pid, flush=True)
        time.sleep(1000)
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        assert runs(worker)
        trainer.kill()
    for _ in range(1000):
        if not runs(worker):
            break
        time.sleep(0.01)
    assert not runs(worker)


@needs_proc
def test_a_fork_has_workers_of_its_own(hostile):
    verifier = hostile(timeout=20.0)
    parents = grade(verifier, "pid")[0].detail
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.setitimer(signal.ITIMER_REAL, 60)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # should it hang, it ends
        try:
            own = grade(verifier, "pid")[0].detail
            verifier.close()
            os.write(writer, own.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        own = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert own.isdigit()
    assert own != parents
    # The child's close ended its own worker and left the parent's alone.
    assert not runs(int(own))
    assert grade(verifier, "pid:2")[0].detail == parents
    assert verifier.respawns == 0


@needs_proc
def test_a_fork_holds_none_of_the_parents_sockets(hostile):
    def sockets():
        return sum(is_socket(descriptor) for descriptor in os.listdir("/proc/self/fd"))

    before = sockets()
    verifier = hostile(timeout=20.0)
    grade(verifier, "5")
    assert sockets() == before + 1
    if (child := os.fork()) == 0:
        os._exit(sockets() - before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_workers_are_out_of_the_terminals_process_group(hostile):
    worker = int(grade(hostile(timeout=20.0), "pid")[0].detail)
    assert os.getpgid(worker) == worker


def test_the_trainers_own_size_is_not_the_workers(hostile):
    # Linux hands the peak of the process that forks on to the program that it executes.
    block = bytearray(b"x") * (5 << 28)
    verifier = hostile()
    assert outcomes(grade(verifier, "5", "6", "5 ")) == ["correct", "wrong", "correct"]
    assert verifier.respawns == 0
    del block
