from pathlib import Path

import pytest

from tests.rewards.hostile_grader import HostileVerifier


@pytest.fixture
def hostile(monkeypatch):
    """A factory of verifiers whose workers obey commands; all are closed after the test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = []

    def make(num_workers=1, timeout=0.5, **kwargs):
        made.append(HostileVerifier(num_workers=num_workers, timeout=timeout, **kwargs))
        return made[-1]

    yield make
    for verifier in made:
        verifier.close()
