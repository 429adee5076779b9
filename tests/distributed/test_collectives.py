"""What knows of several processes, between two of them: one pair of processes serves all tests of this file."""

import time
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from hdpo import distributed
from hdpo.callbacks import DistillationRefresh, Evaluation, LastCheckpoint, PredictionWriter
from hdpo.callbacks.history import CliffHistory, Visit
from hdpo.distributed import all_max, all_sum, gather_objects, merged_means, rank, world_size
from hdpo.errors import ConfigError, StopRequested
from hdpo.experience import Sequences
from hdpo.losses import JSD, ClippedPolicyLoss, UpdateConfig
from hdpo.losses.update import update_policy
from hdpo.measurements import Measurements
from hdpo.policy.packing import TokenBatch
from hdpo.trainer import UnboundDDPStrategy, UnboundModelParallelStrategy, _UnboundGroup
from tests.helpers.models import random_ids, random_policy
from tests.helpers.processes import run_on
from tests.helpers.tolerances import F32
from tests.helpers.toy import module
from tests.losses import test_update as update

CPU = torch.device("cpu")
SEQUENCES = Sequences(random_ids((4, 3, 5)), random_ids((2, 4, 3), seed=2))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("collectives"), everything)


def everything(rank):
    found = {}
    for scenario in (
        values, objects, turns, cliffs, former_cliffs, buffers, refresh, records, several_updates, sharded, options
    ):  # fmt: skip
        found[scenario.__name__] = scenario(rank)
        dist.barrier()
    return found


# Sums and objects


def values(number):
    return {
        "place": (rank(), world_size()),
        "sum": all_sum([2.0**30 if number else 1.0, 0.1 * (number + 1), 3], CPU),
        "max": all_max([number, -number, 0.5], CPU),
    }


def test_sums_and_maxima_are_exact_and_the_same_everywhere(ranks):
    assert [found["values"]["place"] for found in ranks] == [(0, 2), (1, 2)]
    for found in ranks:
        assert found["values"]["sum"] == [2.0**30 + 1, 0.1 + 0.2, 6.0]  # float32 would lose the one
        assert found["values"]["max"] == [1.0, 0.0, 0.5]


def turns(number):
    """When this process was in its turn, with loading that fails on the first one, and as a module loads a policy."""
    found = []
    with pytest.raises(ConfigError) if number == 0 else nullcontext(), distributed.in_turns():
        found.append(time.monotonic())
        time.sleep(0.1)
        found.append(time.monotonic())
        if number == 0:
            raise ConfigError("no such file")
    for mesh in (None, init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))):
        subject = module()
        subject._device_mesh = mesh

        def load(subject=subject, load=subject._load_whole_policy):
            found.append(time.monotonic())
            if subject.device_mesh is None:
                dist.barrier()  # inside at the same time
            policy = load()
            found.append(time.monotonic())
            return policy

        subject._load_whole_policy = load
        subject._load_policy()
    return found


def test_processes_of_a_machine_load_what_is_sharded_one_after_another(ranks):
    first, second = (found["turns"] for found in ranks)
    assert first[1] <= second[0]
    assert second[2] < first[3], "whole policies are loaded at the same time"
    assert first[5] <= second[4]


def objects(number):
    measured = Measurements()
    measured.add("rollout/reward", 1.0 + number, 2 + number)
    measured.add("sampler/gap_max", [0.25, 0.125][number])
    measured.add("verifier/correct", 3.0 + number, None)
    if number:
        measured.add("privileged/pass_rate", 1.0, 4)
    return gather_objects({"rank": number, "of": [number] * (1 + number)}), merged_means(measured)


def test_objects_come_in_rank_order_and_means_are_over_all_observations(ranks):
    for found in ranks:
        gathered, means = found["objects"]
        assert gathered == [{"rank": 0, "of": [0]}, {"rank": 1, "of": [1, 1]}]
        assert means == {
            "rollout/reward": 3 / 5, "sampler/gap_max": 0.25, "verifier/correct": 7.0, "privileged/pass_rate": 0.25
        }  # fmt: skip


