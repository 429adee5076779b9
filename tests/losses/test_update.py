"""The update: what it is on, in which portions, and how often; the losses themselves have tests of their own."""

from types import SimpleNamespace

import pytest
import torch

from hdpo.experience import DistillationBatch, Experience, PrivilegedRollouts, Prompts, Rollouts, Sequences
from hdpo.losses import JSD, ClippedPolicyLoss, UpdateConfig
from hdpo.losses.divergence import distillation_loss
from hdpo.losses.selection import select_rollouts
from hdpo.losses.update import update_policy
from hdpo.measurements import Measurements
from hdpo.policy import TokenBatch
from tests.helpers.host_reads import host_reads
from tests.helpers.models import VOCAB, random_ids, random_policy
from tests.helpers.other_device import OTHER, crossings

#: Weights are float64; advantages are float32 and enter each gradient once, as do denominators.
TOLERANCE = 16 * torch.finfo(torch.float32).eps
#: Position in the global batch of the first prompt here: minibatches are counted from there.
FIRST = 5
REWARDS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def experience(rewards=REWARDS, distilled=(0, 2, 3, 2)):
    """Four prompts in the middle of a global batch, three rollouts each, and what is distilled of them."""
    num = len(rewards)
    prompts = Prompts(
        index=torch.arange(FIRST, FIRST + num),
        row=torch.arange(num),
        problem=[""] * num,
        reference=[""] * num,
        solution=[""] * num,
        source=[""] * num,
        prompt_ids=random_ids((5, 3, 6, 4)[:num]),
        privileged_ids=random_ids((7,) * num),
        valid=torch.ones(num, dtype=torch.bool),
    )
    lengths = torch.tensor([[4, 6, 2], [3, 5, 7], [2, 2, 3], [6, 1, 5]])[:num]
    ids = torch.tensor(random_ids((7,) * 3 * num, seed=3)).view(num, 3, 7)
    mask = torch.arange(7) < lengths[..., None]
    outcomes = [["correct" if reward else "wrong" for reward in group] for group in rewards]
    rollouts = Rollouts(ids * mask, mask, -mask.double(), lengths < 0, torch.tensor(rewards), outcomes, outcomes)
    completions, generator = random_ids((5, 3, 4, 6)[: len(distilled)], seed=4), torch.Generator().manual_seed(5)
    kept = DistillationBatch(
        Sequences([prompts.prompt_ids[i] for i in distilled], completions),
        Sequences([prompts.privileged_ids[i] for i in distilled], completions),
        counts=[1, 2, 1, 3][: len(distilled)],
        index=[FIRST + i for i in distilled],
        topk_ids=[torch.rand(len(c), VOCAB, generator=generator).topk(4).indices.int() for c in completions],
        topk_logits=[torch.randn(len(c), 4, generator=generator, dtype=torch.float64) for c in completions],
    )
    return Experience(prompts, rollouts, distillation=kept if distilled else None)


class Wrapped:
    """An optimizer as Lightning hands it out: ``step`` is what the trainer counts."""

    def __init__(self, optimizer):
        self.optimizer, self.counted = optimizer, 0

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.counted += 1
        self.optimizer.step()


def module(
    optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
    dtype=torch.float64,
    weight=0.5,
    privileged_policy_weight=0.0,
    **update,
):
    student = random_policy("gpt2", dtype=dtype)
    wrapped = Wrapped(optimizer(student.parameters()))
    return SimpleNamespace(
        update=UpdateConfig(**update),
        policy_loss=ClippedPolicyLoss(clip_eps_low=0.05, clip_eps_high=0.1),
        divergence=JSD(),
        distillation_weight=weight,
        privileged_policy_weight=privileged_policy_weight,
        temperature=1.4,
        privileged_temperature=0.9,
        trainer=SimpleNamespace(strategy=SimpleNamespace(optimizer_step=lambda optimizer, closure: optimizer.step())),
        device=torch.device("cpu"),
        student=student,
        reference_policy=None,
        optimizers=lambda: wrapped,
        manual_backward=lambda loss: loss.backward(),
    )


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


