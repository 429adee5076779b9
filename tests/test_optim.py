"""How torch's optimizers are run on a GPU."""

import pytest
import torch

from hdpo.optim import prefer_fused

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def adamw(**options):
    return torch.optim.AdamW([torch.ones(3, requires_grad=True)], lr=0.1, **options)


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, GPU, True),
        ({}, CPU, None),
        ({"foreach": True}, GPU, None),
        ({"foreach": False}, GPU, None),
        ({"fused": False}, GPU, False),
        ({"differentiable": True}, GPU, None),
    ],
)
def test_fused_where_nothing_else_is_asked_for(options, device, expected):
    optimizer = adamw(**options)
    prefer_fused(optimizer, device)
    assert [group["fused"] for group in optimizer.param_groups] == [expected]


def test_an_optimizer_that_knows_no_fused_form_is_left_alone():
    optimizer = torch.optim.Adamax([torch.ones(3, requires_grad=True)])
    before = set(optimizer.param_groups[0])
    prefer_fused(optimizer, GPU)
    assert set(optimizer.param_groups[0]) == before


def test_it_is_the_same_optimizer():
    """The choice comes after the optimizer was made, and takes effect."""
    plain, fused = adamw(), adamw()
    prefer_fused(fused, GPU)
    for optimizer in (plain, fused):
        for gradient in (0.5, -2.0, 0.1):
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
    torch.testing.assert_close(*(o.param_groups[0]["params"][0] for o in (plain, fused)))
    assert fused.state_dict()["param_groups"][0]["fused"] is True
