"""The training objective: errors, the bound, subject and prior, the noise."""

import math
from dataclasses import replace

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.objective import Objective
from ldm.modules.losses.per_sample import per_sample_loss
from tests.support.models import batch, build, step

# Losses


def test_per_sample_loss():
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    assert per_sample_loss(output, target).tolist() == [5.0, 0.0]
    assert per_sample_loss(output, target, "l1").tolist() == [2.0, 0.0]
    assert per_sample_loss(output.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_unknown_loss():
    with pytest.raises(UserError, match="loss_type: unknown 'huber'; accepted: l1, l2"):
        per_sample_loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), "huber")


def test_prior_preservation():
    subject, prior = torch.tensor(2.0), torch.tensor(3.0)
    objective = Objective(reg_weight=0.5)
    assert objective.combine([subject, prior]).item() == 3.5
    assert objective.combine([subject]).item() == 2.0


@pytest.mark.parametrize("wrong, message", [
    ({"reg_weight": -1.0}, "reg_weight: expected 0 or more, got -1.0"),
    ({"reg_weight": math.nan}, "reg_weight: expected 0 or more, got nan"),
    ({"original_elbo_weight": math.inf}, "original_elbo_weight: expected 0 or more, got inf"),
    ({"loss_type": "huber"}, "loss_type: unknown 'huber'; accepted: l1, l2"),
    ({"parameterization": "epsilon"}, "parameterization: unknown 'epsilon'; accepted: eps, x0, v"),
    ({"min_snr_gamma": 0.0}, "min_snr_gamma: expected a positive number, got 0.0"),
    ({"min_snr_gamma": math.nan}, "min_snr_gamma: expected a positive number, got nan"),
    ({"caption_dropout": 1.5}, "caption_dropout: expected a share from 0 to 1, got 1.5"),
    ({"unmasked_weight": math.nan}, "unmasked_weight: expected a share from 0 to 1, got nan"),
])  # fmt: skip
def test_an_objective_checks_itself(wrong, message):
    with pytest.raises(UserError, match=message):
        Objective(**wrong)
    # And says where it stands in a config.
    with pytest.raises(UserError, match=rf"^model\.params\.{message}"):
        build(**wrong)


# One training step


@pytest.mark.parametrize("reg_weight", [1.0, 0.3, 0.0])
@torch.no_grad()
def test_one_pass_over_both_halves_equals_two(golden_model, monkeypatch, reg_weight):
    monkeypatch.setattr(
        golden_model, "objective", replace(golden_model.objective, reg_weight=reg_weight)
    )
    subject, prior = batch(1, 2), batch(11, 12, 13, caption="photo of a dog")
    loss, logged = step(golden_model, subject, prior)
    alone, logged_alone = step(golden_model, subject)
    alone_prior, _ = step(golden_model, prior)
    torch.testing.assert_close(loss, alone + reg_weight * alone_prior, rtol=1e-5, atol=0)
    torch.testing.assert_close(logged["train/loss_total"], loss)
    torch.testing.assert_close(logged["train/loss_prior"], alone_prior, rtol=1e-5, atol=0)
    for name in ("loss", "loss_simple", "loss_vlb"):  # of the subject, as the reference logs them
        torch.testing.assert_close(
            logged[f"train/{name}"], logged_alone[f"train/{name}"], rtol=1e-5, atol=0
        )
    assert set(logged_alone) == set(logged) - {"train/loss_prior"}
    assert not alone.isclose(alone_prior, rtol=1e-3)


@torch.no_grad()
def test_a_sample_has_its_noise_whatever_its_neighbours(golden_model):
    first, second, both, swapped = (
        step(golden_model, batch(*seeds))[0] for seeds in ([1], [2], [1, 2], [2, 1])
    )
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(swapped, both, rtol=1e-5, atol=0)
    assert not first.isclose(second, rtol=1e-3)
    assert torch.equal(first, step(golden_model, batch(1))[0])


@torch.no_grad()
def test_the_noise_changes_with_its_seed(golden_model):
    image = batch(1)
    losses = {step(golden_model, image | {"noise_seed": [seed]})[0].item() for seed in range(4)}
    assert len(losses) == 4


@torch.no_grad()
def test_without_seeds_the_noise_is_the_global_generators(golden_model):
    image = {key: value for key, value in batch(1).items() if key != "noise_seed"}
    torch.manual_seed(0)
    first, second = (step(golden_model, image)[0] for _ in range(2))
    torch.manual_seed(0)
    assert step(golden_model, image)[0] == first != second


@pytest.mark.parametrize(
    "parameterization, loss_type", [("eps", "l2"), ("eps", "l1"), ("x0", "l2"), ("v", "l2")]
)
def test_a_fixed_batch_is_learned(parameterization, loss_type):
    model = build(parameterization=parameterization, loss_type=loss_type)
    model.learning_rate = 2e-3
    optimizer = model.configure_optimizers()
    halves = batch(1), batch(11, caption="photo of a dog")
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, _ = step(model, *halves)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


@torch.no_grad()
def test_the_bound_joins_the_loss_with_its_weight(golden_model, monkeypatch):
    x, cond = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 77, 32)
    t = torch.tensor([5, 800])
    monkeypatch.setattr(
        golden_model, "objective", replace(golden_model.objective, original_elbo_weight=0.25)
    )
    loss, logged = golden_model.p_losses(x[0], cond, t, x[1])
    simple, vlb = logged["train/loss_simple"], logged["train/loss_vlb"]
    torch.testing.assert_close(loss, simple + 0.25 * vlb)
    output = golden_model.apply_model(golden_model.q_sample(x[0], t, x[1]), t, cond)
    each = per_sample_loss(output, x[1])
    torch.testing.assert_close(simple, each.mean())
    torch.testing.assert_close(vlb, (golden_model.lvlb_weights[t] * each).mean())


@torch.no_grad()
def test_p_losses_draws_noise_and_logs_under_the_mode(golden_model):
    x, cond, t = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([500])
    first, second = (golden_model.p_losses(x, cond, t)[0] for _ in range(2))
    assert first != second
    try:
        assert set(golden_model.eval().p_losses(x, cond, t)[1]) == {
            "val/loss",
            "val/loss_simple",
            "val/loss_vlb",
        }
    finally:
        golden_model.train()
