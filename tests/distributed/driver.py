"""One of the processes of a distributed test: runs the scenarios that it is told to, and writes down what happened.

Forked by :mod:`tests.distributed.launch`, with the environment that ``torchrun`` gives to a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from hdpo.callbacks import LastCheckpoint, Station
from hdpo.distributed import full_state_dict
from hdpo.errors import StopRequested
from hdpo.policy import LoRAConfig, PolicyConfig, packing
from tests.helpers import toy

PROMPTS_PER_STEP = 6
#: What the six prompts of a step are made to be, step by step: Cliff, Solved, Mixed; None leaves the rewards alone.
PATTERNS = [
    None,
    "CCMMSM",  # cliffs on the first rank only, for two and for three ranks
    "MCSSSS",  # no signal at all on all ranks but the first
    "MMSMMM",  # no cliff anywhere, so nothing to distil
    "SSSSSS",  # nothing at all
    "SSSCCC",  # no policy gradient anywhere, and the first rank distils nothing
]
#: A scenario's ``distillation`` that keeps every privileged rollout: cliffs are distilled, whatever the policy can do.
KEEP_ALL = {"success_reward": 0.0}


class Script(Station):
    """Overwrites rewards, so that a step is what the test wants it to be."""

    def __init__(self, patterns: list[str | None]) -> None:
        self.patterns = patterns

    def after_rollouts(self, trainer, pl_module, batch):
        pattern = self.patterns[trainer.global_step % len(self.patterns)]
        if pattern is not None:
            index = batch.prompts.index.tolist()
            alternating = torch.arange(batch.rollouts.num_generations) % 2
            rewards = {"C": 0.0 * alternating, "S": 0.0 * alternating + 1, "M": alternating}
            batch.rollouts.rewards = torch.stack([rewards[pattern[i]] for i in index])
            batch.rollouts.outcomes = [
                ["correct" if reward else "wrong" for reward in group] for group in batch.rollouts.rewards.tolist()
            ]
        # Deviations of groups are then float64 too: in float32 they depend on how many groups a rank has.
        batch.rollouts.rewards = batch.rollouts.rewards.double()


class Tape(Callback):
    """Keeps what a step saw on this rank, the weights after it, and how often gradients were averaged in it."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.kill_after = kill_after
        self.syncs = self.backwards = self.units = 0
        self.validation: dict[str, float] = {}

    def on_train_start(self, trainer, pl_module):
        self.syncs = 0
        if isinstance(trainer.strategy, DDPStrategy):

            def counted(state, bucket):
                self.syncs += int(bucket.is_last())
                return allreduce_hook(state, bucket)

            trainer.strategy.model.register_comm_hook(None, counted)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp._fully_shard import _fsdp_param_group

            original = _fsdp_param_group.foreach_reduce
            if not hasattr(original, "counts"):

                def reduce(*args, **kwargs):
                    reduce.counts += 1
                    return original(*args, **kwargs)

                reduce.counts = 0
                _fsdp_param_group.foreach_reduce = reduce
            self.units = 1 + pl_module.student.model.config.num_hidden_layers

    def on_before_backward(self, trainer, pl_module, loss):
        self.backwards += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp._fully_shard import _fsdp_param_group

            reductions = _fsdp_param_group.foreach_reduce.counts
            _fsdp_param_group.foreach_reduce.counts = 0
            self.syncs = reductions / self.units
        items = {name: (total, count) for name, total, count in batch.measurements.items()}
        self.steps.append(
            {
                "index": batch.prompts.index.tolist(),
                "rows": batch.prompts.row.tolist(),
                "rollouts": [
                    [ids[mask].tolist() for ids, mask in zip(*group, strict=True)]
                    for group in zip(batch.rollouts.completion_ids, batch.rollouts.completion_mask, strict=True)
                ],
                "cliffs": batch.is_cliff.tolist(),
                # Prompts whose rollouts have a policy gradient.
                "signal": (batch.rollouts.rewards.std(-1) > 0).tolist(),
                "distilled": list(batch.distillation.student.completion_ids) if batch.distillation else [],
                "denominators": [items[k][1] for k in ("loss/policy",)] + [items.get("loss/distillation", (0, 0))[1]],
                "gap": items.get("sampler/logprob_gap_max", (None,))[0],
                "merged_gap": batch.metrics.get("sampler/logprob_gap_max"),
                "metrics": {
                    k: v for k, v in batch.metrics.items() if not k.startswith(("time/", "speed/", "sampler/"))
                },
                "syncs": self.syncs,
                "backwards": self.backwards,
                "weights": full_weights(pl_module.student),
            }
        )
        self.syncs = self.backwards = 0

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