def with_privileged(batch):
    """Privileged rollouts of the second and the third prompt, which are trained in their own context."""
    lengths = torch.tensor([[3, 5], [4, 2]])
    ids = torch.tensor(random_ids((6,) * 4, seed=8)).view(2, 2, 6)
    mask = torch.arange(6) < lengths[..., None]
    rewards, outcomes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [["correct", "wrong"], ["wrong", "correct"]]
    rollouts = Rollouts(ids * mask, mask, -mask.double(), lengths < 0, rewards, outcomes, outcomes)
    batch.privileged = PrivilegedRollouts([1, 2], rollouts)
    return batch


def parts_of(updated, batch):
    """What each update is on, as (selected rollouts, loss's name, temperature, weight) and the distilled ones."""
    number = updated.update.num_minibatches
    for part in range(number):
        mine = [i for i in range(len(batch)) if (FIRST + i) % number == part]
        contexts = [batch.prompts.prompt_ids[i] for i in mine]
        kinds = [
            (select_rollouts(batch.rollouts.select(mine), contexts, updated.policy_loss), updated.temperature, 1.0)
        ]
        if updated.privileged_policy_weight and batch.privileged is not None:
            own = [j for j, i in enumerate(batch.privileged.positions) if i in mine]
            contexts = [batch.prompts.privileged_ids[batch.privileged.positions[j]] for j in own]
            items = select_rollouts(batch.privileged.rollouts.select(own), contexts, updated.policy_loss)
            kinds.append((items, updated.privileged_temperature, updated.privileged_policy_weight))
        for items, temperature, _ in kinds:
            items.old_logps = updated.student.completion_logps(items.sequences, token_budget=1, temperature=temperature)
        distilled = [i for i, n in enumerate(batch.distillation.index) if n - FIRST in mine]
        yield kinds, batch.distillation.select(distilled)


def gradient(updated, loss):
    updated.student.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in updated.student.parameters()]
    )


def written_out(updated, batch):
    """The same updates, each loss in one piece; returns the norms of each: of both losses together, and of either."""
    config, student, logged = updated.update, updated.student, []
    parts = list(parts_of(updated, batch))
    for _ in range(config.num_epochs):
        for kinds, kept in parts:
            policy, distillation = torch.zeros(()), torch.zeros(())
            denominator = kinds[0][0].denominator
            for items, temperature, weight in kinds:
                everything = list(range(len(items.sequences.prompt_ids)))
                if everything:
                    arguments = (student, None, items, everything, "padded", temperature, Measurements())
                    policy = policy + weight * updated.policy_loss(*arguments) / denominator
            if len(kept):
                arguments = (student, kept, list(range(len(kept))), "padded", Measurements())
                distillation = distillation_loss(updated.divergence, *arguments) / kept.num_tokens
            gradients = [gradient(updated, policy), gradient(updated, updated.distillation_weight * distillation)]
            norm = sum(gradients).norm().item()
            logged.append((norm, *(float(g.norm()) for g in gradients)))
            scale = 1.0 if config.max_grad_norm is None else min(1.0, config.max_grad_norm / (norm + 1e-6))
            with torch.no_grad():
                start = 0
                for p in student.parameters():
                    p -= 0.05 * scale * sum(gradients)[start : start + p.numel()].view_as(p)
                    start += p.numel()
    return logged


