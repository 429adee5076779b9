"""Rewards as functions: in workers and in process, from YAML and from Python, weights and the one threshold."""

import copy
import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from hdpo.errors import ConfigError
from hdpo.files import import_object
from hdpo.rewards import FunctionVerifier, Grade, MathVerifier, Outcome, Verifier
from tests.rewards.helpers import boxed, outcomes

MODULE = "my_rewards"


@pytest.fixture(autouse=True)
def module(monkeypatch):
    sys.modules.pop(MODULE, None)  # the README's files have one of that name
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("in_process", [False, True])
def test_a_named_function_grades(in_process):
    with FunctionVerifier(f"{MODULE}:exact", num_workers=1, in_process=in_process) as verifier:
        grades = verifier.grade(boxed("5", "6", "7"), ["5", "5", "7"], prompts=["?"] * 3)
        assert [(g.outcome.value, g.reward) for g in grades] == [("correct", 1.0), ("wrong", 0.0), ("correct", 1.0)]
        pids = verifier.grade([], [])
    assert pids == []


@pytest.mark.parametrize("in_process", [False, True])
def test_where_a_function_runs(in_process):
    with FunctionVerifier(f"{MODULE}:obey", threshold=0.0, num_workers=1, in_process=in_process) as verifier:
        (grade,) = verifier.grade(["pid"], ["5"])
        assert (grade.reward == os.getpid()) is in_process


@pytest.mark.parametrize("in_process", [False, True])
def test_columns_reach_the_function_that_names_them(in_process):
    functions = {"short": f"{MODULE}:short", "trl": f"{MODULE}:trl"}
    with FunctionVerifier(functions, num_workers=1, in_process=in_process) as verifier:
        grades = verifier.grade(["abc", "abcd"], ["", ""], prompts=["b", "x"], limit=[3, 3], other=[1, 2])
    # `trl` gets references, limit and other as keywords.
    assert [grade.detail for grade in grades] == ["short 1, trl 3", "short 0, trl 0"]


def test_the_reward_is_the_weighted_sum_and_success_one_threshold():
    functions = {"length": lambda completions: [len(c) / 10 for c in completions], "five": lambda completions: [
        0.5 if "5" in c else -1.0 for c in completions]}  # fmt: skip
    texts = ["5", "6", "it is 5", "it is 6"]

    def grade(**options):
        grades = FunctionVerifier(functions, in_process=True, **options).grade(texts, [""] * 4)
        return [round(g.reward, 9) for g in grades], [g.outcome.value == "correct" for g in grades]

    assert grade(success="five", threshold=0.5, weights={"length": 2.0, "five": 10.0}) == (
        [5.2, -9.8, 6.4, -8.6],
        [True, False, True, False],
    )
    assert grade(threshold=0.7) == ([0.6, -0.9, 1.2, -0.3], [False, False, True, True]), "the first decides; weights 1"
    assert grade(threshold=0.7, weights={"five": 0.0})[0] == [0.1, 0.1, 0.7, 0.7]


class Hesitant(Verifier):
    """Says what the completion names, with the reward that stands beside it, and notes when it starts and ends."""

    def __init__(self, log=None):
        self.log = log if log is not None else []

    def grade(self, completions, references, **columns):
        return [Grade(Outcome(name), float(reward), "why") for name, reward in map(str.split, completions)]

    def usable(self, references, **columns):
        return [reference != "odd" for reference in references]

    def start(self):
        self.log.append("start")

    def close(self):
        self.log.append("close")


