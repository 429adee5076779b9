"""HDPO's training step written out from the paper: dense, float64, one sequence at a time, every rollout, no shortcut.

Nothing of the package is used but its data containers. What the engine sampled is taken as given; everything after it
(grading, advantages, cliffs, filter, teacher, losses, clipping, optimizer, schedule, averages, logged values) is
computed again here and held against what a run did.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["Options", "Reference", "Sampled"]


def boxed(text: str, reference: str) -> str:
    """Outcome of a completion whose answer is an integer."""
    answers = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return "no_answer" if not answers else "correct" if answers[-1].strip() == reference else "wrong"


@dataclass
class Options:
    """Every option of a step, by the words of the configuration; ``grade`` is (text, reference) -> outcome."""

    grade: Callable[[str, str], str] = boxed

    optimizer: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.004)
    num_warmup_steps: int = 0
    start_factor: float = 0.1
    distillation_weight: float = 1.0
    teacher: str = "drifting"
    teacher_decay: float = 0.99
    divergence: str = "jsd"
    jsd_tail: str = "exact"
    advantage_scale: str = "std"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    aggregation: str = "token"
    kl_coef: float = 0.0
    mask_truncated: bool = False
    count_zero_variance: bool = True
    sampler_correction: str = "none"
    sampler_correction_threshold: float = 2.0
    num_epochs: int = 1
    num_minibatches: int = 1
    max_grad_norm: float | None = 1.0
    micro_batch_tokens: int = 600
    temperature: float = 2.0
    num_generations: int = 4
    max_new_tokens: int = 48
    num_privileged: int = 2
    privileged_temperature: float = 1.0
    privileged_new_tokens: int = 64
    max_cliffs_per_step: int = 32
    topk: int = 16
    refresh_every: int = 1
    completions: str = "privileged"
    sampled_by: str = "current"
    target: str = "distribution"
    privileged_policy_weight: float = 0.0
    reference_in_group: bool = False
    off_policy_shaping: float = 0.1
    teacher_weight: float = 0.5
    log_gradient_norms: bool = False


@dataclass
class Sampled:
    """One call of the engine: ``[N][S]`` completions with the log-probabilities that the sampler reported."""

    prompts: list[list[int]]
    temperature: float
    ids: list[list[list[int]]]
    logps: list[list[list[float]]]
    truncated: list[list[bool]]


@dataclass(eq=False)
class Member:
    """One completion of a group; no ``logps``: the policy did not write it; no ``reward``: there is no verdict."""

    index: int
    context: list[int]
    ids: list[int]
    reward: float | None
    truncated: bool
    logps: list[float] | None
    temperature: float


class Top(NamedTuple):
    """As torch.topk returns it."""

    values: Tensor
    indices: Tensor


@dataclass
class Expected:
    """What a step must have done."""

    weights: Tensor
    metrics: dict[str, float]
    is_cliff: list[bool] = field(default_factory=list)


class _Mean:
    """Sums and counts of named observations."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


