"""HDPOModule: the policy and the combined loss ``L_GRPO + lambda * L_JSD`` (paper, Algorithm 1, line 17)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig

from hdpo.callbacks.cliffs import CliffDetection
from hdpo.callbacks.distillation import DistillationRefresh
from hdpo.callbacks.evaluation import Evaluation, evaluated_split
from hdpo.callbacks.rollouts import RolloutGeneration
from hdpo.callbacks.samples import SampleLogger
from hdpo.callbacks.skipped import SkippedSteps
from hdpo.checkpoints import check_alpha, check_state
from hdpo.distributed import in_turns, merged_means, shard_policy
from hdpo.errors import ConfigError, check_at_least, first_line, instance_of
from hdpo.evaluation.curves import log_evaluation
from hdpo.evaluation.scores import Scores, group_ks
from hdpo.experience import Experience
from hdpo.generation import GenerationEngine, TransformersEngine
from hdpo.losses import JSD, ClippedPolicyLoss, Divergence, PolicyLoss, UpdateConfig
from hdpo.losses.update import update_policy
from hdpo.measurements import timed
from hdpo.optim import LinearWarmup, paper_adamw, prefer_fused
from hdpo.policy import Policy, PolicyConfig, load_tokenizer
from hdpo.policy.lora import is_frozen
from hdpo.rewards import MathVerifier, Verifier
from hdpo.teacher import DriftingTeacher, FrozenTeacher, Teacher
from hdpo.trainer import check_trainer, end_properly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HDPOModule"]


class HDPOModule(LightningModule):
    """Owns the policy, the teacher, the losses, the engine, the verifier, the metrics and the stations of a step.

    One loader batch is one step, whatever the number of updates, micro-batches and ranks. With
    ``distillation_weight`` and ``privileged_policy_weight`` 0 this IS the GRPO baseline: the same code, and no
    privileged work at all.

    Args:
        policy: which model is trained.
        engine: samples the completions; default the transformers engine, which uses the policy's own weights.
        verifier: grades final answers; default math-verify in worker processes.
        optimizer: from YAML; default AdamW as in the paper's Table 2.
        lr_scheduler: from YAML, stepped once per step; default linear warm-up, then constant (Table 2).
        policy_loss: the policy-gradient loss; default ``hdpo.losses.ClippedPolicyLoss``, the paper's.
        distillation_weight: lambda, the weight of the distillation loss; 0 is GRPO.
        privileged_policy_weight: weight of the policy loss on the privileged rollouts in their own context, relative to
            the plain ones: with distillation the joint training of pi-Distill (arXiv 2602.04942), which keeps the
            ability to use the context; without it hinted GRPO (POPE, arXiv 2601.18779; QuestA, 2507.13266).
        divergence: distance between teacher and student; default ``hdpo.losses.JSD``, the paper's.
        teacher: whose distribution is distilled; default ``hdpo.teacher.DriftingTeacher``, the current weights.
        update: number of updates per step, gradient clipping, micro-batches.
        pass_k: the values of k in pass@k; a named evaluation set reports those that its number of samples allows.
        rollouts: the first station; on the command line the section ``rollouts``.
        cliffs: the second station; the section ``cliffs``.
        distillation: the third station; the section ``distillation``.
        seed: from which every random number of the run derives; ``seed_everything`` on the command line.

    Raises:
        ConfigError: a value outside its range, or of the wrong kind; the message names the key.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        engine: GenerationEngine | None = None,
        verifier: Verifier | None = None,
        optimizer: OptimizerCallable = paper_adamw,
        lr_scheduler: LRSchedulerCallable = LinearWarmup,
        policy_loss: PolicyLoss | None = None,
        distillation_weight: float = 0.1,
        privileged_policy_weight: float = 0.0,
        divergence: Divergence | None = None,
        teacher: Teacher | None = None,
        update: UpdateConfig = UpdateConfig(),
        pass_k: Sequence[int] = (1, 4, 8),
        rollouts: RolloutGeneration | None = None,
        cliffs: CliffDetection | None = None,
        distillation: DistillationRefresh | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # no save_hyperparameters(): on resume it would override the command line
        check_at_least(
            0,
            model__distillation_weight=distillation_weight,
            model__privileged_policy_weight=privileged_policy_weight,
        )
        self.policy_config = policy
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.policy_loss = instance_of("policy_loss", policy_loss, PolicyLoss, ClippedPolicyLoss)
        self.distillation_weight = distillation_weight
        self.privileged_policy_weight = privileged_policy_weight
        self.divergence = instance_of("divergence", divergence, Divergence, JSD)
        self.teacher = instance_of("teacher", teacher, Teacher, DriftingTeacher)
        self.update = update
        self.pass_k = tuple(pass_k)
        self.scores = Scores({"": self.pass_k})
        self.rollouts = rollouts or RolloutGeneration()
        self.cliffs = cliffs or CliffDetection()
        self.distillation = distillation or DistillationRefresh()
        self.seed = seed
        self.policy: Policy | None = None
        #: The initial policy, where it is needed: one copy for teacher, sampler and the reference of a KL penalty.
        self.initial = self.teacher if isinstance(self.teacher, FrozenTeacher) else FrozenTeacher()
        #: Optimizer step of the checkpoint that was loaded, 0 without one.
        self.loaded_step = 0
        #: Whether the weights are in the middle of a step's update, a state that is none to save.
        self.is_updating = False
        # Outside the module tree: an engine may hold a model of its own. Workers and engines start at their first use.
        self.engine = instance_of("engine", engine, GenerationEngine, TransformersEngine)
        self.verifier = instance_of("verifier", verifier, Verifier, MathVerifier)

    # ------------------------------------------------------------------ what it owns

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return load_tokenizer(self.policy_config)

    @property
    def temperature(self) -> float:
        """Temperature of the rollouts, which is that of the policy loss."""
        return self.rollouts.temperature

    @property
    def privileged_temperature(self) -> float:
        """Temperature of the privileged rollouts."""
        return self.distillation.temperature

    @property
    def student(self) -> Policy:
        """The policy that is trained; available after :meth:`configure_model`."""
        assert self.policy is not None, "configure_model() comes first"
        return self.policy

    @property
    def reference_policy(self) -> Policy | None:
        """The initial policy, where there is a KL penalty."""
        return self.initial.policy(self.student) if self.policy_loss.kl_coef > 0 else None

    @property
    def reads_teacher(self) -> bool:
        """Whether anything is distilled that the teacher says or writes."""
        is_read = self.distillation.target == "distribution" or self.distillation.writer == "ema"
        return self.distillation_weight > 0 and is_read

    def configure_callbacks(self) -> list[Callback]:
        """The stations, in the order in which they act; no list of callbacks can drop or reorder them.

        Where the run has a folder of its own (TensorBoard's or the CSV logger's), also an :class:`Evaluation` and a
        :class:`SampleLogger`, unless the trainer has one: ``report`` and ``show`` then read it.
        """
        trainer = cast(Any, self.trainer)
        check_trainer(trainer)
        end_properly(trainer)
        stations: list[Callback] = [self.rollouts, self.cliffs, self.distillation]
        for callback in trainer.callbacks:
            if isinstance(callback, tuple(map(type, stations))) and callback not in stations:
                raise ConfigError(
                    f"trainer.callbacks must not hold {type(callback).__name__}: the stations belong to the module "
                    "(HDPOModule(rollouts=..., cliffs=..., distillation=...), or the sections of these names)"
                )
        recorded = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
        for kind in (Evaluation, SampleLogger) if recorded else ():
            if not any(isinstance(callback, kind) for callback in trainer.callbacks):
                stations.append(kind())
        return [*stations, SkippedSteps()]

    def configure_model(self) -> None:
        """Load policy, teacher and reference; idempotent, since Lightning calls it once for each stage."""
        if self.policy is not None:
            return
        self.policy = self._load_policy()
        if self.reads_teacher:
            self.teacher.prepare(self.policy, self._load_policy)
        if self.policy_loss.kl_coef > 0 or (self.distillation_weight > 0 and self.distillation.writer == "initial"):
            self.initial.prepare(self.policy, self._load_policy)

    def _load_policy(self) -> Policy:
        # Sharded, a policy may be one of which a machine does not hold a whole copy for each of its processes.
        with nullcontext() if self.device_mesh is None else in_turns():
            return self._load_whole_policy()

    def _load_whole_policy(self) -> Policy:
        policy = Policy.load(self.policy_config).train()
        if len(self.tokenizer) > policy.vocab_size:
            raise ConfigError(
                f"model.policy.path: the policy has {policy.vocab_size} tokens, but its tokenizer "
                f"{len(self.tokenizer)}: take the tokenizer that the policy was trained with, or resize its embeddings"
            )
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        shard_policy(policy, mesh, self.policy_config.gather_dtype)
        return policy

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build optimizer and scheduler over the policy's trained parameters alone."""
        try:
            optimizer = self.optimizer_factory([p for p in self.student.parameters() if p.requires_grad])
            prefer_fused(optimizer, self.device)
        except ValueError as error:  # torch's word on a value out of range
            raise ConfigError(f"model.optimizer: {first_line(error)}") from error
        for key, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"model.optimizer.init_args.{key} must be a finite number, got {value}")
        scheduler: LRSchedulerConfigType = {"scheduler": cast(Any, self.scheduler_factory(optimizer))}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def setup(self, stage: str) -> None:
        """Create the metrics of each set and source of the evaluation's problems."""
        if stage != "predict" and (ks := self.evaluated_k()) != self.scores.ks:
            self.scores = Scores(ks)

    def evaluated_k(self) -> dict[str, tuple[int, ...]]:
        """The k of pass@k for all problems (``""``) and for each group of the evaluation; see :func:`group_ks`."""
        groups = getattr(getattr(self.trainer, "datamodule", None), "evaluation_groups", {})
        return group_ks(self.pass_k, {name: n or self.rollouts.num_val_samples for name, n in groups.items()})

    def teardown(self, stage: str) -> None:
        """Stop the verifier's workers and release the engine."""
        self.engine.close()
        self.verifier.close()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit; remember the weights' step: outside ``fit`` the trainer does not count steps."""
        if self.policy is not None and (lora := self.policy_config.lora) is not None:
            check_alpha(lora.alpha, checkpoint, f"the checkpoint {cast(Any, self.trainer).ckpt_path}")
            checkpoint["state_dict"] |= {k: v for k, v in self.state_dict().items() if is_frozen(k)}
        self.loaded_step = check_state(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of an adapter, note its scale and leave out the weights that are not trained: the initial policy has them."""
        if self.policy is not None and (lora := self.policy_config.lora) is not None:
            checkpoint["lora_alpha"] = lora.alpha
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not is_frozen(k)}

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """Update the policy on a completed experience; schedule and teacher follow once per step."""
        optimizer = cast(Any, self.optimizers())
        self.is_updating = True
        with timed(batch.measurements, "update"):
            batch.measurements.add("optim/lr", optimizer.param_groups[0]["lr"])
            taken = update_policy(cast(Any, self), batch)
            if taken:
                cast(Any, self.lr_schedulers()).step()
                if self.reads_teacher:
                    self.teacher.update(self.student)
        self.is_updating = False
        if batch.started is not None:
            batch.measurements.add("time/step", time.perf_counter() - batch.started)
        self._log_step(batch)

    def on_train_batch_end(self, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Free the gradients, after the callbacks have seen them: the next rollouts need their memory."""
        cast(torch.optim.Optimizer, self.optimizers()).zero_grad()

    def _log_step(self, batch: Experience) -> None:
        metrics = merged_means(batch.measurements)
        metrics["loss/total"] = metrics.get("loss/policy", 0.0)
        metrics["loss/total"] += self.policy_loss.kl_coef * metrics.get("loss/kl", 0.0)
        metrics["loss/total"] += self.privileged_policy_weight * metrics.get("loss/privileged_policy", 0.0)
        metrics["loss/total"] += self.distillation_weight * metrics.get("loss/distillation", 0.0)
        batch.metrics = metrics
        # Straight to the loggers: self.log would repeat a name's last value in every step that does not measure it
        # (a step without cliffs has no privileged pass rate).
        step = self.global_step - 1
        interval = cast(Any, self.trainer).log_every_n_steps
        if interval and step % interval == 0:  # Lightning's 0 logs nothing
            for logger in self.loggers:
                logger.log_metrics(metrics, step=step)
        for name, shown in (("reward", "rollout/reward"), ("cliffs", "cliff/fraction")):
            if shown in metrics:  # not where no rollout has a verdict
                self.log(name, metrics[shown], prog_bar=True, logger=False)

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Experience, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the successes of the sampled and the greedy completions."""
        assert batch.rollouts is not None, "RolloutGeneration completes the experience first"
        assert batch.greedy is not None, "RolloutGeneration completes the experience first"
        prompts, correct, greedy = batch.prompts, batch.rollouts.success, batch.greedy.success[:, 0]
        correct, greedy, valid = (x.to(self.device) for x in (correct, greedy, prompts.valid))
        self.scores.update(correct, greedy, prompts.source, valid, prompts.dataset)

    test_step = validation_step

    def predict_step(self, batch: Experience, batch_idx: int, dataloader_idx: int = 0) -> Experience:
        """Return the completed experience; a writer turns it into JSON lines."""
        return batch

    def on_validation_epoch_end(self) -> None:
        """Log pass@k, any@k and greedy accuracy, overall, by set and by source."""
        stage = "test" if evaluated_split(self.trainer) == "test" else "val"
        values = self.scores.compute_and_reset(stage)
        best = f"pass@{max(self.scores.ks[''])}"
        self.log(best, values[f"{stage}/{best}"], prog_bar=True, logger=False)
        trainer = cast(Any, self.trainer)
        fits = trainer.state.fn == "fit"
        # Outside fit, what self.log hands to the loggers is also what `trainer.validate` and `trainer.test` return.
        self.log_dict(values, logger=not fits)
        if fits and not trainer.sanity_checking:
            log_evaluation(self.loggers, {name: float(value) for name, value in values.items()}, self.global_step)

    on_test_epoch_end = on_validation_epoch_end
