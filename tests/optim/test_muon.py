"""Muon, and the learning rate of a pretraining."""

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.optim.muon import Muon, muon_groups, orthogonalized
from ldm.optim.registry import make_optimizer
from ldm.optim.schedules import WarmupLinearDecay, with_schedule


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_orthogonalized_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(orthogonalized(matrix))
    assert found.min() > 0.6 and found.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(
            orthogonalized(matrix).flatten(), (u @ v).flatten(), dim=0
        )
        > 0.96
    )


def test_muon_steps_matrices_by_their_polar_factor_and_the_rest_like_adamw():
    linear = nn.Linear(32, 16)
    twin = nn.Linear(32, 16)
    twin.load_state_dict(linear.state_dict())
    optimizer = Muon(muon_groups(linear), lr=0.01, betas=(0.9, 0.99))
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    before = linear.weight.detach().clone()
    for _ in range(3):
        for module, update in ((linear, optimizer), (twin, adamw)):
            update.zero_grad()
            # The bias's gradient does not depend on the weights, which the two move differently.
            (module(x).sum(1) * torch.arange(8)).sum().backward()
            update.step()
    torch.testing.assert_close(linear.bias, twin.bias)
    step = (before - linear.weight) / 3 / (0.01 * 0.2 * 32**0.5)
    assert 0.6 < torch.linalg.svdvals(step.detach())[0] < 1.3


def test_muon_takes_hidden_matrices_and_convolutions_alone():
    module = nn.Sequential(
        nn.Embedding(50, 32),
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 64, 3),
        nn.GroupNorm(32, 64),
        nn.Linear(64, 3),
    )
    module[3].requires_grad_(False)
    groups = {
        group["muon"]: [tuple(p.shape) for p in group["params"]] for group in muon_groups(module)
    }
    assert groups[True] == [(64, 32, 3, 3)]
    assert groups[False] == [(50, 32), (32, 3, 3, 3), (32,), (64,), (3, 64), (3,)]


def test_an_unknown_optimizer():
    with pytest.raises(UserError, match=r"optimizer: unknown 'muoon' .*did you mean 'muon'"):
        make_optimizer("muoon", [nn.Linear(2, 2)], 0.1)


# Learning rate


def test_warmup_linear_decay():
    factor = WarmupLinearDecay(steps=100, warmup_steps=4, decay=0.5, final=0.1)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(50) == 1
    assert factor(75) == pytest.approx(0.55)
    assert factor(100) == factor(1000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 5, "warmup_steps": 5},
        {"steps": 5, "decay": -0.1},
        {"steps": 5, "decay": 1.1},
    ],
)
def test_schedules_that_make_no_sense(wrong):
    with pytest.raises(UserError, match="steps: expected steps > warmup_steps >= 0 and"):
        WarmupLinearDecay(**wrong)


def test_a_schedule_moves_the_rate_of_every_step():
    parameter = nn.Parameter(torch.zeros(1))
    config = {"target": "ldm.optim.schedules.WarmupLinearDecay", "params": {"steps": 2}}
    found = with_schedule(torch.optim.SGD([parameter], lr=1.0), config)
    rates = []
    for _ in range(3):
        rates.append(found["optimizer"].param_groups[0]["lr"])
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    assert rates == [1.0, 0.5, 0.0]
