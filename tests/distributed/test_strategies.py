"""One, two and three processes do the same training: real processes on gloo, under DDP and FSDP2."""

import signal
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from hdpo.checkpoints import read_header, saved_checkpoints
from hdpo.commands.export import export_checkpoint
from hdpo.evaluation.records import read_records
from hdpo.policy import Policy, PolicyConfig
from tests.distributed.driver import KEEP_ALL, PATTERNS
from tests.distributed.launch import results, run_scenarios
from tests.helpers.tolerances import F32, of_sum

LAB = PolicyConfig(path="pkg://hdpo.lab/policy")


def tolerance(world, num_updates):
    """Of the length of the way: what two runs may be apart after so many updates.

    All that a rank's share could round in its own way is float64. Two ranks double the loss and halve the sum of its
    gradients, which is exact. Three do not, and the gradients of the policy's norms are float32; each update, far from
    any minimum, enlarges the errors of those before about fivefold.
    """
    return F32 if world == 2 else 16 * F32 * 8**num_updates


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
    # Two epochs of two minibatches: four updates per step.
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
# In float64, so that no rounding lets a sample flip; see TOLERANCE.
SCENARIOS = [{**scenario, "dtype": "float64"} for scenario in SCENARIOS]
# The last rank is asked to end in its second step.
TERMINATED = {"name": "terminated", "folder": "terminated", "steps": 5, "terminate_at": 1}
# The last rank alone has a gradient that is not finite in the second step.
NOT_FINITE = {"name": "not_finite", "folder": "not_finite", "steps": 3, "break": "nan", "break_at": 1, "adamw": True}

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
    run_scenarios(out, strategy, world, [*SCENARIOS, NOT_FINITE, TERMINATED], timeout=240)
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
    before, way = Policy.load(LAB).double().state_dict(), 0.0
    for number, step in enumerate(expected["steps"]):
        parts = [rank["steps"][number] for rank in ranks]
        allowed = tolerance(world, (number + 1) * (4 if name == "updates" else 1))
        way += distance(step["weights"], before)
        before = step["weights"]
        for key in ("index", "rows", "rollouts", "cliffs", "distilled"):
            assert [x for part in parts for x in part[key]] == step[key], (number, key)
        assert torch.tensor([p["denominators"] for p in parts]).sum(0).tolist() == step["denominators"]
        assert distance(parts[0]["weights"], step["weights"]) <= allowed * way, number
        for part in parts:
            assert part["metrics"] == pytest.approx(step["metrics"], rel=allowed, abs=allowed), number
    assert way > 1e-3 or name == "nothing"
    if name == "ema":
        assert distance(ranks[0]["average"], expected["average"]) < allowed * way
        assert distance(expected["average"], expected["steps"][0]["weights"]) > 0.1 * way


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
    # In float32: in float64 there is no gap.
    steps = [rank["steps"][0] for rank in results(out, "terminated", world)]
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


def test_one_process_that_is_asked_to_end_saves_and_ends_with_the_others_and_the_run_goes_on(several):
    out, world = several
    assert [len(rank["steps"]) for rank in results(out, "terminated", world)] == [2] * world
    (checkpoint,) = (out / "terminated").rglob("last.ckpt")
    content = torch.load(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint, weights_only=False)
    assert content["global_step"] == 2
    rest = {**TERMINATED, "name": "rest", "ckpt_path": str(checkpoint)}
    del rest["terminate_at"]
    run_scenarios(out, "fsdp2" if checkpoint.is_dir() else "ddp", world, [rest], timeout=120)
    assert [len(rank["steps"]) for rank in results(out, "rest", world)] == [3] * world
    assert read_header("", checkpoint).step == 5


def test_what_is_not_finite_on_one_rank_is_skipped_on_all_of_them(several):
    out, world = several
    ranks = [rank["steps"] for rank in results(out, "not_finite", world)]
    for steps in ranks:
        assert [step["metrics"]["optim/skipped"] for step in steps] == [0, 1, 0]
    first = ranks[0]
    assert distance(first[1]["weights"], first[0]["weights"]) == 0
    assert distance(first[2]["weights"], first[1]["weights"]) > 1e-5
    assert all(w.isfinite().all() for w in first[2]["weights"].values())
    files = sorted(p.name for p in (out / "not_finite/skipped").iterdir())
    assert files == [f"step_000001.rank{rank}.pt" for rank in range(world)]
    (checkpoint,) = (out / "not_finite").rglob("last.ckpt")
    load = _load_distributed_checkpoint if checkpoint.is_dir() else partial(torch.load, weights_only=True)
    saved = [x for x in tree_leaves(load(checkpoint)) if isinstance(x, torch.Tensor)]
    assert len(saved) > 100, "weights and the optimizer's state"
    assert all(x.isfinite().all() for x in saved)
    # A collective more or less on one of them, and the ranks would not have come this far together.
    assert len({tuple(step["backwards"] for step in steps) for steps in ranks}) == 1


