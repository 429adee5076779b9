"""HDPOModule: the policy and the combined loss ``L_GRPO + lambda * L_JSD`` (paper, Algorithm 1, line 17)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn

from hdpo.distributed import all_max, all_sum, merged_means, no_gradient_sync, shard_policy, world_size
from hdpo.experience import DistillationBatch, Experience, Sequences
from hdpo.functional import (
    clipped_policy_loss,
    group_advantages,
    k3_kl,
    loss_denominator,
    token_weights,
    topk_forward_kl_from_logps,
    topk_jsd_from_logps,
    topk_reverse_kl_from_logps,
)
from hdpo.functional.logprobs import SelectedLogProbs
from hdpo.metrics import GreedyAccuracy, PassAtK
from hdpo.policy import Policy, PolicyConfig, TokenBatch, load_tokenizer, micro_batches
from hdpo.teacher import FrozenTeacher, TeacherKind, make_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hdpo.generation import GenerationEngine
    from hdpo.rewards import Verifier

__all__ = ["HDPOModule", "LinearWarmup"]


class LinearWarmup(torch.optim.lr_scheduler.LinearLR):
    """Linear from ``start_factor`` to 1 over ``num_warmup_steps`` steps, then constant (paper, Table 2).

    Args:
        optimizer: whose learning rate is scaled.
        num_warmup_steps: steps until the full learning rate; 0 starts with it.
        start_factor: share of the learning rate in the first step, in (0, 1].
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_warmup_steps: int = 50, start_factor: float = 0.1) -> None:
        factor = start_factor if num_warmup_steps > 0 else 1.0
        super().__init__(optimizer, start_factor=factor, end_factor=1.0, total_iters=max(1, num_warmup_steps))


class _Passes(NamedTuple):
    """The micro-batches of one step: index groups into the policy's and into the distillation's sequences."""

    policy: list[list[int]]
    distillation: list[list[int]]


class _MicroBatch(NamedTuple):
    """One forward and backward pass: a function that returns a sum over tokens, and what the sum is multiplied by."""

    total: Callable[[], Tensor]
    scale: float


class _PolicyBatch(NamedTuple):
    """The rollouts that carry a gradient, ragged, and what the loss needs of each.

    ``denominator`` is the number of tokens (or sequences) of ALL rollouts that count, with or without a gradient.
    """

    sequences: Sequences
    advantages: Tensor
    sampler_logps: list[Tensor]
    denominator: float


