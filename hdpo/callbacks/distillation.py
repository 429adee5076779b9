"""Third station: privileged rollouts of the cliffs, filtered, and the teacher's distribution on them.

Paper, Algorithm 1, lines 7-14: the same engine samples from the CURRENT weights with the ground truth in the prompt
(also when the teacher is frozen); completions with R = 1 are kept, which is rejection sampling from the optimal
KL-regularised policy (Proposition 2); the teacher's top-k logits on them are what is distilled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from hdpo.callbacks.stations import GradingSamples, Purpose, num_copies, sample, timed
from hdpo.distributed import all_max, all_sum, gather_objects, world_size
from hdpo.experience import DistillationBatch, Experience, Sequences, merge_equal
from hdpo.functional.random import derive_seeds
from hdpo.generation.engine import SamplingConfig
from hdpo.teacher import teacher_topk

__all__ = ["DistillationRefresh"]

# The buffer holds plain containers: (student context, privileged context, completion), all token ids, and the prompt's
# position in the global batch.
_Entry = tuple[list[int], list[int], list[int], int]


class DistillationRefresh(Callback):
    """Refreshes the buffer of correct privileged rollouts, and adds ``batch.distillation``.

    With ``model.distillation_weight`` 0 it does nothing.

    Args:
        num_privileged: J, privileged rollouts a cliff.
        max_cliffs_per_step: privileged rollouts are sampled for at most this many cliffs of the GLOBAL batch
            (paper, Table 2: 32), those that come first in it.
        temperature: of the privileged rollouts.
        max_new_tokens: their token limit.
        success_reward: a privileged rollout is kept if its reward is at least this (paper, Table 2: 1.0).
        topk: how many of the teacher's logits are distilled (paper, Table 2: 64).
        refresh_every: steps that the buffer lives. With 1 (paper) it holds this step's rollouts. With more, the
            rollouts are sampled every ``refresh_every`` steps and distilled in each step between; the teacher reads
            them anew in each step, so that a drifting teacher is always the current policy.
        seed: run seed; set by ``seed_everything``.

    Raises:
        ValueError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        num_privileged: int = 4,
        max_cliffs_per_step: int = 32,
        temperature: float = 1.0,
        max_new_tokens: int = 3072,
        success_reward: float = 1.0,
        topk: int = 64,
        refresh_every: int = 1,
        seed: int = 42,
    ) -> None:
        for key, value in (
            ("num_privileged", num_privileged),
            ("topk", topk),
            ("refresh_every", refresh_every),
            ("max_new_tokens", max_new_tokens),
        ):
            if value < 1:
                raise ValueError(f"distillation.{key} must be at least 1, got {value}")
        if max_cliffs_per_step < 0:
            raise ValueError(f"distillation.max_cliffs_per_step must not be negative, got {max_cliffs_per_step}")
        if temperature <= 0:
            raise ValueError(f"distillation.temperature must be positive, got {temperature}")
        self.num_privileged = num_privileged
        self.max_cliffs_per_step = max_cliffs_per_step
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.success_reward = success_reward
        self.topk = topk
        self.refresh_every = refresh_every
        self.seed = seed
        self._buffer: list[_Entry] = []
        self._warned = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int) -> None:
        """Sample privileged rollouts; ``batch.finish_distillation`` adds what of them is distilled."""
        if pl_module.distillation_weight > 0:
            due = trainer.global_step % self.refresh_every == 0
            chosen = self._chosen(batch) if due else []
            num_chosen, num_kept = all_sum([len(chosen), 0 if due else len(self._buffer)], pl_module.device)
            if num_chosen:
                samples = self._sample(trainer, pl_module, batch, chosen)
                # Graded beside the forward and backward passes of the policy loss, which need nothing of it.
                batch.finish_distillation = partial(self._finish, trainer, pl_module, batch, chosen, samples)
            elif due:
                self._buffer = []
                batch.statistics.add("privileged/kept", 0, None)
            elif num_kept:
                batch.finish_distillation = partial(self._finish, trainer, pl_module, batch)
        pl_module.engine.after_rollouts()

    def _finish(
        self,
        trainer: Any,
        module: Any,
        batch: Experience,
        chosen: Sequence[int] = (),
        samples: GradingSamples | None = None,
    ) -> None:
        if samples is not None:
            self._buffer = self._filtered(batch, chosen, samples)
        batch.distillation = self._with_teacher(trainer, module, batch)

    # ------------------------------------------------------------------ privileged rollouts

    def _chosen(self, batch: Experience) -> list[int]:
        """Positions (in this rank's batch) of the cliffs that get privileged rollouts."""
        assert batch.is_cliff is not None, "CliffDetection completes the experience first"
        prompts, stats = batch.prompts, batch.statistics
        cliffs = batch.is_cliff.nonzero()[:, 0].tolist()
        usable = [i for i in cliffs if prompts.privileged_ids[i]]
        stats.add("privileged/too_long", len(cliffs) - len(usable), None)
        index = prompts.index.tolist()
        everywhere = sorted(i for part in gather_objects([index[i] for i in usable]) for i in part)
        allowed = set(everywhere[: self.max_cliffs_per_step])
        chosen = [i for i in usable if index[i] in allowed]
        stats.add("privileged/over_limit", len(usable) - len(chosen), None)
        return chosen

    def _sample(self, trainer: Any, module: Any, batch: Experience, chosen: Sequence[int]) -> GradingSamples:
        """Sample privileged rollouts of this step's cliffs in one call."""
        prompts = batch.prompts
        eos = {*module.student.eos_token_ids, module.tokenizer.eos_token_id}
        return sample(
            trainer,
            module,
            [prompts.privileged_ids[i] for i in chosen],
            [prompts.reference[i] for i in chosen],
            derive_seeds(
                self.seed,
                int(Purpose.PRIVILEGED),
                trainer.global_step,
                prompts.index[list(chosen)][:, None],
                torch.arange(self.num_privileged),
            ),
            SamplingConfig(self.max_new_tokens, self.temperature, tuple(sorted(eos))),
            batch.statistics,
            "privileged",
            drafts=[prompts.solution[i] for i in chosen],
        )

    def _filtered(self, batch: Experience, chosen: Sequence[int], samples: GradingSamples) -> list[_Entry]:
        """The privileged rollouts that succeeded."""
        prompts, stats = batch.prompts, batch.statistics
        rollouts, ids = samples.rollouts(), samples.completions.token_lists()
        entries: list[_Entry] = []
        kept_texts, kept_solutions = [], []
        for j, i in enumerate(chosen):
            batch.privileged_texts[i] = list(zip(rollouts.texts[j], rollouts.outcomes[j], strict=True))
            kept = [s for s in range(self.num_privileged) if rollouts.rewards[j, s] >= self.success_reward]
            index = int(prompts.index[i])
            entries += [(prompts.prompt_ids[i], prompts.privileged_ids[i], ids[j][s], index) for s in kept]
            kept_texts += [rollouts.texts[j][s] for s in kept]
            kept_solutions += [prompts.solution[i]] * len(kept)
            stats.add("privileged/pass_rate", len(kept), self.num_privileged)
            stats.add(f"privileged/pass_rate/{prompts.source[i]}", len(kept), self.num_privileged)
        stats.add("privileged/kept", len(entries), None)
        stats.add("privileged/copy_rate", num_copies(kept_texts, kept_solutions), len(entries))
        return entries

    # ------------------------------------------------------------------ teacher

    def _with_teacher(self, trainer: Any, module: Any, batch: Experience) -> DistillationBatch | None:
        """Let the teacher read the buffer; None where no rank has anything to distil."""
        first, counts = merge_equal([(*map(tuple, ids), index) for *ids, index in self._buffer])
        entries = [self._buffer[i] for i in first]
        student = Sequences([e[0] for e in entries], [e[2] for e in entries])
        privileged = Sequences([e[1] for e in entries], [e[2] for e in entries])
        items = DistillationBatch(student, privileged, counts, [e[3] for e in entries])
        batch.statistics.add("privileged/tokens", items.num_tokens, None)
        teacher, budget = module.teacher.policy(module.student), module.micro_batch_tokens
        num_passes = int(all_max([len(teacher.pack(privileged, budget).groups)], module.device)[0])
        if num_passes == 0:
            return None
        with timed(batch.statistics, "teacher"), trainer.precision_plugin.forward_context():
            items.topk_ids, items.topk_logits = teacher_topk(
                teacher, privileged, self.topk, token_budget=budget, num_passes=num_passes
            )
        return items

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Warn once if the divergence starts near its maximum: then the teacher is broken, not the student."""
        value = batch.metrics.get("loss/distillation")
        if self._warned or value is None or getattr(pl_module, "divergence", "jsd") != "jsd":
            return
        self._warned = True
        if value > 0.9 * math.log(2):
            rank_zero_warn(
                f"the first distillation loss is {value:.3f} nats, near the JSD's maximum ln 2 = 0.693: teacher "
                "and student disagree on nearly every token. Check the teacher's weights and that both contexts use "
                "the same chat template."
            )

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """The buffer of every rank, where it outlives a step; Lightning saves rank 0's state only."""
        if self.refresh_every == 1:
            return {}
        return {"buffers": gather_objects(self._buffer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back this rank's buffer; on another number of ranks it is empty until the next refresh."""
        buffers = state_dict.get("buffers", [])
        if len(buffers) == world_size():
            rank = torch.distributed.get_rank() if world_size() > 1 else 0
            self._buffer = [(list(a), list(b), list(c), int(i)) for a, b, c, i in buffers[rank]]
        elif buffers:
            rank_zero_warn(
                f"the checkpoint's distillation buffer was filled by {len(buffers)} processes and cannot be split over "
                f"{world_size()}; it stays empty until the next refresh"
            )
