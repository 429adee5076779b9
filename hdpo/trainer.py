"""What the step needs of the Trainer: a fit that ends properly wherever it is resumed, and settings that fit."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from hdpo.errors import ConfigError

_PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class _UnboundGroup:
    """Frees the default process group of the device that Lightning binds it to.

    Groups that are formed inside a bound group, as vLLM forms its own, get their NCCL communicators by splitting its
    communicator, for which all ranks must meet (``bound_device_id`` in torch.distributed). Else each gets a new one.
    """

    def setup_environment(self) -> None:
        """As Lightning's, and then without a device."""
        super().setup_environment()  # type: ignore[misc]
        dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]


class UnboundDDPStrategy(_UnboundGroup, DDPStrategy):
    """DDP whose process group has no device; see configs/strategy/README.md for when to try it."""


class UnboundModelParallelStrategy(_UnboundGroup, ModelParallelStrategy):
    """FSDP2 whose process group has no device; see configs/strategy/README.md for when to try it."""


class _ResumableFitLoop(_FitLoop):
    """A fit that is resumed at its last step still evaluates, summarises and exports the policy; Lightning's does not.

    A run may be killed after its last update and before the end of the evaluation that follows it.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on at all."""
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0


def end_properly(trainer: Any) -> None:
    """Give a trainer the loop above, before it restores a checkpoint."""
    old = trainer.fit_loop
    if not isinstance(old, _ResumableFitLoop):
        trainer.fit_loop = _ResumableFitLoop(trainer)
        vars(trainer.fit_loop).update(vars(old))


def check_trainer(trainer: Any) -> None:
    """Refuse what cannot work, whether the trainer comes from the command line or from Python.

    Raises:
        ConfigError: the message names the key, and what to set.
    """
    from lightning.pytorch.callbacks import Timer

    if trainer.precision not in _PRECISIONS:
        raise ConfigError(
            f"trainer.precision must be one of {', '.join(_PRECISIONS)}, got {trainer.precision}: with the others "
            "updates are rounded away (true half precision) or gradients are clipped while they are scaled (16-mixed)"
        )
    if trainer.gradient_clip_val is not None:
        raise ConfigError("trainer.gradient_clip_val must stay null: set model.update.max_grad_norm instead")
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches must stay 1, since one batch is one step: set "
            "model.update.micro_batch_tokens for less memory, data.prompts_per_step for larger batches"
        )
    limit = trainer.limit_train_batches  # null is 1.0, all of them; 1 is a single one
    all_or_none = limit == 0 or (limit == 1 and isinstance(limit, float))
    if not all_or_none and not (trainer.fast_dev_run or trainer.overfit_batches):
        raise ConfigError(
            "trainer.limit_train_batches must stay null: the stream of prompts has no epochs, and each would begin "
            "with the same prompts; set trainer.max_steps"
        )
    if not trainer.val_check_interval:
        raise ConfigError(
            "trainer.val_check_interval must be a positive number of steps: for no evaluation set "
            "trainer.limit_val_batches to 0"
        )
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # max_time becomes one
    if trainer.state.fn == "fit" and trainer.max_steps == -1 and not timed:
        raise ConfigError("trainer.max_steps must be set: the stream of prompts has no end")
    check_strategy(trainer.strategy, trainer.num_devices * trainer.num_nodes)


def check_strategy(strategy: Any, num_processes: int) -> None:
    """Refuse an FSDP2 strategy that does not split the data, and nothing else, over all processes.

    Raises:
        ConfigError: the message names the key, and what to set.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    # Lightning's "auto" is one process per machine for the data, and the rest for the policy's tensors.
    for key, value, needed in (
        ("tensor_parallel_size", strategy._tensor_parallel_size, 1),
        ("data_parallel_size", strategy._data_parallel_size, num_processes),
    ):
        if value != needed:
            raise ConfigError(
                f"trainer.strategy.init_args.{key} is {value}, but must be {needed} with {num_processes} processes "
                f"(trainer.devices x trainer.num_nodes): add --trainer.strategy.init_args.{key} {needed}"
            )