class HDPOModule(LightningModule):
    """Owns the policy, the teacher, the engine, the verifier, the metrics and the combined loss.

    One loader batch is one optimizer step, whatever the number of micro-batches and ranks. Losses are sums divided by
    denominators that are global over micro-batches and ranks, so that the update does not depend on how the work is
    split. With ``distillation_weight`` 0 this IS the GRPO baseline: the same code, and no privileged work at all.

    Args:
        policy: which model is trained.
        engine: samples the completions; default the transformers engine, which uses the policy's own weights.
        verifier: grades final answers; default math-verify in worker processes.
        optimizer: from YAML; default AdamW as in the paper's Table 2.
        lr_scheduler: from YAML, stepped once an optimizer step; default linear warm-up, then constant (Table 2).
        distillation_weight: lambda, the weight of the distillation loss; 0 is GRPO.
        teacher: whose distribution is distilled: ``drifting`` (current weights), ``frozen`` (initial) or ``ema``.
        teacher_decay: decay of the ``ema`` teacher, per step.
        divergence: distance between the teacher's truncated and the student's full distribution.
        jsd_tail: the JSD's term outside the teacher's top k: ``exact``, or the ``paper``'s literal factor.
        advantage_scale: what group advantages are divided by: the group's ``std``, ``none``, or
            ``leave_one_out_std`` (a known defect, for parity only).
        clip_eps_low: lower clip of the probability ratio, 1 - clip_eps_low.
        clip_eps_high: upper clip, 1 + clip_eps_high.
        aggregation: mean over all ``token``s of the step (paper) or over ``sequence``s of their token means.
        kl_coef: weight of the k3 estimate of KL(policy || initial policy); the paper uses 0.
        mask_truncated: leave completions that hit the token limit out of the policy loss and its denominator.
        count_zero_variance: whether tokens of groups without variance count in the denominator (paper: yes).
        max_grad_norm: gradients are clipped to this norm; null for no clipping.
        micro_batch_tokens: tokens (padding included) of one forward and backward pass on one rank.
        pass_k: the k of pass@k in validation.
        temperature: of the rollouts; set by ``rollouts.temperature``.

    Raises:
        ValueError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        engine: GenerationEngine | None = None,
        verifier: Verifier | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = LinearWarmup,
        distillation_weight: float = 0.1,
        teacher: TeacherKind = "drifting",
        teacher_decay: float = 0.99,
        divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd",
        jsd_tail: Literal["exact", "paper"] = "exact",
        advantage_scale: Literal["std", "none", "leave_one_out_std"] = "std",
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        aggregation: Literal["token", "sequence"] = "token",
        kl_coef: float = 0.0,
        mask_truncated: bool = False,
        count_zero_variance: bool = True,
        max_grad_norm: float | None = 1.0,
        micro_batch_tokens: int = 16384,
        pass_k: Sequence[int] = (1, 4, 8),
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        # No save_hyperparameters(): on resume it would override YAML and command line. The run's config.yaml records.
        self.automatic_optimization = False
        for key, value in (
            ("distillation_weight", distillation_weight),
            ("kl_coef", kl_coef),
            ("clip_eps_low", clip_eps_low),
            ("clip_eps_high", clip_eps_high),
        ):
            if value < 0:
                raise ValueError(f"model.{key} must not be negative, got {value}")
        if micro_batch_tokens < 1:
            raise ValueError(f"model.micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"model.max_grad_norm must be positive, or null for no clipping, got {max_grad_norm}")
        self.policy_config = policy
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.distillation_weight = distillation_weight
        self.divergence, self.jsd_tail = divergence, jsd_tail
        self.advantage_scale = advantage_scale
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.aggregation = aggregation
        self.kl_coef = kl_coef
        self.mask_truncated, self.count_zero_variance = mask_truncated, count_zero_variance
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.policy: Policy | None = None
        self.teacher = make_teacher(teacher, teacher_decay)
        self.reference = FrozenTeacher()
        self.pass_k = tuple(pass_k)
        self.pass_at_k = PassAtK(k=self.pass_k)
        self.greedy_accuracy = GreedyAccuracy()
        self.source_names: list[str] = []
        self.source_pass_at_k = nn.ModuleList()
        self.source_greedy_accuracy = nn.ModuleList()
        #: Optimizer step of the checkpoint that was loaded, 0 without one.
        self.loaded_step = 0
        # Outside the module tree: an engine may hold a model of its own.
        self._engine, self._verifier = engine, verifier
        self._tokenizer: PreTrainedTokenizerBase | None = None

    # ------------------------------------------------------------------ what it owns

    @property
    def engine(self) -> GenerationEngine:
        """The engine that samples; the transformers engine unless configured."""
        if self._engine is None:
            from hdpo.generation import TransformersEngine

            self._engine = TransformersEngine()
        return self._engine

    @property
    def verifier(self) -> Verifier:
        """The verifier; math-verify unless configured. Its workers start with the first answers."""
        if self._verifier is None:
            from hdpo.rewards import MathVerifier

            self._verifier = MathVerifier()
        return self._verifier

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.policy_config)
        return self._tokenizer

    @property
    def student(self) -> Policy:
        """The policy that is trained; available after :meth:`configure_model`."""
        assert self.policy is not None, "configure_model() comes first"
        return self.policy

    def _load_policy(self) -> Policy:
        policy = Policy.load(self.policy_config).train()
        mesh = self.device_mesh
        if mesh is not None:
            shard_policy(policy, mesh["data_parallel"])
        return policy

    def configure_model(self) -> None:
        """Load policy, teacher and reference; idempotent, since Lightning calls it once for each stage."""
        if self.policy is not None:
            return
        self.policy = self._load_policy()
        if self.distillation_weight > 0:
            self.teacher.prepare(self.policy, self._load_policy)
        if self.kl_coef > 0:
            self.reference.prepare(self.policy, self._load_policy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which step the weights are from: outside ``fit`` the trainer does not count steps."""
        self.loaded_step = int(checkpoint.get("global_step", 0))

    def setup(self, stage: str) -> None:
        """Create the metrics of each ``problem_source`` that the validation set has."""
        datamodule = getattr(self.trainer, "datamodule", None)
        names = list(getattr(datamodule, "val_sources", []))
        if names != self.source_names:
            self.source_names = names
            self.source_pass_at_k = nn.ModuleList(PassAtK(k=self.pass_k) for _ in names)
            self.source_greedy_accuracy = nn.ModuleList(GreedyAccuracy() for _ in names)

    def teardown(self, stage: str) -> None:
        """Stop the verifier's workers and release the engine."""
        if self._engine is not None:
            self._engine.close()
        if self._verifier is not None:
            self._verifier.close()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build optimizer and scheduler over the policy's parameters alone."""
        optimizer = self.optimizer_factory(self.student.parameters())
        scheduler: LRSchedulerConfigType = {"scheduler": cast(Any, self.scheduler_factory(optimizer))}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """Do one optimizer step on a completed experience (Algorithm 1, lines 4-5 and 15-17)."""
        started = time.perf_counter()
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        optimizer.zero_grad()
        policy_batch = self.policy_batch(batch)
        distillation = batch.distillation if self.distillation_weight > 0 else None
        num_tokens = distillation.num_tokens if distillation is not None else 0
        denominators = all_sum([policy_batch.denominator, num_tokens], self.device)
        passes = self._plan(policy_batch, distillation)
        losses = self._losses(batch, policy_batch, distillation, passes, denominators)
        for i, item in enumerate(losses):
            loss = item.total() * item.scale
            # DDP and FSDP2 average gradients over ranks; the denominators are global already.
            is_last = i == len(losses) - 1
            with nullcontext() if is_last else no_gradient_sync(self.trainer.strategy, self.student):
                self.manual_backward(loss * world_size())
        stats = batch.statistics
        stats.add("optim/grad_norm", self._clip())
        stats.add("optim/lr", optimizer.param_groups[0]["lr"])
        optimizer.step()
        cast(Any, self.lr_schedulers()).step()
        self.teacher.update(self.student)
        stats.add("time/update", time.perf_counter() - started)
        self._log_step(batch)

    def on_train_batch_end(self, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Free the gradients, after the callbacks have seen them: the next rollouts need their memory."""
        cast(torch.optim.Optimizer, self.optimizers()).zero_grad()

    def policy_batch(self, batch: Experience) -> _PolicyBatch:
        """Select the rollouts that carry a gradient, and count the tokens that the mean is over.

        A rollout whose advantage is exactly 0 adds exactly nothing to the gradient of the clipped surrogate, so it is
        not put through the policy at all; it still counts in the denominator. This is decided here and nowhere else.
        """
        rollouts = batch.rollouts
        assert rollouts is not None, "RolloutGeneration completes the experience first"
        advantages = group_advantages(rollouts.rewards, scale=self.advantage_scale)
        lengths = rollouts.completion_mask.sum(-1)
        counted = torch.ones_like(rollouts.truncated)
        if self.mask_truncated:
            counted &= ~rollouts.truncated
        if not self.count_zero_variance:
            counted &= (rollouts.rewards != rollouts.rewards[:, :1]).any(-1, keepdim=True)
        # A KL penalty has a gradient everywhere; without one only non-zero advantages do.
        needed = counted if self.kl_coef > 0 else counted & (advantages != 0)
        rows, columns = needed.nonzero(as_tuple=True)
        masks = rollouts.completion_mask[rows, columns]
        ids = [x[m].tolist() for x, m in zip(rollouts.completion_ids[rows, columns], masks, strict=True)]
        sequences = Sequences([batch.prompts.prompt_ids[i] for i in rows.tolist()], ids)
        return _PolicyBatch(
            sequences,
            advantages[rows, columns],
            [x[m] for x, m in zip(rollouts.sampler_logps[rows, columns], masks, strict=True)],
            float(loss_denominator(lengths[counted], self.aggregation)),
        )

    def _plan(self, policy_batch: _PolicyBatch, distillation: DistillationBatch | None) -> _Passes:
        policy = micro_batches(policy_batch.sequences.lengths(), self.micro_batch_tokens)
        if distillation is None or len(distillation) == 0:
            return _Passes(policy, [])
        return _Passes(policy, micro_batches(distillation.student.lengths(), self.micro_batch_tokens))

    def _losses(
        self,
        batch: Experience,
        policy_batch: _PolicyBatch,
        distillation: DistillationBatch | None,
        passes: _Passes,
        denominators: list[float],
    ) -> list[_MicroBatch]:
        """The micro-batches of the combined loss, not computed yet: equally many of each kind on all ranks.

        A forward pass of a sharded policy, teacher or reference is a collective; a rank that has less to do makes up
        for it with empty losses.
        """
        num_policy, num_distillation = (
            int(number) for number in all_max([len(passes.policy), len(passes.distillation)], self.device)
        )
        empty = _MicroBatch(self._empty_loss, 1.0)
        policy_tokens, distilled_tokens = (max(d, 1.0) for d in denominators)
        losses = [
            _MicroBatch(partial(self._policy_loss, batch, policy_batch, group), 1.0 / policy_tokens)
            for group in passes.policy
        ]
        losses += [_MicroBatch(self._empty_policy_loss, 1.0)] * (num_policy - len(losses))
        # Every rank adds its own counts: the merged statistic is then (global sum) / (global count).
        batch.statistics.add("loss/policy", 0.0, policy_batch.denominator)
        if distillation is not None:
            weight = self.distillation_weight / distilled_tokens
            losses += [
                _MicroBatch(partial(self._distillation_loss, batch, distillation, group), weight)
                for group in passes.distillation
            ]
            losses += [empty] * (num_distillation - len(passes.distillation))
            batch.statistics.add("loss/distillation", 0.0, distillation.num_tokens)
        return losses or [empty]

    def _policy_loss(self, batch: Experience, items: _PolicyBatch, group: list[int]) -> Tensor:
        """Sum (not mean) of the clipped surrogate over one micro-batch."""
        tokens = TokenBatch.from_sequences(items.sequences.select(group), self.device)
        logps = cast(SelectedLogProbs, self.student(tokens, temperature=self.temperature)).logps[:, 0]
        lengths = torch.tensor(tokens.lengths, device=self.device)
        weights = token_weights(lengths, self.aggregation)
        # One update a batch: the policy that sampled is the policy that is updated, so the ratio is exp(0) = 1 and its
        # gradient is that of log pi. No second forward pass is needed for the old log-probabilities.
        result = clipped_policy_loss(
            logps,
            logps.detach(),
            items.advantages[group].repeat_interleave(lengths),
            weights=weights,
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
        )
        loss = result.loss_sum
        stats = batch.statistics
        stats.add("loss/policy", loss.detach(), 0.0)
        if self.kl_coef > 0:
            with torch.no_grad():
                reference = self.reference.policy(self.student)
                ref_logps = cast(SelectedLogProbs, reference(tokens, temperature=self.temperature)).logps[:, 0]
            kl = (k3_kl(logps, ref_logps) * weights).sum()
            stats.add("loss/kl", kl.detach(), float(weights.sum()))
            loss = loss + self.kl_coef * kl
        return loss

    def _distillation_loss(self, batch: Experience, items: DistillationBatch, group: list[int]) -> Tensor:
        """Sum (not mean) of the divergence over the completion tokens of one micro-batch (Algorithm 1, line 16)."""
        tokens = TokenBatch.from_sequences(items.student.select(group), self.device)
        ids = torch.cat([items.topk_ids[i] for i in group]).to(self.device)
        teacher = torch.cat([items.topk_logits[i] for i in group]).to(self.device).log_softmax(-1)
        logps = cast(SelectedLogProbs, self.student(tokens, ids)).logps
        match self.divergence:
            case "jsd":
                values = topk_jsd_from_logps(logps, teacher, tail=self.jsd_tail)
            case "forward_kl":
                values = topk_forward_kl_from_logps(logps, teacher)
            case _:
                values = topk_reverse_kl_from_logps(logps, teacher)
        stats = batch.statistics
        stats.add("loss/distillation", values.detach().sum(), 0.0)
        stats.add("privileged/student_mass", logps.detach().exp().sum(), float(len(logps)))
        return values.sum()

    def _empty_loss(self) -> Tensor:
        """A zero that is connected to every parameter, so that no rank waits for a gradient that never comes."""
        tokens = TokenBatch.from_sequences(Sequences([[0]], [[0]]), self.device)
        return cast(SelectedLogProbs, self.student(tokens)).logps.sum() * 0.0

    def _empty_policy_loss(self) -> Tensor:
        """As :meth:`_empty_loss`, then the reference's forward pass: the same collectives in the same order."""
        loss = self._empty_loss()
        if self.kl_coef > 0:
            with torch.no_grad():
                self.reference.policy(self.student)(TokenBatch.from_sequences(Sequences([[0]], [[0]]), self.device))
        return loss

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(
            self.student.parameters(), self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        )
        full = getattr(norm, "full_tensor", None)  # a DTensor under FSDP2
        return float(full() if full is not None else norm)

    def _log_step(self, batch: Experience) -> None:
        means = merged_means(batch.statistics)
        means["loss/total"] = means.get("loss/policy", 0.0)
        means["loss/total"] += self.kl_coef * means.get("loss/kl", 0.0)
        means["loss/total"] += self.distillation_weight * means.get("loss/distillation", 0.0)
        batch.metrics = means
        # Straight to the loggers: self.log would repeat a name's last value in every step that does not measure it
        # (a step without cliffs has no privileged pass rate).
        step = self.global_step - 1
        if step % cast(Any, self.trainer).log_every_n_steps == 0:
            for logger in self.loggers:
                logger.log_metrics(means, step=step)
        self.log("reward", means["rollout/reward"], prog_bar=True, logger=False)
        self.log("cliffs", means["cliff/fraction"], prog_bar=True, logger=False)

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Experience, batch_idx: int) -> None:
        """Count the successes of the sampled and the greedy completions."""
        self._evaluate(batch)

    def test_step(self, batch: Experience, batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self._evaluate(batch)

    def predict_step(self, batch: Experience, batch_idx: int) -> Experience:
        """Return the completed experience; a writer turns it into JSON lines."""
        return batch

    def _evaluate(self, batch: Experience) -> None:
        assert batch.rollouts is not None, "RolloutGeneration completes the experience first"
        assert batch.greedy is not None, "RolloutGeneration completes the experience first"
        correct = batch.rollouts.rewards >= 1.0
        greedy = batch.greedy.rewards[:, 0] >= 1.0
        valid = batch.prompts.valid.to(self.device)
        self.pass_at_k.update(correct, valid)
        self.greedy_accuracy.update(greedy, valid)
        for name, passes, accuracy in zip(
            self.source_names, self.source_pass_at_k, self.source_greedy_accuracy, strict=True
        ):
            mine = valid & torch.tensor([s == name for s in batch.prompts.source], device=self.device)
            cast(PassAtK, passes).update(correct, mine)
            cast(GreedyAccuracy, accuracy).update(greedy, mine)

    def on_validation_epoch_end(self) -> None:
        """Log pass@k, any@k and greedy accuracy, overall and by source."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        groups: list[tuple[str, Any, Any]] = [(stage, self.pass_at_k, self.greedy_accuracy)]
        groups += [
            (f"{stage}/{name}", passes, accuracy)
            for name, passes, accuracy in zip(
                self.source_names, self.source_pass_at_k, self.source_greedy_accuracy, strict=True
            )
        ]
        for prefix, passes, accuracy in groups:
            values = {f"{prefix}/{name}": value for name, value in passes.compute().items()}
            values[f"{prefix}/greedy_accuracy"] = accuracy.compute()
            self.log_dict(values)
            passes.reset()
            accuracy.reset()
        best = f"pass@{max(self.pass_k)}"
        self.log(best, self.trainer.callback_metrics[f"{stage}/{best}"], prog_bar=True, logger=False)
