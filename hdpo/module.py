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
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn

from hdpo.batching import TokenBatch
from hdpo.distributed import all_max, all_sum, merged_means, no_gradient_sync, reshard, shard_policy, world_size
from hdpo.experience import Experience, Sequences
from hdpo.functional.logprobs import SelectedLogProbs
from hdpo.losses import DistillationTerm, PolicyTerm
from hdpo.metrics import GreedyAccuracy, PassAtK
from hdpo.policy import Policy, PolicyConfig, load_tokenizer
from hdpo.policy_batch import PolicyBatch, Selection
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


class _MicroBatch(NamedTuple):
    """One forward and backward pass: a function that returns a sum over tokens, and what the sum is multiplied by."""

    total: Callable[[], Tensor]
    scale: float


class HDPOModule(LightningModule):
    """Owns the policy, the teacher, the engine, the verifier, the metrics and the combined loss.

    One loader batch is one step, whatever the number of updates, micro-batches and ranks. Losses are sums divided by
    denominators that are global over micro-batches and ranks, so that the update does not depend on how the work is
    split. With ``distillation_weight`` 0 this IS the GRPO baseline: the same code, and no privileged work at all.

    Args:
        policy: which model is trained.
        engine: samples the completions; default the transformers engine, which uses the policy's own weights.
        verifier: grades final answers; default math-verify in worker processes.
        optimizer: from YAML; default AdamW as in the paper's Table 2.
        lr_scheduler: from YAML, stepped once a step; default linear warm-up, then constant (Table 2).
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
        sampler_correction: ``truncated`` multiplies each token's loss by min(policy / sampler, threshold), for an
            engine whose probabilities differ from the policy's; ``none`` is the paper.
        sampler_correction_threshold: bound on that ratio.
        num_epochs: passes over one batch of rollouts, each with updates of its own; the paper makes one.
        num_minibatches: updates of one pass, each on as many prompts; the paper makes one. Whatever the number of
            updates, one batch is one step: of the trainer, the learning rate's schedule and the teacher.
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
        sampler_correction: Literal["none", "truncated"] = "none",
        sampler_correction_threshold: float = 2.0,
        num_epochs: int = 1,
        num_minibatches: int = 1,
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
        for key, number in (
            ("micro_batch_tokens", micro_batch_tokens),
            ("num_epochs", num_epochs),
            ("num_minibatches", num_minibatches),
        ):
            if number < 1:
                raise ValueError(f"model.{key} must be at least 1, got {number}")
        if sampler_correction_threshold <= 0:
            raise ValueError(f"model.sampler_correction_threshold must be positive, got {sampler_correction_threshold}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"model.max_grad_norm must be positive, or null for no clipping, got {max_grad_norm}")
        self.policy_config = policy
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.distillation_weight = distillation_weight
        self.divergence = divergence
        self.kl_coef = kl_coef
        #: Which rollouts are put through the policy.
        self.policy_batch = Selection(
            advantage_scale, aggregation, mask_truncated, count_zero_variance, needs_all=kl_coef > 0
        )
        self.policy_loss = PolicyTerm(
            temperature,
            aggregation,
            clip_eps_low,
            clip_eps_high,
            kl_coef,
            sampler_correction,
            sampler_correction_threshold,
        )
        self.distillation_loss = DistillationTerm(divergence, jsd_tail)
        self.num_epochs, self.num_minibatches = num_epochs, num_minibatches
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
        """Do the update on a completed experience (Algorithm 1, lines 4-5 and 15-17)."""
        started = time.perf_counter()
        optimizer = cast(LightningOptimizer, self.optimizers())
        num_updates = self.num_epochs * self.num_minibatches
        parts = [
            self.policy_batch(batch, self._members(batch.prompts.index.tolist(), part))
            for part in range(self.num_minibatches)
        ]
        if num_updates > 1:
            for items in parts:
                items.old_logps = self._old_logps(items)
        for update in range(num_updates):
            optimizer.zero_grad()
            part = update % self.num_minibatches
            self._accumulate(batch, parts[part], part)
            batch.statistics.add("optim/grad_norm", self._clip())
            if update + 1 == num_updates:
                optimizer.step()  # the trainer counts it
            else:
                self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        batch.statistics.add("optim/lr", optimizer.param_groups[0]["lr"])
        cast(Any, self.lr_schedulers()).step()
        self.teacher.update(self.student)
        if self.kl_coef > 0:
            reshard(self.reference.policy(self.student))
        batch.statistics.add("time/update", time.perf_counter() - started)
        self._log_step(batch)

    def on_train_batch_end(self, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Free the gradients, after the callbacks have seen them: the next rollouts need their memory."""
        cast(torch.optim.Optimizer, self.optimizers()).zero_grad()

    def _members(self, index: Sequence[int], part: int) -> list[int]:
        """Which prompts (or rollouts of prompts) belong to a minibatch, by their positions in the GLOBAL batch.

        So minibatches hold the same prompts on any number of ranks, and about equally many of each rank.
        """
        return [position for position, i in enumerate(index) if i % self.num_minibatches == part]

    def _old_logps(self, items: PolicyBatch) -> list[Tensor]:
        """Log-probabilities under the weights before the first of several updates."""
        packing = self.student.pack(items.sequences, self.micro_batch_tokens)
        num_passes = int(all_max([len(packing.groups)], self.device)[0])
        return self.student.completion_logps(
            items.sequences,
            token_budget=self.micro_batch_tokens,
            temperature=self.temperature,
            num_passes=num_passes,
        )

    def _accumulate(self, batch: Experience, items: PolicyBatch, part: int) -> None:
        """Add up the gradients of one update: policy loss first, while privileged answers may still be graded."""
        expected = batch.finish_distillation is not None or batch.distillation is not None
        losses = self._policy_losses(batch, items)
        self._backward(losses, more=expected)
        if batch.finish_distillation is not None:
            started = time.perf_counter()
            batch.finish_distillation()
            batch.finish_distillation = None
            batch.statistics.add("time/update", started - time.perf_counter(), 0.0)  # measured as stations of their own
        distilled = self._distillation_losses(batch, part)
        if not distilled and (not losses or (expected and world_size() > 1)):
            # Parameters without any gradient would be left out of momentum and weight decay; and where a loss was
            # expected, the gradients of several ranks are not averaged yet.
            distilled = [_MicroBatch(self._empty_loss, 1.0)]
        self._backward(distilled, more=False)

    def _backward(self, losses: list[_MicroBatch], *, more: bool) -> None:
        """Backward passes; gradients are averaged over ranks in the last one, unless there are ``more`` to come."""
        for i, item in enumerate(losses):
            loss = item.total() * item.scale
            sync = not more and i == len(losses) - 1
            with nullcontext() if sync else no_gradient_sync(self.trainer.strategy, self.student):
                # DDP and FSDP2 average gradients over ranks; the denominators are global already.
                self.manual_backward(loss * world_size())

    def _policy_losses(self, batch: Experience, items: PolicyBatch) -> list[_MicroBatch]:
        """The micro-batches of the policy loss, not computed yet: equally many on all ranks.

        A forward pass of a sharded policy, teacher or reference is a collective; a rank that has less to do makes up
        for it with empty losses.
        """
        packing = self.student.pack(items.sequences, self.micro_batch_tokens)
        (denominator,) = all_sum([items.denominator], self.device)
        (num_passes,) = all_max([len(packing.groups)], self.device)
        # Every rank adds its own counts: the merged statistic is then (global sum) / (global count).
        batch.statistics.add("loss/policy", 0.0, items.denominator)
        reference = self.reference.policy(self.student) if self.kl_coef > 0 else None
        losses = [
            _MicroBatch(
                partial(self.policy_loss, self.student, reference, items, group, packing.layout, batch.statistics),
                1.0 / max(denominator, 1.0),
            )
            for group in packing.groups
        ]
        return losses + [_MicroBatch(self._empty_policy_loss, 1.0)] * (int(num_passes) - len(losses))

    def _distillation_losses(self, batch: Experience, part: int) -> list[_MicroBatch]:
        """The same for the distillation loss; None on this rank means none on any."""
        items = batch.distillation
        if items is None or self.distillation_weight == 0:
            return []
        if self.num_minibatches > 1:
            items = items.select(self._members(items.index, part))
        packing = self.student.pack(items.student, self.micro_batch_tokens)
        (denominator,) = all_sum([items.num_tokens], self.device)
        (num_passes,) = all_max([len(packing.groups)], self.device)
        batch.statistics.add("loss/distillation", 0.0, items.num_tokens)
        weight = self.distillation_weight / max(denominator, 1.0)
        losses = [
            _MicroBatch(
                partial(self.distillation_loss, self.student, items, group, packing.layout, batch.statistics), weight
            )
            for group in packing.groups
        ]
        return losses + [_MicroBatch(self._empty_loss, 1.0)] * (int(num_passes) - len(losses))

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
