import json
import subprocess
import sys
from pathlib import Path

import pytest

from hdpo.errors import ConfigError
from hdpo.rewards import Grade, MathVerifier, Outcome, Verifier
from hdpo.rewards.base import check_pairs


def test_outcomes_are_strings():
    assert Outcome.NO_ANSWER == "no_answer"
    assert f"verifier/{Outcome.TIMEOUT}" == "verifier/timeout"
    assert {o.value for o in Outcome} == {"correct", "wrong", "no_answer", "timeout", "error", "invalid_reference"}


def test_a_verifier_of_ones_own_needs_two_methods(monkeypatch):
    class Length(Verifier):
        def __init__(self, scale=10):
            self.scale = scale
            self._graded = 0
            self.function = len

        def grade(self, completions, references, *, bonus, **columns):
            return [Grade(Outcome.CORRECT, len(c) / self.scale + b) for c, b in zip(completions, bonus, strict=True)]

        def usable(self, references, **columns):
            return [r is not None for r in references]

    with Length() as verifier:
        verifier.start()
        pending = verifier.submit(["12345"], [""], prompts=["?"], bonus=[1])
        assert pending.done()
        assert pending.result() == [Grade(Outcome.CORRECT, 1.5)]
    identity = verifier.identity()
    assert identity["class"].endswith("Length")
    assert identity["settings"] == {"scale": 10}
    assert json.loads(json.dumps(identity)) == identity == Length().identity() != Length(5).identity()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == Path(__file__) else b""))
    assert identity != Length().identity(), "other code, other verdicts"


@pytest.mark.parametrize(
    ("completions", "references", "error", "message"),
    [
        (["a"], [], ValueError, "got 1 completions and 0 references: each needs its own"),
        ("a", ["b"], TypeError, "completions must be a sequence of strings"),
        (["a"], [None], TypeError, r"references\[0\] must be a string, got NoneType"),
        (["a", 5], ["b", "c"], TypeError, r"completions\[1\] must be a string, got int"),
    ],
)
def test_bad_pairs(completions, references, error, message):
    with pytest.raises(error, match=message):
        check_pairs(completions, references)
    with pytest.raises(error, match=message):
        MathVerifier().grade(completions, references)


def test_a_column_needs_a_value_per_completion():
    with pytest.raises(ValueError, match="got 2 completions and 1 tests: each needs its own"):
        MathVerifier().grade(["a", "b"], ["c", "d"], prompts=["e", "f"], tests=["g"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "lenient"}, "verifier.profile must be one of strict, nemo, got 'lenient'"),
        ({"num_workers": 0}, "verifier.num_workers must be a number of at least 1, got 0"),
        ({"timeout": 0}, "verifier.timeout must be a positive number, got 0"),
        ({"timeout": float("inf")}, "verifier.timeout must be a positive number, got inf"),
        ({"batch_timeout": 0}, "verifier.batch_timeout must be a positive number, got 0"),
        ({"memory_limit": 0.1}, "verifier.memory_limit must be a number of at least 0.5, got 0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MathVerifier(**arguments)


def test_importing_the_package_is_light():
    code = (
        "import hdpo.rewards, sys; print([m for m in ('sympy', 'math_verify', 'torch', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_verifier_can_be_named_in_a_config():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--verifier", type=Verifier)
    config = parser.parse_args(["--verifier=MathVerifier", "--verifier.profile=nemo", "--verifier.timeout=2"])
    verifier = parser.instantiate(config).verifier
    assert isinstance(verifier, MathVerifier)
    assert (verifier.profile, verifier.timeout, verifier.num_workers) == ("nemo", 2.0, 2)