@pytest.mark.parametrize("options", [
    {"max_grad_norm": None, "micro_batch_tokens": 1},
    {"max_grad_norm": 0.05, "micro_batch_tokens": 10**6},
    {"num_epochs": 2, "num_minibatches": 2, "max_grad_norm": None},
    {"num_epochs": 3, "max_grad_norm": 0.2},
    {"num_minibatches": 4},
    {"privileged_policy_weight": 0.4},
    {"privileged_policy_weight": 0.4, "num_epochs": 2, "num_minibatches": 2, "weight": 0.0},
])  # fmt: skip
def test_updates_are_the_ones_written_out(options):
    mine, theirs = (module(**{"micro_batch_tokens": 25, **options}) for _ in range(2))
    start, batch = weights(mine), with_privileged(experience())
    assert update_policy(mine, batch) is True
    norms = [total for total, *_ in written_out(theirs, with_privileged(experience()))]
    way = (weights(theirs) - start).norm()
    assert (weights(mine) - weights(theirs)).norm() < TOLERANCE * way
    means = batch.measurements.means()
    assert means["optim/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=TOLERANCE)
    assert means["optim/skipped"] == 0
    assert mine.optimizers().counted == 1, "the trainer counts one step, whatever the number of updates"
    assert min(norms) > 1e-3
    if options.get("max_grad_norm"):
        assert max(norms) > options["max_grad_norm"], "the clip must matter"


def test_the_norms_of_both_losses_are_measured_where_they_are_asked_for():
    mine, theirs = (module(num_minibatches=2, log_gradient_norms=True, micro_batch_tokens=25) for _ in range(2))
    batch = experience()
    update_policy(mine, batch)
    norms = written_out(theirs, experience())
    means = batch.measurements.means()
    for i, name in enumerate(("grad_norm", "grad_norm_policy", "grad_norm_distillation")):
        values = [norm[i] for norm in norms]
        assert means[f"optim/{name}"] == pytest.approx(sum(values) / len(values), rel=TOLERANCE), name
    assert (weights(mine) - weights(theirs)).norm() < TOLERANCE
    alone = experience([[1.0] * 3] * 4)
    update_policy(module(log_gradient_norms=True), alone)
    means = alone.measurements.means()
    assert means["optim/grad_norm_distillation"] == pytest.approx(means["optim/grad_norm"])
    assert "optim/grad_norm_policy" not in means


def test_a_step_without_any_signal_is_a_step_all_the_same():
    updated = module(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    start, batch = weights(updated), experience([[1.0] * 3, [0.0] * 3], distilled=())
    assert update_policy(updated, batch) is True
    # No parameter is left out: weight decay acts, and nothing else.
    torch.testing.assert_close(weights(updated), start * (1 - 0.1 * 0.5), rtol=1e-12, atol=0)
    means = batch.measurements.means()
    assert (means["loss/policy"], means["optim/grad_norm"]) == (0, 0)
    assert "loss/distillation" not in means


def test_privileged_rollouts_divide_by_their_own_tokens_where_no_plain_one_counts():
    mine, theirs = (module(privileged_policy_weight=2.0, max_grad_norm=None) for _ in range(2))
    for updated in (mine, theirs):
        updated.policy_loss = ClippedPolicyLoss(count_zero_variance=False)
    start, batch = weights(mine), with_privileged(experience([[0.0] * 3] * 4, distilled=()))
    update_policy(mine, batch)
    means, batch = batch.measurements.means(), with_privileged(experience([[0.0] * 3] * 4))
    ((_, (items, temperature, weight)),) = [kinds for kinds, _ in parts_of(theirs, batch)]
    everything, measured = list(range(len(items.sequences.prompt_ids))), Measurements()
    loss = theirs.policy_loss(theirs.student, None, items, everything, "padded", temperature, measured)
    assert items.denominator == 3 + 5 + 4 + 2
    step = -0.05 * weight * gradient(theirs, loss) / items.denominator
    assert (weights(mine) - start - step).norm() < TOLERANCE * step.norm()
    assert step.norm() > 1e-3
    assert means["loss/privileged_policy"] == pytest.approx(loss.item() / items.denominator, rel=TOLERANCE)
    assert "loss/policy" not in means


def test_privileged_rollouts_without_an_advantage_are_not_read_where_no_kl_is_taken_on_them():
    updated, batch = module(privileged_policy_weight=1.0), with_privileged(experience(distilled=()))
    updated.policy_loss, updated.reference_policy = ClippedPolicyLoss(kl_coef=0.5), random_policy("gpt2", seed=5)
    rollouts = batch.privileged.rollouts
    rollouts.rewards[1], rollouts.outcomes[1] = torch.ones(2), ["correct"] * 2
    update_policy(updated, batch)
    plain, privileged = int(batch.rollouts.completion_mask.sum()), int(rollouts.completion_mask[0].sum())
    read = {name: total for name, total, _ in batch.measurements.items()}["speed/update"]
    assert read == plain + privileged, "the penalty is on the plain rollouts, all of them"


@pytest.mark.parametrize("options", [{}, {"num_epochs": 2}], ids=["one update", "several"])
def test_no_forward_pass_is_larger_than_it_may_be(options):
    updated, sizes = module(micro_batch_tokens=25, **options), []

    def note(policy, arguments):
        tokens = arguments[0]
        shared = 0 if tokens.prefixes is None else tokens.prefixes.ids.numel()
        sizes.append((tokens.input_ids.numel() + shared, len(tokens.lengths)))

    updated.student.register_forward_pre_hook(note)
    update_policy(updated, experience())
    assert len(sizes) > 4
    assert max(num_sequences for _, num_sequences in sizes) > 1
    assert all(size <= 25 or num_sequences == 1 for size, num_sequences in sizes)


def test_the_next_update_sees_the_weights_of_the_one_before_under_autocast():
    def updated(cache_enabled):
        mine = module(lambda p: torch.optim.SGD(p, lr=0.5), torch.float32, num_epochs=3, max_grad_norm=None)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled):
            update_policy(mine, experience())
        return weights(mine)

    assert torch.equal(updated(True), updated(False)), "copies of weights from before the last update"


def test_the_weight_of_distillation_is_a_factor_of_its_gradient():
    norms = []
    for weight in (1.0, 3.0):
        batch = experience([[1.0] * 3] * 4)
        update_policy(module(weight=weight), batch)
        norms.append(batch.measurements.means()["optim/grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=TOLERANCE)
    assert norms[0] > 1e-3


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("updates", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_the_host_reads_nothing_of_another_device_but_the_norms_and_what_was_measured(updates, off_policy):
    """At most one read a step beyond the clip's, however many micro-batches: what is selected comes from the host."""
    num_epochs, num_minibatches = updates
    for tokens in (1, 16, 10_000):
        options = {"num_epochs": num_epochs, "num_minibatches": num_minibatches, "micro_batch_tokens": tokens}
        updated, batch = module(privileged_policy_weight=0.5, **options), with_privileged(experience())
        updated.policy_loss = ClippedPolicyLoss(sampler_correction="truncated", kl_coef=0.1, aggregation="sequence")
        updated.reference_policy, updated.device = random_policy("gpt2", seed=1).to(OTHER), OTHER
        updated.student.to(OTHER)
        for name in ("topk_ids", "topk_logits"):
            setattr(batch.distillation, name, [x.to(OTHER) for x in getattr(batch.distillation, name)])
        if off_policy:
            batch.off_policy = batch.rollouts.select([3, 2, 1, 0])
        passes = []
        updated.student.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        with crossings() as seen:
            assert update_policy(updated, batch)
            assert seen.reads == [()] * num_epochs * num_minibatches
            measured = batch.measurements.items()
        assert len(passes) >= (20 if tokens == 1 else 3) * num_epochs
        assert len(seen.reads) == num_epochs * num_minibatches + 1
        assert {name for name, *_ in measured} >= {"loss/kl", "sampler/token_ratio_mean", "loss/distillation"}
        assert seen.mixed == []


WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(("layout", "options"), [("padded", {}), ("shared", {}), ("shared", WINDOW)])
def test_a_forward_pass_reads_nothing_back(layout, options):
    student = random_policy("qwen2", **options)
    sequences = Sequences([[5, 6, 7]] * 2 + [[8]], random_ids((4, 2, 5)))
    with host_reads() as seen:
        student(TokenBatch.from_sequences(sequences, student.device, layout)).sum().backward()
    assert seen.names == []
