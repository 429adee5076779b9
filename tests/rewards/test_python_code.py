"""Programs against unit tests: what passes, what is wrong, and what a program cannot do."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdpo.errors import ConfigError
from hdpo.rewards import PythonCodeVerifier, program_main
from hdpo.rewards.python_code import PythonCodeGrader
from tests.rewards.helpers import child_processes, needs_proc, outcomes, runs

TESTS = ["assert f(2) == 4", "assert f(3) == 6"]
RIGHT = "def f(x):\n    return 2 * x\n"


LEAVE = f"import runpy; print(runpy.run_path({program_main.__file__!r})['leave_network']())"
NAMESPACES = subprocess.check_output([sys.executable, "-I", "-c", LEAVE], text=True).strip() == "True"


@pytest.fixture(scope="module")
def verifier():
    with PythonCodeVerifier(program_timeout=5.0) as verifier:
        yield verifier


def fenced(program):
    return f"Let me think.\n```python\n{program}\n```\nThat is it."


def grade(verifier, *programs, tests=TESTS):
    return verifier.grade([fenced(p) for p in programs], ["2x"] * len(programs), tests=[tests] * len(programs))


def test_programs_that_pass(verifier):
    programs = [
        RIGHT,
        "import math, itertools, collections, re, random\n" + RIGHT,
        "import numpy\ndef f(x):\n    return int(numpy.array([x]).sum() * 2)",
        "print('x' * 1_000_000)\n" + RIGHT,
        RIGHT + "if __name__ == '__main__':\n    f(input())",
        "from functools import cache\n@cache\ndef f(x):\n    return x and 2 + f(x - 1)",
    ]
    assert outcomes(grade(verifier, *programs)) == ["correct"] * len(programs)
    assert outcomes(grade(verifier, RIGHT, tests="\n".join(TESTS))) == ["correct"]


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("def f(x):\n    return x + 2", "AssertionError"),  # the first test passes
        ("def f(x)", "SyntaxError"),
        ("def g(x):\n    return 2 * x", "NameError"),
        ("def f(x):\n    return 1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = bytearray(3 << 30)\n" + RIGHT, "MemoryError"),  # its own limit is 2 GiB, the worker's 4
        ("import program_main\n" + RIGHT, "ModuleNotFoundError"),
        ("def f(x):\n    return f(x)", "RecursionError"),
        ("f = input", "EOFError"),
        ("f = '\ud800'", "UnicodeEncodeError"),
        ("f = '\x00'", "SyntaxError"),
    ],
)
def test_programs_that_are_wrong(verifier, program, detail):
    (result,) = grade(verifier, program)
    assert (result.outcome.value, result.reward) == ("wrong", 0.0)
    assert detail in result.detail


def test_a_program_starts_in_an_empty_folder_and_without_the_network(verifier):
    tests = "import os\nassert os.listdir() == []\n"
    if NAMESPACES:
        tests += f"assert os.readlink('/proc/self/ns/net') != {os.readlink('/proc/self/ns/net')!r}"
    assert grade(verifier, RIGHT, tests=tests)[0].detail == ""


def test_an_early_exit_and_a_forged_reply_pass_no_test(verifier):
    leave = "import os\nos._exit(0)"
    forged = 'import os\nfor fd in range(1, 20):\n    try:\n        os.write(fd, b\'["x", true, ""]\\n\')\n'
    forged += "    except OSError:\n        pass\n"
    grades = grade(verifier, leave, forged + leave, forged + RIGHT)
    assert outcomes(grades) == ["wrong"] * 3
    assert {result.detail for result in grades} == {"the program ended before its tests"}


@pytest.mark.parametrize(
    ("action", "event"),
    [
        ("import socket; socket.socket()", "socket.__new__"),
        ("import socket; socket.getaddrinfo('localhost', 80)", "socket.getaddrinfo"),
        ("import os; os.fork()", "os.fork"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import os; os.system('true')", "os.system"),
        ("import os; os.kill(os.getppid(), 9)", "os.kill"),
        ("import os; os.remove({victim!r})", "os.remove"),
        ("import os; os.rename({victim!r}, 'x')", "os.rename"),
        ("import shutil; shutil.rmtree({folder!r})", "shutil.rmtree"),
        ("open({victim!r}, 'w')", "open"),
        ("import os; os.open({victim!r}, os.O_RDWR)", "open"),
        ("open({new!r}, 'x')", "open"),
        ("import ctypes; ctypes.CDLL(None)", "ctypes.dlopen"),
    ],
)
def test_what_a_program_cannot_do(verifier, tmp_path, action, event):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    action = action.format(victim=str(victim), folder=str(tmp_path), new=str(tmp_path / "new"))
    (result,) = grade(verifier, f"{action}\n{RIGHT}")
    assert (result.outcome.value, result.detail) == (
        "wrong",
        f"PermissionError: {event} is not allowed in a graded program",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "whole"


@pytest.mark.skipif(not NAMESPACES, reason="no network namespaces here")
def test_without_the_hook_there_is_still_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection({server.getsockname()!r}, 5)"
        done = subprocess.run([sys.executable, "-I", "-c", f"{LEAVE}\n{connect}"], capture_output=True, check=False)
    assert b"Network is unreachable" in done.stderr


def test_where_there_is_no_namespace_a_warning_says_so(monkeypatch, caplog):
    verifier = PythonCodeVerifier()
    verifier._grader()
    quiet = list(caplog.messages)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    verifier._grader()
    assert [*quiet, *caplog.messages][-1].startswith("no network namespace here: only Python's audit hook")


@needs_proc
def test_a_program_that_overruns_is_killed_and_is_wrong():
    before = child_processes()
    grader = PythonCodeGrader(program_timeout=0.5, program_memory=1.0)
    for program in ("while True: pass", "import time; time.sleep(60)", "import signal\nsignal.pause()"):
        started = time.monotonic()
        result = grader.grade(program, TESTS[0])
        assert (result.outcome.value, result.detail) == ("wrong", "not finished within 0.5 s")
        assert time.monotonic() - started < 5
    assert child_processes() == before


@needs_proc
def test_a_program_dies_with_its_worker(tmp_path):
    with PythonCodeVerifier(program_timeout=100.0, num_workers=1) as verifier:
        verifier.start()
        (worker,) = child_processes() & {w.process.pid for w in verifier._pool._workers.values()}
        pending = verifier.submit([fenced("import time; time.sleep(100)")], [""], tests=TESTS[:1])
        children = Path(f"/proc/{worker}/task/{worker}/children")
        while not (program := children.read_text().split()):
            time.sleep(0.01)
        time.sleep(0.5)  # until the program runs
        os.kill(worker, 9)
        assert outcomes(pending.result()) == ["error"]
        for _ in range(500):
            if not runs(int(program[0])):
                break
            time.sleep(0.01)
        assert not runs(int(program[0]))


def test_completions_without_code_and_problems_without_tests(verifier):
    completions = [
        "no code",
        "`f`",
        fenced(RIGHT),
        fenced("old = 1") + fenced(RIGHT),
        f"```\n{RIGHT}```",
        fenced(RIGHT),
    ]
    tests = [TESTS, TESTS, [], TESTS, TESTS, "assert f("]
    expected = ["no_answer", "no_answer", "invalid_reference", "correct", "correct", "invalid_reference"]
    assert outcomes(verifier.grade(completions, [""] * 6, tests=tests)) == expected
    tests = [TESTS, TESTS[0], [], "", None, "assert f(", "# nothing", "assert f('\x00')", "(" * 5000]
    assert verifier.usable([None] * 9, tests=tests) == [True, True] + [False] * 7


@pytest.mark.parametrize(
    "completion",
    [
        f"It prints:\n```text\n3\n```\nThe program:\n{fenced(RIGHT)}",
        f"{fenced(RIGHT)}\nIt prints:\n```text\n3\n```\n",
        f"```bash\npip install x\n```\n```python\n{RIGHT}```",
        f"```Python\n{RIGHT}```\n",
        f"``` python3 \n{RIGHT}```",
        fenced(RIGHT).replace("\n", "\r\n"),
        f"{fenced(RIGHT)}\nIt prints:\n```\n3\n```\n",
        f"```\npip install x\n```\n{fenced(RIGHT)}",
    ],
    ids=["text before", "text after", "bash before", "capital", "python3", "crlf", "unnamed after", "unnamed before"],
)
def test_blocks_of_other_languages_are_not_the_program(verifier, completion):
    assert outcomes(verifier.grade([completion], [""], tests=[TESTS])) == ["correct"]
    assert outcomes(verifier.grade([completion.replace("2 *", "3 *")], [""], tests=[TESTS])) == ["wrong"]


def test_a_program_in_another_language_is_none(verifier):
    assert outcomes(verifier.grade(["```cpp\nint x;\n```"], [""], tests=[TESTS])) == ["no_answer"]


def test_tests_in_the_reference():
    with PythonCodeVerifier(tests=None, num_workers=1) as verifier:
        assert verifier.usable(["assert f(2) == 4", "", None]) == [True, False, False]
        assert outcomes(verifier.grade([fenced(RIGHT)] * 2, ["assert f(2) == 4", "assert f(2) == 5"])) == [
            "correct",
            "wrong",
        ]


def test_mistakes(verifier):
    with pytest.raises(
        ConfigError, match=r"verifier.tests: there is no column 'tests': name it in data.source.columns"
    ):
        verifier.grade(["x"], ["y"], test=["z"])
    with pytest.raises(ConfigError, match=r"verifier.program_timeout must be a positive number, got 0"):
        PythonCodeVerifier(program_timeout=0)
    with pytest.raises(ConfigError, match=r"verifier.program_memory must be a number of at least 0.1, got 0.01"):
        PythonCodeVerifier(program_memory=0.01)


def test_identity_holds_the_limits():
    identity = PythonCodeVerifier().identity()
    assert identity["settings"].items() >= {"tests": "tests", "program_timeout": 5.0, "program_memory": 2.0}.items()
    assert identity != PythonCodeVerifier(program_timeout=6.0).identity()
    assert identity == PythonCodeVerifier(num_workers=6).identity()
