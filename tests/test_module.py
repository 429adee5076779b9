"""The combined update against a dense float64 reference, its invariances, its empty cases, and exact resume."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from hdpo.experience import Experience
from hdpo.functional import group_advantages
from hdpo.policy import Policy, PolicyConfig
from tests import toy


# Seconds are never the same, and the sampler is checked at the first step of each process.
class Tape(Callback):
    """Keeps the experience of each step, and the weights before and after it."""

    def __init__(self):
        self.experiences: list[Experience] = []
        self.before: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.metrics: list[dict] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in pl_module.student.parameters()]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.experiences.append(batch)
        self.metrics.append({k: v for k, v in batch.metrics.items() if not k.startswith(("time/", "sampler/"))})


def weights(module):
    return torch.cat([p.detach().double().flatten() for p in module.student.parameters()])


def run(folder, *, steps=1, rollouts=None, distillation=None, data=None, trainer=None, ckpt_path=None, **options):
    tape = Tape()
    module = toy.module(**options)
    settings = {"max_steps": steps, "limit_val_batches": 0, **(trainer or {})}
    fitter = toy.trainer(folder, tape, rollouts=rollouts, distillation=distillation, **settings)
    fitter.fit(module, datamodule=toy.datamodule(folder, **(data or {})), ckpt_path=ckpt_path)
    return module, tape


def dense_gradient(experience, weight, *, scale_by_std=True):
    """Gradient of L_GRPO + lambda * L_JSD, written out on dense logits in float64, with every rollout."""
    policy = Policy.load(PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"))
    rollouts, prompts = experience.rollouts, experience.prompts
    num_prompts, num_rollouts = rollouts.rewards.shape

    def logps(context, completion, temperature=1.0):
        logits = policy.model(torch.tensor([context + completion])).logits[0, len(context) - 1 : -1]
        return (logits / temperature).log_softmax(-1)

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for b in range(num_prompts):
        rewards = rollouts.rewards[b].double()
        for k in range(num_rollouts):
            ids = rollouts.completion_ids[b, k][rollouts.completion_mask[b, k]].tolist()
            others = torch.cat([rewards[:k], rewards[k + 1 :]])
            advantage = rewards[k] - others.mean()
            if scale_by_std:
                advantage = advantage / rewards.std() if rewards.std() > 0 else 0.0
            picked = logps(prompts.prompt_ids[b], ids, toy.TEMPERATURE).gather(-1, torch.tensor(ids)[:, None])
            total = total - advantage * picked.sum()
            tokens += len(ids)
    loss = total / tokens
    if weight and experience.distillation is not None:
        items, total = experience.distillation, torch.zeros((), dtype=torch.float64)
        for context, privileged, ids, count in zip(
            items.student.prompt_ids, *items.privileged, items.counts, strict=True
        ):
            with torch.no_grad():
                top = logps(privileged, ids).topk(16, dim=-1)
            log_q = logps(context, ids)
            log_p = torch.full_like(log_q, -1e4).scatter(-1, top.indices, top.values.log_softmax(-1))
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            jsd = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
            total = total + count * jsd.sum()
        loss = loss + weight * total / items.num_tokens
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize(("weight", "scale"), [(1.0, "std"), (0.0, "none")])
def test_the_gradient_equals_the_dense_one_over_all_rollouts(tmp_path, weight, scale):
    module, tape = run(
        tmp_path,
        policy=PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"),
        distillation_weight=weight,
        advantage_scale=scale,
        max_grad_norm=None,
        micro_batch_tokens=512,
    )
    (experience,) = tape.experiences
    signals = (experience.rollouts.rewards != experience.rollouts.rewards[:, :1]).any(-1)
    assert signals.any(), "the batch must hold a mixed group"
    assert experience.is_cliff.any(), "the batch must hold a cliff"
    expected = dense_gradient(experience, weight, scale_by_std=scale == "std")
    assert expected.norm() > 0
    assert (tape.gradients[0] - expected).norm() / expected.norm() < 1e-7
    torch.testing.assert_close(weights(module), tape.before[0] - 0.1 * expected, rtol=0, atol=1e-9)
    if weight:
        assert experience.distillation.num_tokens > 0


@pytest.mark.parametrize(
    "other", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 300}, {"micro_batch_tokens": 10**6}]
)
def test_the_micro_batch_split_does_not_matter(tmp_path, other):
    reference, tape = run(tmp_path, steps=2)
    assert tape.experiences[0].distillation is not None
    module, _ = run(tmp_path, steps=2, **other)
    expected = weights(reference)
    assert (weights(module) - expected).norm() / expected.norm() < 1e-6


def test_the_chunk_size_does_not_matter(tmp_path, monkeypatch):
    reference, _ = run(tmp_path, steps=2)
    load = Policy.load.__func__

    def load_small(cls, config):
        policy = load(cls, config)
        policy.chunk_elements = 1000
        return policy

    monkeypatch.setattr(Policy, "load", classmethod(load_small))
    module, _ = run(tmp_path, steps=2)
    expected = weights(reference)
    assert (weights(module) - expected).norm() / expected.norm() < 1e-6


def test_weight_zero_is_grpo_and_does_no_privileged_work(tmp_path):
    _, tape = run(tmp_path, steps=2, distillation_weight=0.0)
    for experience, metrics in zip(tape.experiences, tape.metrics, strict=True):
        assert experience.is_cliff.any()
        assert experience.distillation is None
        assert not any(name.startswith(("privileged/", "time/privileged")) for name in metrics)
        assert metrics["loss/total"] == metrics["loss/policy"]


@pytest.mark.parametrize("tiers", [[1], [6]])
def test_no_signal_at_all_changes_nothing(tmp_path, tiers):
    # Only solved groups, or only cliffs that are not distilled: no gradient, and no error either.
    data = {"source": toy.source("train", tiers), "prompts_per_step": 2}
    module, tape = run(tmp_path, data=data, distillation_weight=0.0, rollouts={"num_generations": 2})
    rewards = tape.experiences[0].rollouts.rewards
    assert (rewards == rewards[:, :1]).all()
    assert torch.equal(weights(module), tape.before[0])
    assert tape.metrics[0]["optim/grad_norm"] == 0


def test_only_cliffs_still_learn_by_distillation(tmp_path):
    data = {"source": toy.source("train", [6]), "prompts_per_step": 2}
    module, tape = run(tmp_path, data=data, rollouts={"num_generations": 2})
    assert tape.experiences[0].is_cliff.all()
    assert not torch.equal(weights(module), tape.before[0])
    assert tape.metrics[0]["privileged/pass_rate"] > 0.4


def test_cliff_prompts_carry_no_policy_gradient_and_are_skipped(tmp_path):
    module, tape = run(tmp_path)
    batch = module.policy_batch(tape.experiences[0])
    rewards = tape.experiences[0].rollouts.rewards
    mixed = int((rewards != rewards[:, :1]).any(-1).sum()) * rewards.shape[1]
    assert batch.counts.sum() == mixed < rewards.numel()
    assert batch.denominator == tape.experiences[0].rollouts.completion_mask.sum()
    everything = replace(module.policy_batch, needs_all=True)(tape.experiences[0])
    assert everything.counts.sum() == rewards.numel()


def test_options_of_the_denominator(tmp_path):
    module, tape = run(tmp_path)
    experience = tape.experiences[0]
    rollouts = experience.rollouts
    lengths = rollouts.completion_mask.sum(-1)
    mixed = (rollouts.rewards != rollouts.rewards[:, :1]).any(-1, keepdim=True)

    def denominator(**options):
        return replace(module.policy_batch, **options)(experience).denominator

    assert denominator(count_zero_variance=False) == (lengths * mixed).sum()
    rollouts.truncated[0, 0] = True
    assert denominator(mask_truncated=True) == (lengths * ~rollouts.truncated).sum()
    assert denominator(aggregation="sequence") == rollouts.rewards.numel()


@pytest.mark.parametrize("options", [
    {"kl_coef": 0.1},
    {"aggregation": "sequence"},
    {"teacher": "frozen"},
    {"teacher": "ema", "teacher_decay": 0.5},
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"jsd_tail": "paper"},
])  # fmt: skip
def test_every_option_runs_and_changes_the_update(tmp_path, options):
    # A small step, so that there still is something to distil when the teachers have come apart.
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01)}
    plain, _ = run(tmp_path, steps=2, **optimizer)
    module, tape = run(tmp_path, steps=2, **optimizer, **options)
    assert tape.experiences[1].distillation is not None
    assert not torch.equal(weights(module), weights(plain))
    assert all(math.isfinite(value) for value in tape.metrics[-1].values())


def test_bfloat16_autocast_keeps_float32_weights(tmp_path):
    module, tape = run(tmp_path, trainer={"precision": "bf16-mixed"})
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert tape.experiences[0].metrics["sampler/logprob_gap_mean"] < 0.05
    plain, _ = run(tmp_path)
    assert 0 < (weights(module) - weights(plain)).norm() / weights(plain).norm() < 1e-2


def test_a_stale_sampler_stops_the_run(tmp_path):
    from hdpo.generation import TransformersEngine

    class Stale(TransformersEngine):
        """Samples from other weights than the policy's."""

        def generate(self, policy, prompts, seeds, sampling, drafts=None):
            other = copy.deepcopy(policy)
            with torch.no_grad():
                for p in other.parameters():
                    p.mul_(0.5)
            return super().generate(other, prompts, seeds, sampling, drafts)

    with pytest.raises(RuntimeError, match="the sampler's log-probabilities differ"):
        run(tmp_path, engine=Stale())