def test_a_verifier_is_one_of_the_rewards():
    """By hand: 3 x the verifier's reward + 1/10 per character."""
    members = {"length": lambda completions: [len(c) / 10 for c in completions], "judge": Hesitant()}
    texts = ["correct 1", "wrong 0.25", "no_answer 0"]
    options = {"success": "judge", "weights": {"judge": 3.0}, "in_process": True}
    with FunctionVerifier(members, **options) as verifier:
        grades = verifier.grade(texts, ["?"] * 3)
    assert [grade.outcome.value for grade in grades] == ["correct", "wrong", "no_answer"]
    assert [grade.reward for grade in grades] == pytest.approx([3.9, 1.75, 1.1])
    assert [dict(grade.parts) for grade in grades] == [
        {"length": 0.9, "judge": 1.0}, {"length": 1.0, "judge": 0.25}, {"length": 1.1, "judge": 0.0}
    ]  # fmt: skip
    assert grades[1].detail == "length 1, judge 0.25"
    lower = FunctionVerifier(members, **(options | {"threshold": 0.25})).grade(texts, ["?"] * 3)
    assert outcomes(lower) == ["correct", "correct", "no_answer"], "the threshold is on the named reward"
    first = FunctionVerifier(members, in_process=True, threshold=1.0).grade(texts, ["?"] * 3)
    assert outcomes(first) == ["wrong", "correct", "correct"], "the first decides"


@pytest.mark.parametrize("in_process", [False, True])
def test_where_a_member_has_no_verdict_there_is_none(in_process):
    members = {"judge": Hesitant(), "obey": f"{MODULE}:obey"}
    texts = ["error 1", "timeout 1", "invalid_reference 1", "correct 1"]
    with FunctionVerifier(members, num_workers=1, in_process=in_process) as verifier:
        grades = verifier.grade(texts, ["5"] * 4)
    assert outcomes(grades) == ["error", "timeout", "invalid_reference", "correct"]
    assert [grade.reward for grade in grades] == [0, 0, 0, 2], "1 of each"
    assert grades[0] == Grade(Outcome.ERROR, 0.0, "judge: why")
    members = {"bad": lambda completions: [None for _ in completions], "judge": Hesitant()}
    (grade,) = FunctionVerifier(members, success="judge", in_process=True).grade(["correct 1"], ["5"])
    assert grade == Grade(Outcome.ERROR, 0.0, "bad nan"), "although the one that decides about success is sure"


def test_a_mathematical_verifier_beside_a_function_in_its_own_workers():
    members = {"correct": MathVerifier(num_workers=1), "short": f"{MODULE}:short"}
    with FunctionVerifier(members, weights={"short": 0.25}, num_workers=1) as verifier:
        verifier.start()
        pending = verifier.submit(boxed("0.5", "2", "x+x"), [r"\frac{1}{2}", "3", "2x"], limit=[20, 20, 1])
        assert [(g.outcome.value, g.reward) for g in pending.result()] == [
            ("correct", 1.25), ("wrong", 0.25), ("correct", 1.0)
        ]  # fmt: skip
        assert pending.done()
        assert verifier.usable(["5", "what?", None], limit=[1, 1, 1]) == [True, False, False]
        assert verifier.usable(["5", "5"], limit=[None, 1]) == [False, True]
        with copy.deepcopy(verifier) as other:
            assert outcomes(other.grade(boxed("5"), ["5"], limit=[1])) == ["correct"]
        assert verifier.identity() == copy.deepcopy(verifier).identity()
    nemo = FunctionVerifier(members | {"correct": MathVerifier("nemo")}, weights={"short": 0.25}, num_workers=1)
    assert verifier.identity() != nemo.identity(), "the data are prepared anew for another member"


def test_members_start_and_end_with_the_whole():
    members = {"judge": Hesitant(), "other": Hesitant()}
    with FunctionVerifier(members) as verifier:
        verifier.start()
        assert outcomes(verifier.grade(["correct 1"], ["5"])) == ["correct"], "no function, and so no worker"
        assert verifier.usable(["odd", "even"]) == [False, True]
    assert [member.log for member in members.values()] == [["start", "close"]] * 2


