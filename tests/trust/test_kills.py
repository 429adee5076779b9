"""A tenth of what ``python -m tests.trust.kills`` does: every moment once, each signal."""

import pytest

from tests.trust.kills import Kill, outcome, prepare, run, try_kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHOSEN = [
    Kill("SIGKILL", "step", 3),
    Kill("SIGKILL", "saving", 2),
    Kill("SIGKILL", "saving", 6),
    Kill("SIGTERM", "evaluating", 4),
    Kill("SIGKILL", "evaluating", 8),
    Kill("SIGINT", "recording", 8),
    Kill("SIGKILL", "exporting", 8),
    Kill("SIGKILL", "anywhere", 0, 1.0),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "straight"
    assert run(folder, prepare(folder, None)) == 0, (folder / "log.txt").read_text()[-2000:]
    return outcome(folder)


@pytest.mark.parametrize("kill", CHOSEN, ids=lambda k: f"{k.number}-{k.moment}-{k.step}")
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, straight, kill):
    assert try_kill(tmp_path / "run", kill, straight) == []