def test_alone_everything_is_the_identity():
    assert (rank(), world_size()) == (0, 1)
    assert all_sum([1, 2.5], CPU) == [1.0, 2.5]
    assert all_max([1, 2.5], CPU) == [1.0, 2.5]
    assert gather_objects("x") == ["x"]


# Stations


def a_batch(index):
    """Prompts of this rank, all of which are cliffs."""
    batch = update.experience([[0.0] * 3] * len(index), distilled=())
    batch.prompts.index = torch.tensor(index)
    batch.is_cliff = torch.ones(len(index), dtype=torch.bool)
    return batch


def cliffs(number):
    batch = a_batch([[0, 1, 4], [2, 3, 5]][number])
    if number:
        batch.is_cliff[0] = False
    station = DistillationRefresh(max_cliffs_per_step=3)
    return station._chosen(batch, reads_context=True), batch.measurements.means()["privileged/over_limit"]


def test_the_limit_of_cliffs_is_that_of_the_global_batch(ranks):
    # Cliffs stand at 0, 1, 4 and 3, 5: the first three of all are 0, 1 and 3.
    assert [found["cliffs"] for found in ranks] == [([0, 1], 1.0), ([1], 1.0)]


def entry(number):
    return ([number], [number, 1], [number, 2], 10 + number)


def former_cliffs(number):
    """Rows 10, 11 and 12 were cliffs; rank 0 sees 10 and 20 (twice, once with a success), rank 1 sees 12, 10 and 21."""
    history = CliffHistory()
    history.visits = {row: [Visit(1, 0, 2)] for row in (10, 11, 12)}
    rows = [[10, 20, 20], [12, 10, 21]][number]
    success = torch.tensor([[[0, 1], [0, 0], [1, 0]], [[0, 0], [1, 1], [0, 0]]][number]).bool()
    batch = SimpleNamespace(
        prompts=SimpleNamespace(row=torch.tensor(rows), source=["s"] * 3),
        rollouts=SimpleNamespace(success=success, has_verdict=success | True, num_generations=2),
        is_cliff=~success.any(-1),
        measurements=Measurements(),
    )
    history.visit(batch, 5)
    history.distil([[20], [21, 21, 12]][number], 5)
    history.finish()
    return history.visits, history.distilled, merged_means(batch.measurements)


def test_all_ranks_know_the_same_cliffs(ranks):
    for visits, distilled, means in (found["former_cliffs"] for found in ranks):
        assert visits == {
            10: [Visit(1, 0, 2), Visit(5, 3, 4)], 11: [Visit(1, 0, 2)], 12: [Visit(1, 0, 2), Visit(5, 0, 2)],
            20: [Visit(5, 0, 2)], 21: [Visit(5, 0, 2)],
        }  # fmt: skip
        assert distilled == {12: 5, 20: 5, 21: 5}
        assert means["cliff/seen_again"] == 3 / 6
        assert means["cliff/converted"] == 2 / 3
        assert means["cliff/steps_to_success"] == 4