@pytest.mark.parametrize("options", [{}, {"teacher": "ema"}])
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_resume_is_bit_identical(tmp_path, options, refresh_every):
    from torch.optim import AdamW

    options = {**options, "optimizer": lambda p: AdamW(p, lr=1e-3)}
    buffer = {"refresh_every": refresh_every}
    straight, tape = run(tmp_path / "a", steps=10, distillation=buffer, **options)
    run(tmp_path / "b", steps=5, distillation=buffer, **options)
    (checkpoint,) = (tmp_path / "b").rglob("last.ckpt")
    resumed, rest = run(tmp_path / "b", steps=10, distillation=buffer, ckpt_path=checkpoint, **options)
    assert torch.equal(weights(resumed), weights(straight))
    assert rest.metrics == tape.metrics[5:]
    for mine, theirs in zip(rest.experiences, tape.experiences[5:], strict=True):
        assert mine.prompts.problem == theirs.prompts.problem
        assert torch.equal(mine.rollouts.completion_ids, theirs.rollouts.completion_ids)


@pytest.mark.parametrize(("option", "value"), [
    ("distillation_weight", -0.1),
    ("kl_coef", -1.0),
    ("clip_eps_low", -0.2),
    ("micro_batch_tokens", 0),
    ("max_grad_norm", 0.0),
])  # fmt: skip
def test_bad_values_name_their_key(option, value):
    with pytest.raises(ValueError, match=f"model.{option}"):
        toy.module(**{option: value})


