"""Third station: what is distilled on the cliffs, and the teacher's distribution on it.

Paper, Algorithm 1, lines 7-14: the same engine samples from the CURRENT weights with the ground truth in the prompt
(also when the teacher is frozen); completions with R = 1 are kept, which is rejection sampling from the optimal
KL-regularised policy (Proposition 2); the teacher's top-k logits on them are what is distilled. Whose completions these
are, who samples them and what is distilled on them are options: the rivals for the same prompts are other values.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from hdpo.callbacks.sampling import graded, sample, sample_seeds, sampling_config, solution_ids
from hdpo.callbacks.station import run_stations
from hdpo.distributed import all_max, all_sum, gather_objects, rank, world_size
from hdpo.errors import ConfigError, check_at_least, check_choice, check_positive
from hdpo.experience import DistillationBatch, Experience, PrivilegedRollouts, Sequences, merge_equal
from hdpo.functional.random import Purpose
from hdpo.losses import ReverseKL
from hdpo.measurements import timed
from hdpo.policy import Policy
from hdpo.teacher import EMATeacher, teacher_topk


class _Entry(NamedTuple):
    """What is distilled: a completion and both of its contexts (token ids), and its prompt's position in the run."""

    context: list[int]
    privileged: list[int]
    completion: list[int]
    position: int


Whose = Literal["privileged", "reference", "failures"]
Sampler = Literal["current", "initial", "ema"]
Target = Literal["distribution", "token"]