class KillWhileSaving(Callback):
    """Kills one process without any clean-up while the ranks write a checkpoint.

    A file is written by then, but not in place yet; of a folder the parts of the other ranks may be written.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, pl_module):
        strategy, save = trainer.strategy, trainer.strategy.save_checkpoint

        def killed(*args, **kwargs):
            last = trainer.global_step == self.step
            if last and isinstance(strategy, ModelParallelStrategy) and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args, **kwargs)
            if last and trainer.global_rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        strategy.save_checkpoint = killed


class Break(Callback):
    """Spoils one process alone in the middle of a step: kills it, lets it raise, or makes its gradient NaN."""

    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def _here(self, trainer: Any) -> bool:
        return trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1

    def on_before_backward(self, trainer, pl_module, loss):
        if self._here(trainer) and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._here(trainer) and self.how == "raise":
            raise ArithmeticError("an error of one rank")
        if self._here(trainer) and self.how == "nan":
            loss.register_hook(lambda gradient: gradient * float("nan"))


class Terminate(Callback):
    """Asks one process alone, the last one, to end: at the start of a step, before the ranks meet."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def full_weights(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Unsharded weights, cloned; on the first rank only under FSDP2."""
    return {k: v.detach().clone() for k, v in full_state_dict(policy).items()}


def strategy(name: str, world: int) -> Any:
    """The strategy as the overlays in configs/strategy give it."""
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=True)
    return DDPStrategy(gradient_as_bucket_view=True) if name == "ddp" else "auto"


def run(scenario: dict[str, Any], name: str, out: Path, rank: int, world: int) -> None:
    """Fit once and write ``<scenario>.rank<r>.pt``."""
    options = dict(scenario.get("module", {}))
    lora = LoRAConfig(**scenario["lora"]) if "lora" in scenario else None
    options["policy"] = PolicyConfig("pkg://hdpo.lab/policy", dtype=scenario.get("dtype", "float32"), lora=lora)
    if scenario.get("adamw"):
        options["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    tape = Tape()
    folder = out / scenario["folder"]
    trainer = toy.trainer(
        folder,
        tape,
        strategy=strategy(name, world),
        devices=world,
        max_steps=scenario["steps"],
        limit_val_batches=None if scenario.get("validate") else 0,
    )
    callbacks = trainer.callbacks
    callbacks.append(Script(scenario.get("patterns", PATTERNS)))
    if "kill_at" in scenario:
        callbacks.append(KillWhileSaving(scenario["kill_at"]))
    if "break" in scenario:
        callbacks.append(Break(scenario["break"], scenario["break_at"]))
    if "terminate_at" in scenario:
        callbacks.insert(0, Terminate(scenario["terminate_at"]))
    last = next(c for c in callbacks if isinstance(c, LastCheckpoint))
    last.every_n_steps = scenario.get("checkpoint_every", 1000)
    stations = {"rollouts": scenario.get("rollouts", {}), "distillation": scenario.get("distillation", {})}
    module = toy.module(**{"micro_batch_tokens": 256, **stations, **options})
    data = toy.datamodule(out.parent, **{"prompts_per_step": PROMPTS_PER_STEP, "num_val_problems": 7})
    with suppress(StopRequested) if "terminate_at" in scenario else nullcontext():
        trainer.fit(module, datamodule=data, ckpt_path=scenario.get("ckpt_path"))
    torch.save(
        {"steps": tape.steps, "validation": tape.validation, "average": _average(module)},
        out / f"{scenario['name']}.rank{rank}.pt",
    )


def _average(module: Any) -> dict[str, torch.Tensor]:
    average = getattr(module.teacher, "average", None)
    return {} if average is None else full_weights(average)


def main(specification: str, log: str, environment: dict[str, str]) -> None:
    """Run all scenarios of the specification in this process, whose output goes to ``log``."""
    os.environ.update(environment)
    # Locks of libraries are then no named ones, which a killed process would leave behind.
    multiprocessing.set_start_method("fork", force=True)
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    content = torch.load(specification, weights_only=True)
    # One layout, whatever a rank's share: the angles of rotary embeddings are float32, and their cosines may be
    # computed by other instructions where positions differ from row to row.
    packing._PASS = 10**9
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    for scenario in content["scenarios"]:
        run(scenario, content["strategy"], Path(content["out"]), rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()