def test_what_is_no_reward_is_an_error_of_that_answer_alone():
    with FunctionVerifier(f"{MODULE}:obey", num_workers=2, timeout=1.0) as verifier:
        grades = verifier.grade(["5", "hang", "raise", "none", "nan", "short", "6"], ["5"] * 7)
        assert outcomes(grades) == ["correct", "timeout", "error", "error", "error", "error", "correct"]
        assert [g.detail for g in grades[2:6]] == [
            "RuntimeError: boom",
            "reward nan",
            "reward nan",
            "ValueError: reward: got 0 rewards for 1 completions",
        ]
        assert all(grade.reward == 0 for grade in grades[1:6])
        assert verifier.respawns == 1


def test_in_process_an_exception_is_the_callers():
    verifier = FunctionVerifier(f"{MODULE}:obey", in_process=True)
    with pytest.raises(RuntimeError, match="boom"):
        verifier.grade(["raise"], ["5"])
    assert outcomes(verifier.grade(["nan", "5"], ["5", "5"])) == ["error", "correct"]
    with pytest.raises(ValueError, match="reward: got 2 rewards for 3 completions"):
        verifier.grade(["short", "5", "6"], ["5"] * 3)


def test_a_function_object_runs_in_workers_if_they_can_import_it():
    function = import_object("reward", f"{MODULE}:exact")
    with FunctionVerifier(function, num_workers=1) as verifier:
        with copy.deepcopy(verifier) as other:
            assert outcomes(other.grade(boxed("5"), ["5"])) == ["correct"]
        assert outcomes(verifier.grade(boxed("6"), ["5"])) == ["wrong"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "nothing"}, "verifier.function: 'nothing' is not of the form package.module:name"),
        ({"function": "no_such_module:f"}, "verifier.function: no_such_module:f: .*No module named 'no_such_module'"),
        ({"function": f"{MODULE}:f"}, f"verifier.function: {MODULE}:f: the module {MODULE} has no 'f'"),
        ({"function": lambda **_: []}, r"workers cannot import .*<lambda>: move it to a module, or set in_process"),
        ({"function": f"{MODULE}:exact", "success": "fast"}, "verifier.success .* must be one of reward, got 'fast'"),
        ({"function": {"a": f"{MODULE}:exact"}, "weights": {"b": 1.0}}, "weights must be one of a, got 'b'"),
        ({"function": {}}, "must be one of , got ''"),
        ({"function": "hdpo.rewards:MathVerifier"}, r"is no function: .* as {class_path: hdpo.rewards.*MathVerifier}"),
        ({"function": f"{MODULE}:exact", "timeout": 0}, "verifier.timeout must be a positive number, got 0"),
    ],
)
def test_mistakes_are_told_at_once(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FunctionVerifier(**arguments)


@pytest.mark.parametrize("in_process", [False, True])
def test_a_missing_column_is_told(in_process):
    verifier = FunctionVerifier(f"{MODULE}:short", in_process=in_process)
    with pytest.raises(ConfigError, match=r"needs the column 'limit': name it in data.source.columns.extra"):
        verifier.grade(["5"], ["5"], prompts=["?"])


def test_a_problem_is_usable_if_it_has_what_the_functions_name():
    both = FunctionVerifier({"short": f"{MODULE}:short", "exact": f"{MODULE}:exact"})
    assert both.usable(["5", None, "", "5", "5"], limit=[3, 3, 3, None, 0]) == [True, False, False, False, True]
    only_limit = FunctionVerifier(f"{MODULE}:short")
    assert only_limit.usable([None, None, None], limit=[[1], [], 2]) == [True, False, True]
    assert only_limit.usable([]) == []


def test_identity_holds_the_functions_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "changing_rewards.py"
    identities = []
    for code in ("return [1.0]", "return [1.0]", "return [2.0]"):
        file.write_text(f"def reward(completions): {code}\n")
        sys.modules.pop("changing_rewards", None)
        identities.append(FunctionVerifier("changing_rewards:reward").identity())
    assert identities[0] == identities[1] != identities[2]
    assert identities[0] == json.loads(json.dumps(identities[0]))
    assert identities[2] != FunctionVerifier("changing_rewards:reward", threshold=0.5).identity()
    assert identities[2] == FunctionVerifier("changing_rewards:reward", num_workers=5).identity()


def test_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent(f"""
        verifier:
          class_path: hdpo.rewards.FunctionVerifier
          init_args:
            function: {{correct: {MODULE}:exact, short: {MODULE}:short}}
            weights: {{short: 0.5}}
            success: correct
            threshold: 1.0
            in_process: false
            num_workers: 1
        """)
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--verifier", type=Verifier)
    with parser.instantiate(parser.parse_args(["--config", str(tmp_path / "config.yaml")])).verifier as verifier:
        grades = verifier.grade(boxed("5", "6"), ["5", "5"], limit=[20, 20])
    assert grades == [
        Grade(Outcome.CORRECT, 1.5, "correct 1, short 1", {"correct": 1.0, "short": 1.0}),
        Grade(Outcome.WRONG, 0.5, "correct 0, short 1", {"correct": 0.0, "short": 1.0}),
    ]
    mixed = """
        verifier:
          class_path: hdpo.rewards.FunctionVerifier
          init_args:
            function:
              correct: {class_path: hdpo.rewards.MathVerifier, init_args: {num_workers: 1, profile: nemo}}
              short: my_rewards:short
    """
    (tmp_path / "mixed.yaml").write_text(textwrap.dedent(mixed))
    config = parser.parse_args(["--config", str(tmp_path / "mixed.yaml")])
    (tmp_path / "again.yaml").write_text(parser.dump(config))
    assert parser.parse_args(["--config", str(tmp_path / "again.yaml")]).verifier == config.verifier, "for a resume"
    verifier = parser.instantiate(config).verifier
    assert list(verifier.function) == ["correct", "short"]
    assert (type(verifier.verifiers["correct"]), verifier.verifiers["correct"].profile) == (MathVerifier, "nemo")
    assert verifier.functions == {"short": "my_rewards:short"}
    arguments = ["--verifier=FunctionVerifier", f"--verifier.function={MODULE}:exact", "--verifier.timeout=2"]
    verifier = parser.instantiate(parser.parse_args(arguments)).verifier
    assert (verifier.functions, verifier.timeout) == ({"reward": f"{MODULE}:exact"}, 2.0)


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path, monkeypatch):
    """The user's module, named in YAML alone, grades a run of the laboratory."""
    from hdpo.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "our_rewards.py").write_text(
        "def even(completions, references):\n    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]\n"
    )
    (tmp_path / "overlay.yaml").write_text(
        textwrap.dedent("""
        model:
          pass_k: [1, 2]
          verifier:
            class_path: hdpo.rewards.FunctionVerifier
            init_args: {function: "our_rewards:even", threshold: 1.0, num_workers: 1}
        data: {selection: {num_train_problems: 16, num_val_problems: 6}, prompts_per_step: 4}
        rollouts: {num_generations: 4, num_val_samples: 2}
        samples: {every_n_steps: 1}
        trainer: {max_steps: 1, enable_progress_bar: false}
        """)
    )
    lab = Path(__file__).parents[2] / "configs" / "lab.yaml"
    assert main(["fit", "--config", str(lab), "--config", "overlay.yaml"]) == 0
    samples = (tmp_path / "runs" / "lab" / "version_0" / "samples.jsonl").read_text().splitlines()
    records = [sample for line in samples for sample in _graded(json.loads(line))]
    assert len(records) >= 6
    assert {outcome for _, outcome in records} == {"correct", "wrong"}
    assert all((outcome == "correct") == (sum(map(ord, text)) % 2 == 0) for text, outcome in records)


def _graded(value):
    """Every (text, outcome) of a sample's record."""
    if isinstance(value, dict):
        if {"text", "outcome"} <= value.keys():
            yield value["text"], value["outcome"]
        for inner in value.values():
            yield from _graded(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _graded(inner)
