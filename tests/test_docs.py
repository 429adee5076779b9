"""The pages under docs/ speak of keys, metrics and commands that exist."""

import re
from pathlib import Path

import pytest
import yaml

from hdpo.cli import main
from hdpo.rewards import Outcome

ROOT = Path(__file__).parent.parent
TRL = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")
WATCH = (ROOT / "docs" / "what-to-watch.md").read_text(encoding="utf-8")
SECTIONS = r"model|data|rollouts|cliffs|distillation|trainer|checkpoint|progress|samples|seed_everything"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everything that can be set, with the engine and the loss that the pages speak of."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
        main(["fit", "--config", "hdpo", "--config", "engine/vllm", "--print_config"])
    return yaml.safe_load(printed.getvalue())


def keys(text):
    return re.findall(rf"`((?:{SECTIONS})(?:\.\w+)*)`", text)


@pytest.mark.parametrize("page", [TRL, WATCH], ids=["trl", "watch"])
def test_every_key_exists(config, page):
    found = keys(page)
    assert found
    for key in found:
        part = config
        for name in key.split("."):
            assert name in part, key
            part = part[name]


def test_each_row_names_a_key_or_says_that_there_is_none():
    rows = [line.split("|")[1:4] for line in TRL.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    for theirs, ours, _ in rows:
        assert keys(ours) or "--resume" in ours or "top_p" in theirs, theirs


def test_every_metric_is_logged_somewhere():
    names = re.findall(
        r"`((?:val|cliff|rollout|privileged|loss|sampler|optim|time|speed|replay|verifier)/[\w@]+)`", WATCH
    )
    assert len(set(names)) >= 20
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hdpo").rglob("*.py"))
    outcomes = {f"verifier/{outcome.value}" for outcome in Outcome}
    for name in names:
        kind, _, rest = name.partition("/")
        if kind == "verifier":
            assert name in outcomes, name
        elif kind == "time" and rest != "step":
            assert f'"{rest}"' in source, name
        elif kind == "val":
            assert re.fullmatch(r"pass@\d+|greedy_accuracy", rest), name
        elif kind in ("cliff", "privileged", "replay", "speed"):  # of these some are added in a loop over names
            assert any(
                text in source for text in (f'"{rest}"', f"'{rest}'", f'"{name}"', f'"{kind}{{of}}/{rest}{{suffix}}"')
            ), name
        elif rest in {outcome.value for outcome in Outcome}:
            assert kind == "rollout", name
        else:
            assert f'"{name}' in source, name


def test_the_named_overlays_ship():
    for name in re.findall(r"--config ([\w/]+)`", TRL):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name