def test_rollouts_do_not_share_memory_with_the_last_steps_gradients(tmp_path):
    class Held(Callback):
        def __init__(self):
            self.bytes = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.bytes.append(sum(p.grad.nbytes for p in pl_module.student.parameters() if p.grad is not None))

    held = Held()
    fitter = toy.trainer(tmp_path, held, max_steps=3, limit_val_batches=0)
    fitter.fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    assert held.bytes == [0, 0, 0]


def test_equal_rollouts_are_put_through_once_and_count_each_time(tmp_path):
    _, tape = run(tmp_path, policy=PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"), max_grad_norm=None)
    (experience,) = tape.experiences
    module = toy.module()
    rollouts, rewards = experience.rollouts, experience.rollouts.rewards
    group = int((rewards != rewards[:, :1]).any(-1).nonzero()[0])
    # Make two successes, or two failures, of one mixed group equal.
    i, j = next((i, j) for i in range(8) for j in range(i) if rewards[group, i] == rewards[group, j])
    for field in (rollouts.completion_ids, rollouts.completion_mask, rollouts.sampler_logps):
        field[group, i] = field[group, j]
    batch = module.policy_batch(experience)
    assert int(batch.counts.max()) >= 2
    assert len(batch.sequences.prompt_ids) < batch.counts.sum()
    assert batch.denominator == rollouts.completion_mask.sum()
    expanded = [s for s, n in zip(batch.sequences.completion_ids, batch.counts.tolist(), strict=True) for _ in range(n)]
    mixed = (rewards != rewards[:, :1]).any(-1)
    every = [
        rollouts.completion_ids[b, k][rollouts.completion_mask[b, k]].tolist()
        for b in mixed.nonzero()[:, 0].tolist()
        for k in range(rewards.shape[1])
    ]
    assert sorted(expanded) == sorted(every)


def test_several_updates_a_batch_equal_ppo_written_out(tmp_path):
    """Two epochs of two minibatches: old log-probabilities are those of the weights before the first update."""
    lr = 0.3
    module, tape = run(
        tmp_path,
        policy=PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        distillation_weight=0.0,
        num_epochs=2,
        num_minibatches=2,
        max_grad_norm=None,
        clip_eps_low=0.05,
        clip_eps_high=0.1,
    )
    (experience,) = tape.experiences
    rollouts, prompts = experience.rollouts, experience.prompts
    policy = Policy.load(PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"))

    def logps(b, k):
        ids = rollouts.completion_ids[b, k][rollouts.completion_mask[b, k]]
        context = prompts.prompt_ids[b]
        logits = policy.model(torch.cat([torch.tensor(context), ids])[None]).logits[0, len(context) - 1 : -1]
        return (logits / toy.TEMPERATURE).log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    num_prompts, num_rollouts = rollouts.rewards.shape
    with torch.no_grad():
        old = {(b, k): logps(b, k) for b in range(num_prompts) for k in range(num_rollouts)}
    clipped = 0
    for update in range(4):
        half = range(update % 2, num_prompts, 2)
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for b in half:
            rewards = rollouts.rewards[b].double()
            for k in range(num_rollouts):
                others = torch.cat([rewards[:k], rewards[k + 1 :]])
                advantage = (rewards[k] - others.mean()) / rewards.std() if rewards.std() > 0 else 0.0
                ratio = (logps(b, k) - old[b, k]).exp()
                clipped += int(((ratio < 0.95) | (ratio > 1.1)).sum()) if advantage else 0
                total = total - torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.1) * advantage).sum()
                tokens += len(ratio)
        policy.zero_grad()
        (total / tokens).backward()
        with torch.no_grad():
            for p in policy.parameters():
                p.sub_(lr * p.grad)
    assert clipped > 20, "the clip must matter"
    expected = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (weights(module) - expected).norm() / (expected - tape.before[0]).norm() < 1e-6
    assert tape.metrics[0]["loss/clip_fraction"] > 0
    assert module.trainer.global_step == 1, "one batch is one step, whatever the number of updates"