def buffers(number):
    station = DistillationRefresh(refresh_every=2)
    station._buffer = [entry(number)]
    saved, every_step = station.state_dict(), DistillationRefresh()
    every_step._buffer = [entry(number)]
    restored = DistillationRefresh(refresh_every=2)
    restored.load_state_dict(saved)
    elsewhere = DistillationRefresh(refresh_every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        elsewhere.load_state_dict({"buffers": [*saved["buffers"], [entry(3)]]})
    return saved, every_step.state_dict(), restored._buffer, elsewhere._buffer, len(caught)


def test_each_rank_saves_and_takes_back_its_own_buffer(ranks):
    for number, found in enumerate(ranks):
        saved, of_one_step, restored, elsewhere, warned = found["buffers"]
        assert saved == {"buffers": [[entry(0)], [entry(1)]]}, "Lightning keeps the first rank's state only"
        assert of_one_step == {}, "it does not outlive its step"
        assert restored == [entry(number)]
        assert elsewhere == [], "filled by another number of processes"
        assert warned == 1 or number > 0


class Engine:
    def __init__(self):
        self.calls = []

    def generate(self, policy, prompts, seeds, sampling, drafts=None):
        self.calls.append(len(prompts))
        from hdpo.experience import Completions

        ids = torch.full((len(prompts), seeds.shape[1], 2), 5)
        return Completions(ids, ids > 0, -ids.float(), ids[..., 0] < 0)

    def release_memory(self):
        pass


def refresh(number):
    """Cliffs on the first rank only, then on none: who samples, and how often the teacher reads."""
    policy, engine, results, passes = random_policy("gpt2"), Engine(), [], []
    policy.register_forward_hook(lambda *_: passes.append(1))

    def grade(texts, references, **columns):
        from hdpo.rewards import Grade, Outcome

        return [Grade(Outcome.CORRECT, 1.0) for _ in texts]

    module = SimpleNamespace(
        engine=engine,
        verifier=SimpleNamespace(grade=grade),
        tokenizer=SimpleNamespace(
            encode=lambda text, add_special_tokens: [], eos_token_id=2, batch_decode=lambda ids, **_: [""] * len(ids)
        ),
        student=policy,
        teacher=SimpleNamespace(policy=lambda student: student),
        device=CPU,
        distillation_weight=1.0,
        privileged_policy_weight=0.0,
        policy_loss=ClippedPolicyLoss(),
        update=UpdateConfig(micro_batch_tokens=1),
        divergence=JSD(),
        cliffs=SimpleNamespace(history=CliffHistory()),
        seed=5,
    )
    trainer = SimpleNamespace(
        datamodule=None, global_step=0, callbacks=[], precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    for on_first in (True, False):
        batch = a_batch([0, 1] if number == 0 else [2, 3])
        batch.is_cliff &= on_first and number == 0
        DistillationRefresh(num_privileged=1, topk=4).on_train_batch_start(trainer, module, batch, 0)
        distilled = None if batch.distillation is None else len(batch.distillation)
        results.append((engine.calls, len(passes), distilled))
        engine.calls = []
        passes.clear()
    return results


def test_all_ranks_sample_and_read_together_or_not_at_all(ranks):
    # The first rank has two privileged rollouts to read, the other none: it makes the same two passes.
    assert ranks[0]["refresh"] == [([2], 2, 2), ([], 0, None)]
    assert ranks[1]["refresh"] == [([0], 2, 0), ([], 0, None)]


def records(number):
    """Rows of an evaluation, the end that one rank is asked for, and where predictions go."""
    evaluation = Evaluation()
    evaluation._records = [
        {"dataset": "", "row": row, "greedy": False, "sample": 0, "split": "validation"}
        for row in ([3, 1] if number else [2, 0])
    ]
    written = []
    trainer = SimpleNamespace(
        datamodule=None, callbacks=[],
        global_step=4, state=SimpleNamespace(fn="fit"), log_dir="runs", is_global_zero=number == 0, world_size=2,
        global_rank=number, max_steps=9,
    )  # fmt: skip
    import hdpo.callbacks.evaluation as module

    module.write_gzip = lambda path, rows: written.append((path.name, [row["row"] for row in rows]))
    module.write_provenance = module.write_config = lambda *arguments: None
    evaluation._write(trainer, None, "evaluations")

    ends = []
    for asked in (False, number == 1):
        last = LastCheckpoint(every_n_steps=1000)
        last._listening, last._asked_to_end = True, "SIGTERM" if asked else None
        try:
            last.on_train_batch_end(trainer, SimpleNamespace(device=CPU), None, None, 0)
            ends.append(False)
        except StopRequested:
            ends.append(True)
    writer = PredictionWriter("predictions-of-test.jsonl")
    writer.on_predict_start(trainer, None)
    writer._file.close()
    writer._path.unlink()
    return written, ends, writer._path.name


def test_rows_are_written_once_in_order_and_all_end_if_one_is_asked_to(ranks):
    assert [found["records"][0] for found in ranks] == [[("step_000004.jsonl.gz", [0, 1, 2, 3])], []]
    assert [found["records"][1] for found in ranks] == [[False, True]] * 2
    assert [found["records"][2] for found in ranks] == [f"predictions-of-test.rank{r}.jsonl" for r in (0, 1)]


# The update


class Averaging:
    """Averages gradients over ranks after each backward pass outside of a block, as DDP does."""

    def __init__(self, module):
        self.module, self.blocked, self.syncs, self.backwards = module, False, 0, 0
        module.trainer.strategy = SimpleNamespace(
            block_backward_sync=self.block, optimizer_step=lambda optimizer, closure: optimizer.step()
        )
        module.manual_backward = self.backward

    @contextmanager
    def block(self):
        self.blocked = True
        yield
        self.blocked = False

    def backward(self, loss):
        loss.backward()
        self.backwards += 1
        if not self.blocked:
            self.syncs += 1
            for p in self.module.student.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def part_of(whole, chosen):
    """A rank's share of an experience."""
    prompts, rollouts, kept = whole.prompts, whole.rollouts, whole.distillation
    positions = [i for i, n in enumerate(kept.index) if n - update.FIRST in chosen]
    mine = update.experience([update.REWARDS[i] for i in chosen], distilled=())
    mine.prompts.index = prompts.index[chosen]
    mine.prompts.prompt_ids = [prompts.prompt_ids[i] for i in chosen]
    mine.rollouts = rollouts.select(chosen)
    mine.distillation = kept.select(positions)
    return mine


UPDATES = {
    "one": {"max_grad_norm": 0.1},
    "several": {"num_epochs": 2, "num_minibatches": 2, "max_grad_norm": None},
    "always": {"max_grad_norm": 0.1, "sync_every_micro_batch": True},
}
#: The first rank has three prompts; all that is distilled is on the second.
SHARES = [[0, 1, 3], [2]]


def several_updates(number):
    found = {}
    for name, options in UPDATES.items():
        module = update.module(micro_batch_tokens=20, **options)
        averaging, batch = Averaging(module), part_of(update.experience(distilled=(2, 2)), SHARES[number])
        update_policy(module, batch)
        metrics = merged_means(batch.measurements)
        found[name] = update.weights(module), averaging.syncs, averaging.backwards, metrics
    return found


@pytest.mark.parametrize("name", UPDATES)
def test_several_ranks_make_the_updates_that_one_makes(ranks, name):
    alone = update.module(micro_batch_tokens=20, **UPDATES[name])
    start, batch = update.weights(alone), update.experience(distilled=(2, 2))
    update_policy(alone, batch)
    expected, means = update.weights(alone), batch.measurements.means()
    assert means["optim/grad_norm"] > 0.01
    for found in ranks:
        weights, syncs, backwards, metrics = found["several_updates"][name]
        assert (weights - expected).norm() < update.TOLERANCE * (expected - start).norm()
        assert metrics == pytest.approx(means, rel=update.TOLERANCE)
        assert backwards == ranks[0]["several_updates"][name][2] > 4
        expected_syncs = {"one": 1, "several": 4, "always": backwards}
        assert syncs == expected_syncs[name], "gradients are averaged once per update, unless in every micro-batch"


# FSDP2


def sharded(number):
    policy = random_policy("gpt2")
    distributed.shard_policy(policy, init_device_mesh("cpu", (2,)))
    batch = TokenBatch.from_sequences(SEQUENCES, CPU)
    reduced, reduce = [], _fsdp_param_group.foreach_reduce

    def counted(*args, **kwargs):
        reduced.append(1)
        return reduce(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted
    # Two micro-batches, the gradients of which are averaged in the second.
    with distributed.no_gradient_sync(None, policy):
        policy(batch).sum().backward()
    inside = len(reduced)
    (policy(batch).sum() * (number + 1)).backward()
    gradients = [p.grad.full_tensor() for p in policy.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")).full_tensor()
    policy.zero_grad()

    # Ranks that make different numbers of forward passes, as they do in decoding; then a collective one.
    with distributed.gathered_parameters(policy), torch.no_grad():
        local = [type(p).__name__ for p in policy.parameters()]
        passes = [policy.model(torch.tensor([[5, 6, 7]])).logits for _ in range(1 + 2 * number)]
    after = {type(p).__name__ for p in policy.parameters()}
    with torch.no_grad():
        logps = policy(batch)
    unsharded = {type(p).__name__ for p in policy.parameters()}
    is_sharded = distributed.reshard(policy)
    policy(batch).sum().backward()
    again = [p.grad.full_tensor() for p in policy.parameters()]
    state = distributed.full_state_dict(policy.model)
    _fsdp_param_group.foreach_reduce = reduce
    return {
        "reductions": (inside, len(reduced)),
        "gradients": gradients,
        "norm": norm,
        "local": set(local),
        "after": after,
        "unsharded": unsharded,
        "resharded": {type(p).__name__ for p in policy.parameters()},
        "is sharded": is_sharded,
        "logits": passes[-1],
        "logps": logps,
        "again": again,
        "state": state,
        "units": len(distributed._sharded_units(policy)),
    }


def test_a_sharded_policy_computes_what_a_whole_one_does(ranks):
    policy = random_policy("gpt2")
    batch = TokenBatch.from_sequences(SEQUENCES, CPU)
    logps = policy(batch)
    logps.sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    for found in (all_found["sharded"] for all_found in ranks):
        assert found["units"] == 3, "two layers and the root"
        # One sum of 1 on both ranks, then 1 and 2: (1 + 1 + 1 + 2) / 2.
        for mine, expected in zip(found["gradients"], gradients, strict=True):
            torch.testing.assert_close(mine, 2.5 * expected, rtol=1e-12, atol=1e-12)
        total = torch.cat([g.flatten() for g in gradients]).norm()
        assert found["norm"].item() == pytest.approx(2.5 * total.item(), rel=1e-12)
        for mine, expected in zip(found["again"], gradients, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["logps"], logps.detach(), rtol=1e-12, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], policy.model(torch.tensor([[5, 6, 7]])).logits)


#: Roundings one after another of a number on its way through two layers and back, those of a layer being input, norm,
#: product, attention, product, sum, norm, product, activation, product, product and sum.
ROUNDINGS = 2 * 2 * 12

#: Name -> dtype that weights are gathered in, whether gradients are averaged in every micro-batch.
FSDP2 = {"default": (None, False), "always": (None, True), "float32": ("float32", False), "bf16": ("bfloat16", False)}


def options(number):
    """Two micro-batches of a float32 policy under each option; gradients, and what is left of them in between."""
    found = {}
    for name, (dtype, always) in FSDP2.items():
        policy = random_policy("qwen2", dtype=torch.float32)
        distributed.shard_policy(policy, init_device_mesh("cpu", (2,)), dtype)
        batch, dtypes, held = TokenBatch.from_sequences(SEQUENCES, CPU), set(), []
        layer = policy.model.model.layers[0]
        layer.register_forward_pre_hook(lambda m, args, dtypes=dtypes: dtypes.add((args[0].dtype, "input")))
        layer.mlp.register_forward_pre_hook(
            lambda m, args, dtypes=dtypes: dtypes.add((m.up_proj.weight.dtype, "weight"))
        )
        for last in (False, True):
            with nullcontext() if last or always else distributed.no_gradient_sync(None, policy):
                logps = policy(batch)
                (logps.sum() * (number + 1)).backward()
            shards = [p.grad.to_local().numel() for p in policy.parameters() if p.grad is not None]
            states = [unit._get_fsdp_state()._fsdp_param_group for unit in distributed._sharded_units(policy)]
            whole = [
                p.unsharded_accumulated_grad_data
                for s in states
                for p in s.fsdp_params
                if p.unsharded_accumulated_grad is not None
            ]
            whole += [
                p.unsharded_param.grad
                for s in states
                for p in s.fsdp_params
                if hasattr(p, "_unsharded_param") and p.unsharded_param.grad is not None
            ]
            held.append(sum(shards) + sum(g.numel() for g in whole))
        found[name] = {
            "gradients": [p.grad.full_tensor() for p in policy.parameters()],
            "logps": logps.detach(),
            "dtypes": dtypes,
            "held": held,
            "size": sum(p.numel() for p in policy.parameters()),
        }
    return found


def relative(one, two):
    one, two = (torch.cat([x.double().flatten() for x in part]) for part in (one, two))
    return float((one - two).norm() / two.norm())


def test_gradients_averaged_in_every_micro_batch_are_the_same_and_take_a_rank_s_share(ranks):
    for found in (all_found["options"] for all_found in ranks):
        default, always = found["default"], found["always"]
        assert relative(always["gradients"], default["gradients"]) <= 4 * F32
        assert default["held"][0] == default["size"]
        assert always["held"] == [default["held"][1]] * 2
        assert always["held"][0] < 0.6 * always["size"]


def test_weights_gathered_in_bfloat16_give_the_gradients_within_its_rounding(ranks):
    for found in (all_found["options"] for all_found in ranks):
        default, same, rounded = found["default"], found["float32"], found["bf16"]
        for a, b in zip(same["gradients"], default["gradients"], strict=True):
            assert torch.equal(a, b)
        assert default["dtypes"] == same["dtypes"] == {(torch.float32, "input"), (torch.float32, "weight")}
        assert rounded["dtypes"] == {(torch.bfloat16, "input"), (torch.bfloat16, "weight")}
        assert {g.dtype for g in rounded["gradients"]} == {torch.float32}
        assert not any(torch.equal(g, g.bfloat16().float()) for g in rounded["gradients"]), "summed in 16 bits"
        distance = relative(rounded["gradients"], default["gradients"])
        assert 0 < distance < ROUNDINGS * torch.finfo(torch.bfloat16).eps / 2
        whole = random_policy("qwen2", dtype=torch.float32)
        for parameter in whole.parameters():  # and no buffer: the angles of rotary embeddings stay float32
            parameter.data = parameter.data.bfloat16()
        alone = whole(TokenBatch.from_sequences(SEQUENCES, CPU))
        assert torch.equal(alone.detach(), rounded["logps"]), "as a policy whose weights are bfloat16"


def test_a_policy_that_stays_whole_has_no_dtype_to_be_gathered_in():
    with pytest.raises(ConfigError, match=r"model.policy.gather_dtype is for FSDP2.*--config strategy/fsdp2"):
        distributed.shard_policy(random_policy(), None, "bfloat16")


def test_gradients_and_weights_are_exchanged_when_they_should_be(ranks):
    for found in (all_found["sharded"] for all_found in ranks):
        inside, outside = found["reductions"]
        assert (inside, outside) == (0, 2 * 3), "none in the block, one per unit after it, and one in the last pass"
        assert found["is sharded"] is True
        assert found["local"] == {"Parameter"}, "whole in the block, so that ranks may differ in their passes"
        assert found["after"] == {"DTensor"}
        assert "Parameter" in found["unsharded"], "the root stays whole after a forward pass without gradient"
        assert found["resharded"] == {"DTensor"}
    whole = random_policy("gpt2").model.state_dict()
    first, second = (found["sharded"]["state"] for found in ranks)
    assert second == {}
    assert first.keys() == whole.keys()
    assert all(torch.equal(first[name], whole[name]) for name in whole)


def test_a_policy_that_is_whole_needs_none_of_it():
    policy = random_policy("gpt2")
    assert distributed.reshard(policy) is False
    entered = []

    @contextmanager
    def block():
        entered.append(1)
        yield

    with distributed.no_gradient_sync(SimpleNamespace(block_backward_sync=block), policy):
        pass
    assert entered == [1], "DDP brings a block of its own"
    with distributed.no_gradient_sync(object(), policy), distributed.gathered_parameters(policy):
        pass
    state = distributed.full_state_dict(policy.model)
    assert all(torch.equal(state[name], value) for name, value in policy.model.state_dict().items())


class _Bound:
    """A strategy that binds the process group to a device, as Lightning's do on a GPU."""

    def setup_environment(self):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", [UnboundDDPStrategy, UnboundModelParallelStrategy])
def test_an_unbound_strategy_leaves_no_device_to_the_process_group(kind):
    assert kind.__mro__[1] is _UnboundGroup, "before Lightning's own"

    class Strategy(_UnboundGroup, _Bound):
        pass

    try:
        Strategy().setup_environment()
        assert dist.group.WORLD.bound_device_id is None
    finally:
        dist.destroy_process_group()