class DistillationRefresh(Callback):
    """Samples and filters the completions that are distilled on cliffs, and adds the teacher's logits for them.

    With ``model.distillation_weight`` and ``model.privileged_policy_weight`` 0 it does nothing.

    Args:
        num_privileged: J, privileged rollouts per cliff.
        max_cliffs_per_step: privileged rollouts are sampled for at most this many cliffs of the GLOBAL batch,
            the first in it (paper, Table 2: 32).
        temperature: sampling temperature of the privileged rollouts.
        max_new_tokens: token limit of the privileged rollouts; a longer reference solution is not distilled.
        success_reward: a privileged rollout is kept if its reward is at least this (paper, Table 2: 1.0); 0 keeps all;
            null: if it is correct, which is the same where rewards are 1 and 0, and right for sums of rewards, too.
        topk: how many of the teacher's logits are distilled (paper, Table 2: 64).
        refresh_every: number of steps that completions are kept. With 1 (paper) they are this step's. With more, they
            are sampled every ``refresh_every`` steps and distilled in each of them; the teacher reads them anew in
            each step, so that a drifting teacher is always the current policy.
        completions: whose completions are distilled: ``privileged`` rollouts (paper), the ``reference`` solution of
            every cliff (supervision on the hardest questions: ReLIFT, arXiv 2506.07527), or the student's own
            ``failures`` (on-policy self-distillation: OPSD, arXiv 2601.18734; SDPO, 2601.20802; SDFT, 2601.19897).
        sampled_by: who writes the privileged rollouts: the ``current`` weights (paper), the ``initial`` policy, which
            cannot forget how to use the context, or the ``ema`` teacher.
        target: what is distilled at each position: the teacher's ``distribution`` (paper), or the ``token`` itself
            (hard labels; with ForwardKL the cross-entropy of supervised learning). ``token`` needs no teacher.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    def __init__(
        self,
        num_privileged: int = 4,
        max_cliffs_per_step: int = 32,
        temperature: float = 1.0,
        max_new_tokens: int = 2048,
        success_reward: float | None = None,
        topk: int = 64,
        refresh_every: int = 1,
        completions: Whose = "privileged",
        sampled_by: Sampler = "current",
        target: Target = "distribution",
    ) -> None:
        check_at_least(
            1,
            distillation__num_privileged=num_privileged,
            distillation__topk=topk,
            distillation__refresh_every=refresh_every,
            distillation__max_new_tokens=max_new_tokens,
        )
        check_at_least(
            0, distillation__max_cliffs_per_step=max_cliffs_per_step, distillation__success_reward=success_reward
        )
        check_positive(distillation__temperature=temperature)
        check_choice("distillation.completions", completions, get_args(Whose))
        check_choice("distillation.sampled_by", sampled_by, get_args(Sampler))
        check_choice("distillation.target", target, get_args(Target))
        self.num_privileged = num_privileged
        self.max_cliffs_per_step = max_cliffs_per_step
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.success_reward = success_reward
        self.topk = topk
        self.refresh_every = refresh_every
        self.completions: Whose = completions
        self.sampled_by: Sampler = sampled_by
        self.target: Target = target
        self._buffer: list[_Entry] = []
        self._warned = False

    @property
    def writer(self) -> Sampler:
        """Who writes what is distilled: completions other than privileged rollouts need none but the current policy."""
        return self.sampled_by if self.completions == "privileged" else "current"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what does not go together."""
        if self.sampled_by == "ema" and not isinstance(pl_module.teacher, EMATeacher):
            raise ConfigError("distillation.sampled_by=ema needs model.teacher=EMATeacher, whose weights sample")
        if (self.target == "token" or self.topk == 1) and isinstance(pl_module.divergence, ReverseKL):
            raise ConfigError(
                f"distillation.{'target=token' if self.target == 'token' else 'topk=1'} has no gradient under "
                "model.divergence=ReverseKL, which compares within the teacher's tokens: take ForwardKL "
                "(cross-entropy) or JSD"
            )
        if pl_module.privileged_policy_weight > 0:
            if self.sampled_by != "current":
                raise ConfigError(
                    "model.privileged_policy_weight needs distillation.sampled_by=current: a policy gradient needs the "
                    "policy's own rollouts"
                )
            check_at_least(2, distillation__num_privileged=self.num_privileged)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Experience, batch_idx: int) -> None:
        """Add ``batch.privileged`` and ``batch.distillation``, and let the engine free its memory for the update."""
        distils, trains_context = pl_module.distillation_weight > 0, pl_module.privileged_policy_weight > 0
        if (distils or trains_context) and trainer.global_step % self.refresh_every == 0:
            samples = trains_context or self.completions == "privileged"
            # Tokens of other completions are distilled without a look at the privileged context.
            chosen = self._chosen(batch, reads_context=samples or self.target == "distribution")
            entries: list[_Entry] = []
            if samples:
                entries = self._sampled(trainer, pl_module, batch, chosen)
            if self.completions != "privileged":
                entries = self._given(pl_module, batch, chosen)
            self._buffer = entries if distils else []
            row_of = dict(zip(batch.prompts.index.tolist(), batch.prompts.row.tolist(), strict=True))
            pl_module.cliffs.history.distil((row_of[index] for *_, index in self._buffer), trainer.global_step)
        pl_module.engine.release_memory()
        if distils:
            batch.distillation = self._read_by_teacher(trainer, pl_module, batch)
        run_stations("after_distillation", trainer, pl_module, batch)

    # ------------------------------------------------------------------ whose completions

    def _chosen(self, batch: Experience, *, reads_context: bool) -> list[int]:
        """Positions (in this rank's batch) of the cliffs that something is done with."""
        assert batch.is_cliff is not None, "CliffDetection completes the experience first"
        prompts, measured = batch.prompts, batch.measurements
        cliffs = batch.is_cliff.nonzero()[:, 0].tolist()
        usable = [i for i in cliffs if prompts.privileged_ids[i] or not reads_context]
        measured.add("privileged/too_long", len(cliffs) - len(usable), None)
        index = prompts.index.tolist()
        everywhere = sorted(i for part in gather_objects([index[i] for i in usable]) for i in part)
        allowed = set(everywhere[: self.max_cliffs_per_step])
        chosen = [i for i in usable if index[i] in allowed]
        measured.add("privileged/over_limit", len(usable) - len(chosen), None)
        return chosen

    def _sampled(self, trainer: Any, module: Any, batch: Experience, chosen: list[int]) -> list[_Entry]:
        """Sample privileged rollouts of this step's cliffs; returns those that succeeded."""
        prompts, measured = batch.prompts, batch.measurements
        (num_chosen,) = all_sum([len(chosen)], module.device)
        if num_chosen == 0:
            measured.add("privileged/kept", 0, None)
            return []
        completions = sample(
            trainer,
            module,
            [prompts.privileged_ids[i] for i in chosen],
            sample_seeds(module, Purpose.PRIVILEGED, trainer.global_step, prompts.index[chosen], self.num_privileged),
            sampling_config(module, self.max_new_tokens, self.temperature),
            measured,
            "privileged",
            drafts=shown_solutions(module, [(prompts.privileged_ids[i], prompts.solution[i]) for i in chosen]),
            policy=self._sampler(module),
        )
        batch.privileged = PrivilegedRollouts(chosen, graded(module, completions, prompts, measured, chosen))
        measured.add("spent/solutions", len(chosen), None)
        return self._kept(module, batch, batch.privileged)

    def _sampler(self, module: Any) -> Policy:
        """Whose privileged rollouts are distilled."""
        match self.sampled_by:
            case "initial":
                return module.initial.policy(module.student)
            case "ema":
                return module.teacher.policy(module.student)
        return module.student

    def _kept(self, module: Any, batch: Experience, privileged: PrivilegedRollouts) -> list[_Entry]:
        """The privileged rollouts that succeeded; where the policy loss masks truncated ones, they do not."""
        prompts, measured, rollouts = batch.prompts, batch.measurements, privileged.rollouts
        graded, lengths = rollouts.has_verdict, rollouts.completion_mask.sum(-1)
        passed = rollouts.success
        if self.success_reward is not None:
            passed = graded & (rollouts.rewards >= self.success_reward)
        if module.policy_loss.mask_truncated:
            passed &= ~rollouts.truncated
        ids = rollouts.token_lists()
        entries: list[_Entry] = []
        for j, i in enumerate(privileged.positions):
            kept = passed[j].nonzero()[:, 0].tolist()
            entries += [
                _Entry(prompts.prompt_ids[i], prompts.privileged_ids[i], ids[j][s], int(prompts.index[i])) for s in kept
            ]
            copies = sum(is_copy(rollouts.texts[j][s], prompts.solution[i]) for s in kept)
            for of, suffix in (("", ""), ("_by_source", f"/{prompts.source[i]}")):
                measured.add(f"privileged{of}/pass_rate{suffix}", len(kept), float(graded[j].sum()))
                if self.completions == "privileged":  # of others, those count that are distilled in their place
                    measured.add(f"privileged{of}/kept{suffix}", len(kept), None)
                measured.add(f"privileged{of}/copy_rate{suffix}", copies, len(kept))
                measured.add(f"privileged{of}/length{suffix}", lengths[j].sum(), self.num_privileged)
                measured.add(f"privileged{of}/truncated{suffix}", rollouts.truncated[j].sum(), self.num_privileged)
        return entries

    def _given(self, module: Any, batch: Experience, chosen: list[int]) -> list[_Entry]:
        """Completions of the cliffs that need no privileged rollout: reference solutions, or the student's failures."""
        prompts, rollouts, measured = batch.prompts, batch.rollouts, batch.measurements
        assert rollouts is not None, "RolloutGeneration completes the experience first"
        entries: list[_Entry] = []
        for i in chosen:
            if self.completions == "reference":
                texts = [solution_ids(module, prompts.solution[i])] if prompts.solution[i] else []
                whole = [ids for ids in texts if len(ids) <= self.max_new_tokens]
                measured.add("privileged/too_long", len(texts) - len(whole), None)
                measured.add("spent/solutions", len(whole), None)
            else:
                left_out = rollouts.truncated[i] & module.policy_loss.mask_truncated
                left_out |= rollouts.success[i]  # of a cliff that cliffs.threshold, or a station of the user's, made
                texts = rollouts.select([i]).token_lists()[0]
                whole = [ids for ids, cut in zip(texts, left_out.tolist(), strict=True) if not cut]
                measured.add("spent/solutions", 1, None)
            contexts = prompts.prompt_ids[i], prompts.privileged_ids[i]
            entries += [_Entry(*contexts, ids, int(prompts.index[i])) for ids in whole]
        measured.add("privileged/kept", len(entries), None)
        return entries

    # ------------------------------------------------------------------ teacher

    def _read_by_teacher(self, trainer: Any, module: Any, batch: Experience) -> DistillationBatch | None:
        """Let the teacher read the buffer, equal completions once; None where no rank has anything to distil."""
        first, counts = merge_equal([(*map(tuple, ids), index) for *ids, index in self._buffer])
        entries = [self._buffer[i] for i in first]
        completions = [e.completion for e in entries]
        student = Sequences([e.context for e in entries], completions)
        privileged = Sequences([e.privileged for e in entries], completions)
        items = DistillationBatch(student, privileged, counts, [e.position for e in entries])
        batch.measurements.add("privileged/tokens", items.num_tokens, None)
        if self.target == "token":
            items.topk_ids = [torch.tensor(c, dtype=torch.int32)[:, None] for c in student.completion_ids]
            items.topk_logits = [torch.zeros(len(c), 1) for c in student.completion_ids]
            return items if all_max([len(entries)], module.device)[0] else None
        teacher, budget = module.teacher.policy(module.student), module.update.micro_batch_tokens
        (num_passes,) = all_max([len(teacher.pack(privileged, budget).groups)], module.device)
        if num_passes == 0:
            return None
        with timed(batch.measurements, "teacher"), trainer.precision_plugin.forward_context():
            items.topk_ids, items.topk_logits = teacher_topk(
                teacher, privileged, self.topk, token_budget=budget, num_passes=int(num_passes)
            )
        batch.measurements.add("speed/teacher", sum(map(len, privileged.completion_ids)), 0.0)
        return items

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Warn once if the divergence starts near its maximum: then the teacher is broken, not the student."""
        value, largest = batch.metrics.get("loss/distillation"), pl_module.divergence.largest
        if self._warned or value is None:
            return
        self._warned = True
        if largest is not None and value > 0.9 * largest:
            rank_zero_warn(
                f"the first distillation loss is {value:.3f} nats, near the divergence's maximum of {largest:.3f}: "
                "teacher and student disagree on nearly every token. Check the teacher's weights and that both "
                "contexts use the same chat template."
            )

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """The buffer of every rank, where it outlives a step; Lightning saves rank 0's state only."""
        if self.refresh_every == 1:
            return {}
        # As plain containers: a checkpoint is read without running code.
        return {"buffers": gather_objects([tuple(entry) for entry in self._buffer])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back this rank's buffer; on another number of ranks it is empty until the next refresh."""
        buffers = state_dict.get("buffers", [])
        if len(buffers) == world_size():
            self._buffer = [_Entry(list(a), list(b), list(c), int(i)) for a, b, c, i in buffers[rank()]]
        elif buffers:
            rank_zero_warn(
                f"the checkpoint's distillation buffer was filled by {len(buffers)} processes and cannot be split over "
                f"{world_size()}; it stays empty until the next refresh"
            )


def shown_solutions(module: Any, prompts: list[tuple[list[int], str]]) -> list[str]:
    """Return the solution of each (context, solution) whose context shows it, else an empty text.

    A completion does not repeat what it has not been shown; guessing it all the same costs three times the work.
    """
    if not prompts:  # of which transformers makes one empty text
        return []
    texts = module.tokenizer.batch_decode([ids for ids, _ in prompts], skip_special_tokens=True)
    plain = [" ".join(text.split()) for text in texts]
    return [s if " ".join(s.split()) in text else "" for text, (_, s) in zip(plain, prompts, strict=True)]


def is_copy(text: str, solution: str) -> bool:
    r"""Whether a completion repeats its reference solution, up to white space.

    Example:
        >>> is_copy("1+1=2.\nSo 2", "1+1=2. So 2"), is_copy("2", "So 2")
        (True, False)
    """
    return text.split() == solution.split()
