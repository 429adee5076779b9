"""Compiled decoder layers: the same step, the same weights by the same names, and sampling as before."""

import pytest
import torch
from torch._dynamo.utils import counters

from hdpo.functional.random import derive_seeds
from hdpo.generation import SamplingConfig, TransformersEngine
from hdpo.losses.update import update_policy
from hdpo.policy import Policy, PolicyConfig
from tests.helpers.tolerances import F32
from tests.losses.test_update import Wrapped, experience, module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def trained(compiled, recomputed):
    """One update with two micro-batches of each kind, of different widths; completions from before and after."""
    torch._dynamo.reset()
    counters.clear()
    options = {"compile": compiled, "gradient_checkpointing": recomputed}
    policy = Policy.load(PolicyConfig("pkg://hdpo.lab/policy", **options)).train()
    updated, batch = module(micro_batch_tokens=25, max_grad_norm=None), experience()
    batch.distillation.topk_logits = [x.float() for x in batch.distillation.topk_logits]
    updated.student, optimizer = policy, Wrapped(torch.optim.SGD(policy.parameters(), lr=0.1))
    updated.optimizers = lambda: optimizer
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    seeds, sampling = derive_seeds(torch.arange(3)[:, None], torch.arange(2)), SamplingConfig(12, 1.0, (2,))
    drawn = [TransformersEngine().generate(policy, batch.prompts.prompt_ids[:3], seeds, sampling).ids]
    graphs = [counters["stats"]["unique_graphs"]]
    assert update_policy(updated, batch)
    graphs.append(counters["stats"]["unique_graphs"])
    with torch.no_grad():
        drawn.append(TransformersEngine().generate(policy, batch.prompts.prompt_ids[:3], seeds, sampling).ids)
    graphs.append(counters["stats"]["unique_graphs"])
    return policy, before, drawn, graphs


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_step_is_the_eager_one(recomputed, tmp_path):
    eager, before, drawn, graphs = trained(False, recomputed)
    assert graphs == [0, 0, 0]
    mine, _, drawn_by_mine, graphs = trained(True, recomputed)
    assert graphs[0] == 0 < graphs[1] == graphs[2], "the update alone is compiled"
    assert graphs[1] <= 4, "compiled for every length"
    assert torch.equal(drawn_by_mine[0], drawn[0])
    assert torch.equal(drawn_by_mine[1], drawn[1])
    expected, found = eager.state_dict(), mine.state_dict()
    assert found.keys() == expected.keys(), "checkpoints are interchangeable"
    way = sum((expected[name] - before[name]).square().sum() for name in before).sqrt()
    apart = sum((found[name] - expected[name]).square().sum() for name in before).sqrt()
    # The gradient is rounded some hundred times on its way; each weight once more, when it is added.
    weights = sum(weight.square().sum() for weight in before.values()).sqrt()
    assert way > 1e-3
    assert apart <= 128 * F32 * way + F32 * weights
    mine.save(tmp_path)
    again = Policy.load(PolicyConfig(str(tmp_path)))
    assert all(torch.equal(again.state_dict()[name], found[name]) for name in found)
