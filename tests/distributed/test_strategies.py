"""One, two and three processes do the same training: real processes on gloo, under DDP and FSDP2."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from hdpo.callbacks.export import export_checkpoint
from hdpo.policy import Policy, PolicyConfig
from tests.distributed.driver import KEEP_ALL, PATTERNS
from tests.distributed.launch import results, run_scenarios

WORLDS = [("ddp", 2), ("fsdp2", 2), ("ddp", 3)]
SCENARIOS = [
    {"name": "drifting", "folder": "drifting", "steps": 6, "validate": True, "distillation": KEEP_ALL},
    # A reference and a frozen teacher: two more sharded policies, whose forward passes are collectives.
    {"name": "frozen", "folder": "frozen", "steps": 3, "module": {"teacher": "frozen", "kl_coef": 0.1}},
    # In the very first step, where the sampler is checked too, one rank alone samples privileged rollouts.
    {
        "name": "ema",
        "folder": "ema",
        "steps": 3,
        "module": {"teacher": "ema", "teacher_decay": 0.5},
        "patterns": ["CCMMSM", "MCSSSS", None],
        "distillation": KEEP_ALL,
    },
    # Two epochs of two minibatches: four updates a step.
    {
        "name": "updates",
        "folder": "updates",
        "steps": 2,
        "module": {"num_epochs": 2, "num_minibatches": 2},
        "distillation": KEEP_ALL,
    },
    # Cliffs, but no privileged rollout passes.
    {"name": "nothing", "folder": "nothing", "steps": 2, "distillation": {"success_reward": 2.0}},
]
NAMES = [s["name"] for s in SCENARIOS]
# The last rank is asked to end in its second step.
TERMINATED = {"name": "terminated", "folder": "terminated", "steps": 5, "terminate_at": 1}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """One process, which the others are compared with."""
    out = tmp_path_factory.mktemp("single") / "out"
    run_scenarios(out, "auto", 1, SCENARIOS, timeout=240)
    return out


@pytest.fixture(scope="session", params=WORLDS, ids=lambda p: f"{p[0]}-{p[1]}")
def several(request, tmp_path_factory):
    """The same scenarios in several processes."""
    strategy, world = request.param
    out = tmp_path_factory.mktemp(f"{strategy}{world}") / "out"
    run_scenarios(out, strategy, world, [*SCENARIOS, TERMINATED], timeout=240)
    return out, world


def distance(mine, reference):
    assert mine.keys() == reference.keys()
    assert mine
    total = sum((mine[k].double() - reference[k].double()).square().sum() for k in mine)
    return (total / sum(reference[k].double().square().sum() for k in mine)).sqrt().item()


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_parameters_and_metrics_do_not_depend_on_the_number_of_processes(single, several, name):
    out, world = several
    (expected,) = results(single, name, 1)
    ranks = results(out, name, world)
    # Three steps (or four updates): later the last bits of the weights differ, a sample flips, and the runs are two.
    for number, step in enumerate(expected["steps"][: 1 if name == "updates" else 3]):
        parts = [rank["steps"][number] for rank in ranks]
        for key in ("index", "rows", "rollouts", "cliffs", "distilled"):
            assert [x for part in parts for x in part[key]] == step[key], (number, key)
        assert torch.tensor([p["denominators"] for p in parts]).sum(0).tolist() == step["denominators"]
        assert distance(parts[0]["weights"], step["weights"]) < 1e-5, number
        for part in parts:
            assert part["metrics"] == pytest.approx(step["metrics"], rel=1e-3, abs=1e-5), number
    moved = distance(expected["steps"][1]["weights"], expected["steps"][0]["weights"])
    assert moved > 1e-4 or name == "nothing"
    if name == "ema":
        assert distance(ranks[0]["average"], expected["average"]) < 1e-5
        assert distance(expected["average"], expected["steps"][0]["weights"]) > 1e-5


def test_the_patterns_are_what_they_are_meant_to_be(single, several):
    out, world = several
    ranks = [rank["steps"] for rank in results(out, "drifting", world)]
    first, *others = ranks
    assert len(first) == len(PATTERNS)
    assert [any(rank[1]["cliffs"]) for rank in ranks] == [True] + [False] * (world - 1)
    assert first[1]["distilled"]
    assert not any(rank[1]["distilled"] for rank in others)
    assert all(any(rank[1]["signal"]) for rank in others)
    assert any(first[2]["signal"])
    assert first[2]["distilled"]
    assert not any(any(rank[2]["signal"]) or rank[2]["distilled"] for rank in others)
    assert all(any(rank[3]["signal"]) for rank in ranks)
    assert not any(rank[3]["distilled"] for rank in ranks)
    assert not any(any(rank[4]["signal"]) or rank[4]["distilled"] for rank in ranks)
    assert not any(any(rank[5]["signal"]) for rank in ranks)
    assert [bool(rank[5]["distilled"]) for rank in (first, ranks[-1])] == [False, True]
    (alone,) = results(single, "drifting", 1)
    for steps in (alone["steps"], first):
        weights = [step["weights"] for step in steps]
        assert distance(weights[4], weights[3]) == 0  # nothing at all
        assert distance(weights[5], weights[4]) > 0  # distillation alone


def test_the_filter_of_privileged_rollouts_is_at_work(single):
    (alone,) = results(single, "frozen", 1)
    kept = sum(step["metrics"]["privileged/kept"] for step in alone["steps"])
    assert 0 < kept < 2 * sum(sum(step["cliffs"]) for step in alone["steps"])
    (nothing,) = results(single, "nothing", 1)
    assert any(any(step["cliffs"]) for step in nothing["steps"])
    assert not any(step["distilled"] for step in nothing["steps"])


def test_a_maximum_is_the_largest_of_all_ranks(several):
    out, world = several
    steps = [rank["steps"][0] for rank in results(out, "drifting", world)]
    gaps = [step["gap"] for step in steps]
    assert min(gaps) < max(gaps)
    assert [step["merged_gap"] for step in steps] == [max(gaps)] * world


def test_gradients_are_averaged_once_a_step_after_the_same_number_of_passes(several):
    out, world = several
    ranks = [rank["steps"] for rank in results(out, "drifting", world)]
    for parts in zip(*ranks, strict=True):
        assert [part["syncs"] for part in parts] == [1] * world
        assert len({part["backwards"] for part in parts}) == 1
    assert max(part["backwards"] for part in ranks[0]) > 2
    updates = [rank["steps"] for rank in results(out, "updates", world)]
    assert [[step["syncs"] for step in steps] for steps in updates] == [[4, 4]] * world


def test_one_process_that_is_asked_to_end_saves_and_ends_with_the_others(several):
    out, world = several
    assert [len(rank["steps"]) for rank in results(out, "terminated", world)] == [2] * world
    (checkpoint,) = (out / "terminated").rglob("last.ckpt")
    content = torch.load(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint, weights_only=False)
    assert content["global_step"] == 2


def test_repeated_validation_problems_do_not_count(single, several):
    out, world = several
    (alone,) = results(single, "drifting", 1)
    for rank in results(out, "drifting", world):
        assert rank["validation"] == pytest.approx(alone["validation"], abs=1e-6)
    assert alone["validation"]["val/pass@2"] > 0
    # The weights agree to 1e-5 only, but before the first step they are the same.
    files = [(folder / "drifting/evaluations/step_000000.jsonl").read_text().splitlines() for folder in (single, out)]
    assert files[0] == files[1]
    rows = [json.loads(line)["row"] for line in files[1]]
    assert rows == list(range(7))


@pytest.fixture(scope="session", params=["ddp", "fsdp2"])
def interrupted(request, tmp_path_factory):
    """A straight run of four steps; and one that is killed in saving its fourth, and resumed from its second."""
    out = tmp_path_factory.mktemp(f"resume-{request.param}") / "out"
    run = {"adamw": True, "module": {"teacher": "ema"}, "checkpoint_every": 2, "steps": 4, "distillation": KEEP_ALL}
    straight = {**run, "name": "straight", "folder": "straight"}
    killed = {**run, "name": "killed", "folder": "killed", "kill_at": 4}
    run_scenarios(out, request.param, 2, [straight], timeout=240)
    run_scenarios(out, request.param, 2, [killed], timeout=240, expected=-signal.SIGKILL)
    (checkpoint,) = (out / "killed").rglob("last.ckpt")
    assert checkpoint.is_dir() == (request.param == "fsdp2")
    assert len(list(checkpoint.parent.iterdir())) > 1, "nothing was being written"
    resumed = {**run, "name": "resumed", "folder": "killed", "ckpt_path": str(checkpoint)}
    run_scenarios(out, request.param, 2, [resumed], timeout=240)
    return out, checkpoint


def test_a_run_killed_while_saving_resumes_exactly_from_the_checkpoint_before(interrupted):
    out, checkpoint = interrupted
    # The new checkpoint took the old one's place, and nothing else is left.
    assert {checkpoint, checkpoint.resolve()} == set(checkpoint.parent.iterdir())
    assert len(results(out, "resumed", 2)[0]["steps"]) == 2
    for mine, theirs in zip(results(out, "resumed", 2), results(out, "straight", 2), strict=True):
        assert [s["rollouts"] for s in mine["steps"]] == [s["rollouts"] for s in theirs["steps"][2:]]
        assert [s["metrics"] for s in mine["steps"]] == [s["metrics"] for s in theirs["steps"][2:]]
        for a, b in zip(mine["steps"], theirs["steps"][2:], strict=True):
            assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in b["weights"])
        assert all(torch.equal(mine["average"][k], theirs["average"][k]) for k in theirs["average"])


def test_a_checkpoint_exports_to_transformers(interrupted, tmp_path):
    out, checkpoint = interrupted
    export_checkpoint(PolicyConfig(path="pkg://hdpo.lab/policy"), checkpoint, tmp_path)
    policy = Policy.load(PolicyConfig(path="pkg://hdpo.lab/policy"))
    policy.load_state_dict(results(out, "resumed", 2)[0]["steps"][-1]["weights"])
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = policy.model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)
