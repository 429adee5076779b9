"""The pages under docs/ speak of keys, metrics and commands that exist."""

import math
import os
import re
import subprocess
import sys
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


@pytest.mark.slow  # counts the parameters of 32B
def test_the_table_of_scale_is_the_scripts():
    script = [sys.executable, str(ROOT / "benchmarks" / "scale.py")]
    done = subprocess.run(
        script, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert f"\n{done.stdout}\n" in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    # 7B, written out: 3,072 reads of 15.2 GB, and 64 completions' keys and values of 28 layers of 512.
    reads = 3072 * 2 * 7_615_616_512
    mean, share = 1000.0, math.exp(-3.072)
    tokens = sum(math.exp(-t / mean) * (200 + t) for t in range(3072))  # each token reads what is before it
    cache = 64 * tokens * 2 * 2 * 28 * 512
    row = next(line.split("|") for line in done.stdout.splitlines() if "7B | 8 " in line)
    assert float(row[4]) == pytest.approx((reads + cache) / 3.35e12, abs=0.06)
    trained = 3.2 * 16 * (200 + mean * (1 - share)) + 3.2 * (200 + mean * (1 - math.exp(-2.048)))
    assert float(row[7]) == pytest.approx(6 * 7_615_616_512 * trained / (0.28 * 989e12), abs=0.06)
