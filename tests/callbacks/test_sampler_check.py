"""An engine with weights of its own: stopped at its first stale step, and never while it is healthy."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from hdpo.callbacks.sampler_check import StaleSamplerError
from hdpo.generation import TransformersEngine
from hdpo.policy import Policy, PolicyConfig
from tests.helpers import toy


class Copying(TransformersEngine):
    """Samples from a copy of the policy in ``dtype`` that follows it, but for the synchronisations in ``skipped``."""

    def __init__(self, dtype, skipped=(), shows=True):
        super().__init__()
        self.dtype, self.skipped, self.shows = dtype, skipped, shows
        self.num_asked = self.num_taken = 0
        self.held = self.seen = None

    def generate(self, policy, prompts, seeds, sampling, drafts=None):
        flat = torch.cat([p.detach().flatten() for p in policy.parameters()])
        if self.seen is None or not torch.equal(self.seen, flat):
            self.num_asked += 1
            self.seen = flat.clone()
            if self.num_asked not in self.skipped:
                self.held = copy.deepcopy(policy).to(self.dtype)
            self.num_taken += 1  # so it claims
        with torch.autocast("cpu", enabled=False):
            return super().generate(self.held, prompts, seeds, sampling, drafts)

    def sync_version(self):
        return self.num_taken

    def held_weights(self):
        if not self.shows:
            return {}
        named = dict(self.held.model.named_parameters())
        return {name: p.detach()[:4] for name, p in named.items() if "norm" in name or "q_proj.weight" in name}


class Steps(Callback):
    def __init__(self):
        self.gaps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.gaps.append(batch.metrics["sampler/logprob_gap_mean"])


def run(folder, engine, steps, lr=1e-4, ckpt_path=None):
    precision = "bf16-mixed" if engine.dtype == torch.bfloat16 else "32-true"
    seen = Steps()
    module = toy.module(engine=engine, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), distillation_weight=0.0)
    fitter = toy.trainer(folder, seen, max_steps=steps, limit_val_batches=0, precision=precision)
    return seen, fitter, lambda: fitter.fit(module, datamodule=toy.datamodule(folder), ckpt_path=ckpt_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_synchronisation_stops_the_run_in_its_step(tmp_path, dtype):
    """The tenth is skipped: log-probabilities alone would not show it in 16 bits."""
    seen, fitter, fit = run(tmp_path, Copying(dtype, skipped={10}), 15)
    with pytest.raises(StaleSamplerError, match=r"the sampler's \S+ is not the policy's: they differ by up to"):
        fit()
    assert fitter.global_step == 9
    assert len(seen.gaps) == 9


def test_without_weights_to_compare_the_gap_is_judged_by_the_first_ones(tmp_path):
    engine = Copying(torch.float32, skipped=set(range(3, 20)), shows=False)
    seen, fitter, fit = run(tmp_path, engine, 15, lr=1e-3)
    with pytest.raises(StaleSamplerError, match=r"the sampler's log-probabilities differ .* would be rounding in this"):
        fit()
    assert fitter.global_step <= 4
    assert max(seen.gaps[:2]) < 1e-5


def test_a_resumed_run_whose_engine_still_has_the_initial_weights_is_stopped_at_once(tmp_path):
    _, _, fit = run(tmp_path, Copying(torch.float32, shows=False), 3, lr=1e-4)
    fit()
    stale = Copying(torch.float32, skipped=set(range(20)), shows=False)
    stale.held = Policy.load(PolicyConfig(path="pkg://hdpo.lab/policy"))
    seen, fitter, fit = run(tmp_path, stale, 9, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(StaleSamplerError, match=r"differ from the policy's by 0\.0\d+ nats .* would be rounding"):
        fit()
    assert (fitter.global_step, seen.gaps) == (3, [])


@pytest.mark.slow
@pytest.mark.parametrize("shows", [True, False])
def test_a_healthy_run_in_bfloat16_is_not_stopped(tmp_path, shows):
    seen, fitter, fit = run(tmp_path, Copying(torch.bfloat16, shows=shows), 60)
    fit()
    assert fitter.global_step == 60
    assert len(seen.gaps) == 60
    assert 1e-4 < sum(seen.gaps) / 60 < 0.05, "the noise of 16 bits is there"