class Reference:
    """Replays a run.

    Args:
        options: of the run.
        path: folder of the initial policy.
    """

    def __init__(self, options: Options, path: str) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        self.initial, self.average = copy.deepcopy(self.student), copy.deepcopy(self.student)
        self.optimizer = options.optimizer(self.student.parameters())
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.num_steps = 0
        #: Row of each former cliff -> (step, whether it had a success) of every visit; and the rows ever distilled.
        self.visits: dict[int, list[tuple[int, bool]]] = {}
        self.distilled_rows: set[int] = set()
        #: (prompt's index, student context, privileged context, completion) of every kept rollout.
        self.buffer: list[tuple[int, list[int], list[int], list[int]]] = []

    # ------------------------------------------------------------------ one sequence

    @staticmethod
    def distribution(model: Any, context: list[int], completion: list[int], temperature: float) -> Tensor:
        """Log-probabilities of the whole vocabulary at each completion token, ``[T, V]``."""
        logits = model(torch.tensor([context + completion])).logits[0, len(context) - 1 : -1]
        return (logits / temperature).log_softmax(-1)

    def logps(self, model: Any, context: list[int], completion: list[int], temperature: float) -> Tensor:
        """Log-probabilities of the completion's tokens, ``[T]``."""
        dense = self.distribution(model, context, completion, temperature)
        return dense[torch.arange(len(completion)), torch.tensor(completion)]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def grade(self, ids: list[int], reference: str) -> str:
        return self.options.grade(self.text(ids), reference)

    # ------------------------------------------------------------------ one group

    def advantages(self, rewards: list[float | None]) -> list[float]:
        """Leave-one-out advantages of one group; None is a rollout without a verdict, which is no member of it."""
        known = [r for r in rewards if r is not None]
        values = []
        for i, reward in enumerate(rewards):
            others = [r for j, r in enumerate(rewards) if j != i and r is not None]
            if reward is None or len(set(known)) < 2:
                values.append(0.0)
                continue
            scale = {"std": _std(known), "none": 1.0, "leave_one_out_std": _std(others) or 1.0}
            values.append((reward - sum(others) / len(others)) / scale[self.options.advantage_scale])
        return values

    # ------------------------------------------------------------------ divergences

    def divergence(self, top: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        """Sum over positions, between the teacher's logits, renormalised, and the student.

        Args:
            top: ``[T, k]``.
            ids: ``[T, k]``.
            log_q: ``[T, V]``.
        """
        o = self.options
        q, top_p, top_log_p = log_q.exp(), top.softmax(-1), top.log_softmax(-1)
        top_q, top_log_q = q.gather(-1, ids), log_q.gather(-1, ids)
        match self.options.divergence:
            case "jsd":
                m = (torch.zeros_like(q).scatter(-1, ids, top_p) + q) / 2
                value = (
                    0.5 * (top_p * (top_log_p - m.gather(-1, ids).log())).sum() + 0.5 * (q * (log_q - m.log())).sum()
                )
                # The paper writes the mass outside the top k with ln 2, twice what it adds to the divergence.
                outside = (1 - top_q.sum(-1)).sum()
                return value + (0.0 if self.options.jsd_tail == "exact" else 0.5 * math.log(2)) * outside
            case "generalized_jsd":
                b, p = o.teacher_weight, torch.zeros_like(q).scatter(-1, ids, top_p)
                log_m = (b * p + (1 - b) * q).log()
                return b * (top_p * (top_log_p - log_m.gather(-1, ids))).sum() + (1 - b) * (q * (log_q - log_m)).sum()
            case "forward_kl":
                return (top_p * (top_log_p - top_log_q)).sum()
            case "reverse_kl":
                inside = top_q / top_q.sum(-1, keepdim=True)
                return (inside * (inside.log() - top_log_p)).sum()
        raise AssertionError(self.options.divergence)

    # ------------------------------------------------------------------ the step

    def step(self, prompts: Any, rollouts: Sampled, privileged: Sampled | None) -> Expected:
        """One step from the initial weights of the last one."""
        o, means = self.options, _Mean()
        num = len(prompts.problem)
        totals: dict[str, float] = {}

        def count(name: str, by: float = 1.0) -> None:
            totals[name] = totals.get(name, 0.0) + by

        rewards: list[list[float | None]] = []
        for b in range(num):
            outcomes = [self.grade(ids, prompts.reference[b]) for ids in rollouts.ids[b]]
            for outcome in outcomes:
                count(f"verifier/{outcome}")
            rewards.append(
                [float(o == "correct") if o in ("correct", "wrong", "no_answer") else None for o in outcomes]
            )
            source = prompts.source[b]
            for k, ids in enumerate(rollouts.ids[b]):
                if rewards[b][k] is not None:
                    means.add("rollout/reward", rewards[b][k])
                    means.add(f"rollout_by_source/reward/{source}", rewards[b][k])
                means.add("rollout/length", len(ids))
                if not rollouts.truncated[b][k]:
                    means.add("rollout/terminated_length", len(ids))
                for name in ("correct", "wrong", "no_answer", "timeout", "error", "invalid_reference"):
                    means.add(f"rollout/{name}", outcomes[k] == name)
                means.add("rollout/truncated", rollouts.truncated[b][k])
                means.add("rollout/entropy", -sum(rollouts.logps[b][k]), len(ids))
            known = [r for r in rewards[b] if r is not None]
            if len(known) > 1:
                means.add("rollout/reward_std", _std(known))
        is_cliff = [all(r == 0 for r in group) for group in rewards]
        self._former_cliffs(prompts, is_cliff, rewards, means)
        for b in range(num):
            for of, suffix in (("", ""), ("_by_source", f"/{prompts.source[b]}")):
                means.add(f"cliff{of}/fraction{suffix}", is_cliff[b])
                means.add(f"cliff{of}/mixed{suffix}", {0.0, 1.0} <= set(rewards[b]))
                means.add(f"cliff{of}/solved{suffix}", set(rewards[b]) == {1.0})
                means.add(f"cliff{of}/ungraded{suffix}", 1.0 not in rewards[b] and None in rewards[b])

        context_groups = self._refresh(prompts, is_cliff, rollouts, privileged, means, count)
        count("spent/completions", sum(map(len, rollouts.ids)) + (sum(map(len, privileged.ids)) if privileged else 0))
        for call in filter(None, (rollouts, privileged)):
            count("spent/tokens", sum(len(ids) for group in call.ids for ids in group))
        row_of = dict(zip(prompts.index.tolist(), prompts.row.tolist(), strict=True))
        if self.num_steps % o.refresh_every == 0:
            self.distilled_rows |= {row_of[entry[0]] for entry in self.buffer}
        groups = self._groups(prompts, rollouts, rewards, is_cliff, count)
        distilled = self._read_by_teacher() if o.distillation_weight > 0 else []

        old: dict[int, Tensor] = {}
        if o.num_epochs * o.num_minibatches > 1:
            for member in [m for group in groups + context_groups for m in group]:
                old[id(member)] = self.logps(self.student, member.context, member.ids, member.temperature).detach()
        factor = 1.0
        if o.num_warmup_steps:
            factor = min(1.0, o.start_factor + (1 - o.start_factor) * self.num_steps / o.num_warmup_steps)
        self.optimizer.param_groups[0]["lr"] = self.base_lr * factor
        for update in range(o.num_epochs * o.num_minibatches):
            part = update % o.num_minibatches
            self.optimizer.zero_grad()
            plain, own = ([g for g in gs if g[0].index % o.num_minibatches == part] for gs in (groups, context_groups))
            loss, denominator = self._policy_loss(plain, old, means)
            if own and o.privileged_policy_weight:
                extra = self._context_loss(own, old, denominator, means)
                loss = loss + o.privileged_policy_weight * extra
            elif o.privileged_policy_weight and context_groups:
                means.add("loss/privileged_policy", 0.0, denominator)
            chosen = [item for item in distilled if item[0] % o.num_minibatches == part]
            distillation = torch.zeros((), dtype=torch.float64)
            if chosen:
                distillation = o.distillation_weight * self._distillation_loss(chosen, means)
            for p in self.student.parameters():
                p.grad = torch.zeros_like(p)
            norms = []
            for part_loss in (loss, distillation):
                before = flat_gradient(self.student)
                if part_loss.requires_grad:
                    part_loss.backward()
                norms.append(float((flat_gradient(self.student) - before).norm()))
            if o.log_gradient_norms:
                has_policy = loss.requires_grad
                if has_policy or not chosen:
                    means.add("optim/grad_norm_policy", norms[0])
                if chosen:
                    means.add("optim/grad_norm_distillation", norms[1])
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in self.student.parameters()))
            means.add("optim/grad_norm", norm)
            if o.max_grad_norm is not None and norm > o.max_grad_norm:
                for p in self.student.parameters():
                    p.grad *= o.max_grad_norm / (norm + 1e-6)  # torch's clip_grad_norm_ adds 1e-6
            self.optimizer.step()
        self.num_steps += 1
        with torch.no_grad():
            for mean, current in zip(self.average.parameters(), self.student.parameters(), strict=True):
                mean.copy_(o.teacher_decay * mean + (1 - o.teacher_decay) * current)
        metrics = means.means() | totals | {"optim/lr": self.base_lr * factor, "optim/skipped": 0.0}
        metrics["loss/total"] = (
            metrics.get("loss/policy", 0.0)
            + o.kl_coef * metrics.get("loss/kl", 0.0)
            + o.privileged_policy_weight * metrics.get("loss/privileged_policy", 0.0)
            + o.distillation_weight * metrics.get("loss/distillation", 0.0)
        )
        return Expected(flat(self.student), metrics, is_cliff)

    def _former_cliffs(
        self, prompts: Any, is_cliff: list[bool], rewards: list[list[float | None]], means: _Mean
    ) -> None:
        """Which prompts that were a cliff once have a success now."""
        now = []
        for b, row in enumerate(prompts.row.tolist()):
            former, success = self.visits.get(row), 1.0 in rewards[b]
            for of, suffix in (("", ""), ("_by_source", f"/{prompts.source[b]}")):
                means.add(f"cliff{of}/seen_again{suffix}", former is not None)
                if former is None or (not success and None in rewards[b]):
                    continue
                means.add(f"cliff{of}/converted{suffix}", success)
                if row in self.distilled_rows:
                    means.add(f"cliff{of}/converted_distilled{suffix}", success)
                if success and not any(solved for _, solved in former):
                    means.add(f"cliff{of}/steps_to_success{suffix}", self.num_steps - former[0][0])
            if former is not None or is_cliff[b]:
                now.append((row, success))
        for row, success in now:
            self.visits.setdefault(row, []).append((self.num_steps, success))

    def _groups(
        self, prompts: Any, rollouts: Sampled, rewards: list[list[float | None]], is_cliff: list[bool], count: Any
    ) -> list[list[Member]]:
        """The groups of the plain prompts; with the reference as a member of the cliffs' ones where that is wanted."""
        o, groups = self.options, []
        num_references = 0
        for b in range(len(prompts.problem)):
            context, index = prompts.prompt_ids[b], int(prompts.index[b])
            group = [
                Member(
                    index, context, ids, rewards[b][k], rollouts.truncated[b][k], rollouts.logps[b][k], o.temperature
                )
                for k, ids in enumerate(rollouts.ids[b])
            ]
            if o.reference_in_group and is_cliff[b]:
                group.append(Member(index, context, self.solution(prompts, b), 1.0, False, None, o.temperature))
                num_references += 1
            groups.append(group)
        if o.reference_in_group:
            count("spent/solutions", num_references)
        return groups

    def solution(self, prompts: Any, b: int) -> list[int]:
        """A reference solution as a completion."""
        return [*self.tokenizer.encode(prompts.solution[b], add_special_tokens=False), self.tokenizer.eos_token_id]

    def _refresh(
        self,
        prompts: Any,
        is_cliff: list[bool],
        rollouts: Sampled,
        privileged: Sampled | None,
        means: _Mean,
        count: Any,
    ) -> list[list[Member]]:
        """Fill the buffer; returns the groups of privileged rollouts."""
        o = self.options
        if o.distillation_weight == 0 and o.privileged_policy_weight == 0:
            assert privileged is None, "no privileged work without distillation"
            return []
        if self.num_steps % o.refresh_every:
            assert privileged is None, "nothing is sampled while the buffer lives"
            return []
        chosen = [b for b, cliff in enumerate(is_cliff) if cliff and prompts.privileged_ids[b]][: o.max_cliffs_per_step]
        samples = o.completions == "privileged" or o.privileged_policy_weight > 0
        expected = [prompts.privileged_ids[b] for b in chosen] if samples else []
        assert (privileged.prompts if privileged else []) == expected
        count("privileged/too_long", sum(c and not p for c, p in zip(is_cliff, prompts.privileged_ids, strict=True)))
        count("privileged/over_limit", max(0, sum(is_cliff) - o.max_cliffs_per_step))
        self.buffer = []
        groups: list[list[Member]] = []
        num_kept = 0
        for j, b in enumerate(chosen if samples else []):
            count("spent/solutions")
            groups.append([])
            for k, (ids, truncated) in enumerate(zip(privileged.ids[j], privileged.truncated[j], strict=True)):
                outcome = self.grade(ids, prompts.reference[b])
                count(f"verifier/{outcome}")
                kept = outcome == "correct" and not (o.mask_truncated and truncated)
                copied = self.text(ids).split() == prompts.solution[b].split()
                context, index = prompts.privileged_ids[b], int(prompts.index[b])
                reward = float(outcome == "correct") if outcome in ("correct", "wrong", "no_answer") else None
                groups[-1].append(
                    Member(index, context, ids, reward, truncated, privileged.logps[j][k], o.privileged_temperature)
                )
                if kept and o.completions == "privileged":
                    self.buffer.append((index, prompts.prompt_ids[b], context, ids))
                for of, suffix in (("", ""), ("_by_source", f"/{prompts.source[b]}")):
                    if o.completions == "privileged":
                        count(f"privileged{of}/kept{suffix}", kept)
                    means.add(f"privileged{of}/length{suffix}", len(ids))
                    means.add(f"privileged{of}/truncated{suffix}", truncated)
                    if outcome in ("correct", "wrong", "no_answer"):
                        means.add(f"privileged{of}/pass_rate{suffix}", kept)
                    if kept:
                        means.add(f"privileged{of}/copy_rate{suffix}", copied)
        if samples and not chosen:
            count("privileged/kept", 0)
        if o.completions != "privileged":
            for b in chosen:
                texts = [self.solution(prompts, b)] if o.completions == "reference" else rollouts.ids[b]
                count("spent/solutions")
                for k, ids in enumerate(texts):
                    if o.completions == "failures" and o.mask_truncated and rollouts.truncated[b][k]:
                        continue
                    if len(ids) <= o.privileged_new_tokens:
                        self.buffer.append(
                            (int(prompts.index[b]), prompts.prompt_ids[b], prompts.privileged_ids[b], ids)
                        )
                        num_kept += 1
            count("privileged/kept", num_kept)
        if o.distillation_weight == 0:
            self.buffer = []
        return groups if o.privileged_policy_weight > 0 else []

    def _read_by_teacher(self) -> list[tuple[int, list[int], list[int], Any]]:
        """What is distilled on each completion: the teacher's top k logits with their tokens, or the tokens."""
        model = {"drifting": self.student, "frozen": self.initial, "ema": self.average}[self.options.teacher]
        items = []
        with torch.no_grad():
            for index, context, privileged, ids in self.buffer:
                if self.options.target == "token":
                    top: Any = Top(torch.zeros(len(ids), 1, dtype=torch.float64), torch.tensor(ids)[:, None])
                else:
                    top = self.distribution(model, privileged, ids, 1.0).topk(self.options.topk)
                items.append((index, context, ids, top))
        return items

    def _member_losses(self, member: Member, advantage: float, logps: Tensor, old: dict, means: _Mean) -> Tensor:
        """What each token of a member adds to the loss, ``[T]``."""
        o = self.options
        one_update = o.num_epochs * o.num_minibatches == 1
        if member.logps is None:  # LUFFY: what the policy did not write, with its shaping
            return -advantage * logps.exp() / (logps.exp() + o.off_policy_shaping)
        before = logps.detach() if one_update else old[id(member)]
        ratio = (logps - before).exp()
        clipped = ratio.clamp(1 - o.clip_eps_low, 1 + o.clip_eps_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        if o.sampler_correction == "truncated":
            importance = (before - torch.tensor(member.logps, dtype=torch.float64)).exp()
            surrogate = surrogate * importance.clamp(max=o.sampler_correction_threshold)
            for value in importance.tolist():
                means.add("sampler/token_ratio_mean", value)
                means.add("sampler/token_ratio_above", value > o.sampler_correction_threshold)
            means.add("sampler/sequence_ratio_mean", float(importance.prod()))
        if not one_update:
            cut = (ratio < 1 - o.clip_eps_low) if advantage < 0 else (ratio > 1 + o.clip_eps_high)
            means.add("loss/clip_fraction", float(cut.sum()) if advantage else 0.0, len(member.ids))
            means.add("loss/ratio", float(ratio.detach().sum()), len(member.ids))
        return -surrogate

    def _counted(self, group: list[Member]) -> list[Member]:
        o, known = self.options, [m.reward for m in group if m.reward is not None]
        if len(known) < 2 or (not o.count_zero_variance and len(set(known)) == 1):
            return []
        return [m for m in group if m.reward is not None and not (o.mask_truncated and m.truncated)]

    def _policy_loss(self, groups: list[list[Member]], old: dict, means: _Mean) -> tuple[Tensor, float]:
        """The policy loss of plain groups, and its denominator."""
        o = self.options
        total = torch.zeros((), dtype=torch.float64)
        kl_total = torch.zeros((), dtype=torch.float64)
        denominator = 0.0
        for group in groups:
            advantages = self.advantages([m.reward for m in group])
            for member in self._counted(group):
                advantage = advantages[group.index(member)]
                ids = member.ids
                denominator += len(ids) if o.aggregation == "token" else 1.0
                weight = 1.0 if o.aggregation == "token" else 1.0 / len(ids)
                if advantage == 0 and o.kl_coef == 0:
                    continue
                logps = self.logps(self.student, member.context, ids, member.temperature)
                total = total + weight * self._member_losses(member, advantage, logps, old, means).sum()
                if o.kl_coef > 0 and member.logps is not None:
                    with torch.no_grad():
                        initial = self.logps(self.initial, member.context, ids, member.temperature)
                    # Schulman's k3 with reference / policy: unbiased for KL(policy || reference).
                    k3 = (initial - logps).exp() - (initial - logps) - 1
                    kl_total = kl_total + weight * k3.sum()
        means.add("loss/policy", total.item(), denominator)
        if o.kl_coef > 0:
            means.add("loss/kl", kl_total.item(), denominator)
        return (total + o.kl_coef * kl_total) / max(denominator, 1.0), denominator

    def _context_loss(self, groups: list[list[Member]], old: dict, denominator: float, means: _Mean) -> Tensor:
        """GRPO on privileged rollouts in their own context, relative to the plain tokens."""
        o, total, silent = self.options, torch.zeros((), dtype=torch.float64), _Mean()
        for group in groups:
            advantages = self.advantages([m.reward for m in group])
            for member in self._counted(group):
                advantage = advantages[group.index(member)]
                if advantage != 0:
                    weight = 1.0 if o.aggregation == "token" else 1.0 / len(member.ids)
                    logps = self.logps(self.student, member.context, member.ids, member.temperature)
                    total = total + weight * self._member_losses(member, advantage, logps, old, silent).sum()
        means.add("loss/privileged_policy", total.item(), denominator)
        return total / max(denominator, 1.0)

    def _distillation_loss(self, items: list, means: _Mean) -> Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for _, context, ids, top in items:
            dense = self.distribution(self.student, context, ids, 1.0)
            total = total + self.divergence(top.values, top.indices, dense)
            mass = dense.detach().exp().gather(-1, top.indices).sum()
            means.add("privileged/student_mass", float(mass), len(ids))
            for t, token in enumerate(ids):
                means.add("privileged/token_probability", float(dense[t, token].exp()))
                means.add("privileged/rare_tokens", float(dense[t, token].exp()) < 0.01)
            tokens += len(ids)
        means.add("loss/distillation", total.item(), tokens)
        return total / tokens


def flat(model: Any) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def flat_gradient(model: Any) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def _std(values: list[float]) -> float:
    """Sample standard deviation, 0 for one value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