def test_repeated_validation_problems_do_not_count(single, several):
    out, world = several
    (alone,) = results(single, "drifting", 1)
    for rank in results(out, "drifting", world):
        assert rank["validation"] == pytest.approx(alone["validation"], abs=of_sum(7, 1.0))
    assert alone["validation"]["val/pass@2"] > 0
    # Before the first step the weights are the same to the last bit.
    files = [folder / "drifting/evaluations/step_000000.jsonl.gz" for folder in (single, out)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row for _, row in read_records(files[1]).rows] == list(range(7))


@pytest.fixture(scope="session", params=["ddp", "fsdp2"])
def interrupted(request, tmp_path_factory):
    """A straight run of six steps; and one that is killed in saving its sixth, and resumed from its third.

    Each rank has cliffs and mixed groups in every step, and a buffer of privileged rollouts that lives two steps: the
    first step after the checkpoint distils what each rank has saved.
    """
    out = tmp_path_factory.mktemp(f"resume-{request.param}") / "out"
    run = {"adamw": True, "module": {"teacher": "ema"}, "checkpoint_every": 3, "steps": 6, "patterns": ["CMMCMM"]}
    run["distillation"] = {**KEEP_ALL, "refresh_every": 2}
    straight = {**run, "name": "straight", "folder": "straight"}
    killed = {**run, "name": "killed", "folder": "killed", "kill_at": 6}
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
    # Nothing is left of the checkpoint that was being written.
    assert not list(checkpoint.parent.glob(".*partial"))
    assert checkpoint.resolve() in saved_checkpoints(checkpoint.parent)
    ranks = results(out, "resumed", 2)
    for mine, theirs in zip(ranks, results(out, "straight", 2), strict=True):
        assert len(mine["steps"]) == 3
        # Without a signal after the checkpoint everything would be equal whatever was restored.
        assert all(step["metrics"]["optim/grad_norm"] > 1e-3 and step["distilled"] for step in mine["steps"])
        for key in ("rollouts", "distilled", "metrics"):
            assert [s[key] for s in mine["steps"]] == [s[key] for s in theirs["steps"][3:]]
        for a, b in zip(mine["steps"], theirs["steps"][3:], strict=True):
            assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in b["weights"])
        assert all(torch.equal(mine["average"][k], theirs["average"][k]) for k in theirs["average"])
    assert ranks[0]["steps"][0]["distilled"] != ranks[1]["steps"][0]["distilled"], "each rank has a buffer of its own"


def test_a_checkpoint_exports_to_transformers(interrupted, tmp_path):
    out, checkpoint = interrupted
    export_checkpoint(LAB, checkpoint, tmp_path)
    policy = Policy.load(LAB)
    policy.load_state_dict(results(out, "resumed", 2)[0]["steps"][-1]["weights"])
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = policy.model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("raise", 1)])
def test_a_rank_that_dies_or_raises_hangs_nobody_and_the_run_goes_on(tmp_path, strategy, how, code):
    out = tmp_path / "out"
    run = {"folder": "run", "steps": 4, "checkpoint_every": 2, "adamw": True, "distillation": KEEP_ALL}
    run_scenarios(out, strategy, 2, [{**run, "name": "broken", "break": how, "break_at": 3}], timeout=90, expected=code)
    (checkpoint,) = (out / "run").rglob("last.ckpt")
    assert read_header("", checkpoint).step == 2
    run_scenarios(out, strategy, 2, [{**run, "name": "resumed", "ckpt_path": str(checkpoint)}], timeout=120)
    assert [len(rank["steps"]) for rank in results(out, "resumed", 2)] == [2, 2]
    assert read_header("", checkpoint).step == 4


@pytest.mark.parametrize(
    ("strategy", "worlds"), [("ddp", (2, 1)), ("ddp", (2, 3)), ("fsdp2", (2, 1)), ("fsdp2", (2, 3))]
)
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path, strategy, worlds):
    first, second = worlds
    out = tmp_path / "out"
    run = {
        "folder": "run",
        "checkpoint_every": 2,
        "adamw": True,
        "module": {"teacher": "ema"},
        "distillation": KEEP_ALL,
    }
    run_scenarios(out, strategy, first, [{**run, "name": "straight", "folder": "straight", "steps": 4}], timeout=120)
    run_scenarios(out, strategy, first, [{**run, "name": "first", "steps": 2}], timeout=120)
    (checkpoint,) = (out / "run").rglob("last.ckpt")
    rest = {**run, "name": "rest", "steps": 4, "ckpt_path": str(checkpoint)}
    run_scenarios(out, "auto" if strategy == "ddp" and second == 1 else strategy, second, [rest], timeout=120)
    expected, found = results(out, "straight", first), results(out, "rest", second)
    for number in (0, 1):
        parts = [[rank["steps"][number + 2 * (side is expected)] for rank in side] for side in (expected, found)]
        rollouts = [[x for part in side for x in part["rollouts"]] for side in parts]
        assert rollouts[0] == rollouts[1]
        assert distance(parts[1][0]["weights"], parts[0][0]["weights"]) < 1e-5
    assert distance(found[0]["average"], expected[0]["average"]) < 1e-5