def test_several_updates_distil_too_and_resume_counts_batches(tmp_path):
    options = {"num_epochs": 2, "num_minibatches": 2}
    straight, tape = run(tmp_path / "a", steps=4, **options)
    assert any(e.distillation is not None for e in tape.experiences)
    run(tmp_path / "b", steps=2, **options)
    resumed, _ = run(tmp_path / "b", steps=4, ckpt_path="last", **options)
    assert torch.equal(weights(straight), weights(resumed))


def test_the_sampler_correction_weighs_tokens_by_the_truncated_ratio(tmp_path):
    from hdpo.generation import TransformersEngine

    class Biased(TransformersEngine):
        """Reports wrong log-probabilities, by a known amount."""

        def generate(self, policy, prompts, seeds, sampling, drafts=None):
            out = super().generate(policy, prompts, seeds, sampling, drafts)
            return replace(out, logps=out.logps - 0.1 * (out.ids % 3 - 1) * out.mask)

    def gradient(**options):
        _, tape = run(
            tmp_path, engine=Biased(), rollouts={"max_logprob_gap": 1.0}, distillation_weight=0.0, max_grad_norm=None,
            policy=PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"), **options,
        )  # fmt: skip
        return tape.gradients[0], tape.experiences[0]

    plain, experience = gradient()
    corrected, measured = gradient(sampler_correction="truncated", sampler_correction_threshold=1.05)
    metrics = measured.metrics
    # The ratio policy / sampler is exp(0.1 * (id % 3 - 1)), at most 1.05.
    policy = Policy.load(PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64"))
    rollouts = experience.rollouts
    advantages = group_advantages(rollouts.rewards.double())
    total = torch.zeros((), dtype=torch.float64)
    shares = []
    for b, k in (advantages != 0).nonzero().tolist():
        ids = rollouts.completion_ids[b, k][rollouts.completion_mask[b, k]]
        context = experience.prompts.prompt_ids[b]
        logits = policy.model(torch.cat([torch.tensor(context), ids])[None]).logits[0, len(context) - 1 : -1]
        logps = (logits / toy.TEMPERATURE).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        ratio = (0.1 * (ids % 3 - 1)).double().exp()
        shares.append(ratio)
        total = total - (advantages[b, k] * ratio.clamp(max=1.05) * logps).sum()
    (total / rollouts.completion_mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (corrected - expected).norm() / expected.norm() < 1e-6
    assert (plain - expected).norm() / expected.norm() > 1e-3
    ratios = torch.cat(shares)
    assert metrics["sampler/token_ratio_mean"] == pytest.approx(ratios.mean().item(), abs=1e-5)
    assert metrics["sampler/token_ratio_max"] == pytest.approx(math.exp(0.1), abs=1e-5)
    assert metrics["sampler/token_ratio_above"] == pytest.approx((ratios > 1.05).double().mean().item(), abs=1e-5)
    whole = torch.stack([r.prod() for r in shares])
    assert metrics["sampler/sequence_ratio_mean"] == pytest.approx(whole.mean().item(), rel=1e-4)
    assert metrics["sampler/sequence_ratio_max"] == pytest.approx(whole.max().item(), rel=1e-4)
    assert metrics["sampler/sequence_ratio_above"] == pytest.approx((whole > 1.05).double().mean().item())


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_epochs", 0), ("num_minibatches", 0), ("micro_batch_tokens", 0), ("sampler_correction_threshold", 0.0)],
)
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ValueError, match=f"model.{option}"):
        toy.module(**{option: value})
