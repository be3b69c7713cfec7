"""A training step and AdamW's steps in the numbers of the reference implementation (tests/data)."""

import json
from dataclasses import replace

import pytest
import torch

from ldm.models.diffusion.objective import Draws, Objective
from tests.support import golden
from tests.support.golden import FORWARD, GRADIENT, META, io, rel, tensor
from tests.support.models import in_float64


def recorded_batch(name):
    caption = META["data_caption_reg" if name.startswith("reg") else "data_caption_train"]
    images = tensor(f"step/{name}_image")
    return {"image": images, "caption": [caption] * len(images)}


def step_loss(model, names, reg_weight, monkeypatch):
    """Return the training loss of (subject, prior) with the recorded posterior noise, time steps
    and noise.
    """
    dtype = next(model.parameters()).dtype
    batches, recorded = [], []
    for name in names:
        batch = recorded_batch(name)
        batches.append(batch | {"image": batch["image"].to(dtype)})
        eps, t, noise = (tensor(f"step/{name}_{what}") for what in ("eps", "t", "noise"))
        recorded.append(Draws(eps.to(dtype), t, noise.to(dtype)))
    given = iter(recorded)
    monkeypatch.setattr(Objective, "draw", lambda *_: next(given))
    monkeypatch.setattr(model, "objective", replace(model.objective, reg_weight=reg_weight))
    return model.shared_step(tuple(batches), "train")


@pytest.mark.parametrize("reg_weight", [1.0, 0.5, 0.0])
def test_training_step_loss_log_and_gradients(fresh_golden_model, monkeypatch, reg_weight):
    model = fresh_golden_model
    loss, logged = step_loss(model, ["train", "reg"], reg_weight, monkeypatch)
    assert rel(loss, tensor(f"step/loss_regw{reg_weight}")) < FORWARD
    for key, value in META[f"logged_regw{reg_weight}"].items():
        assert logged[key].item() == pytest.approx(value, rel=1e-5)
    assert logged["train/loss_total"].item() == pytest.approx(loss.item())
    prior = (loss.item() - logged["train/loss"].item()) / reg_weight if reg_weight else None
    assert prior is None or logged["train/loss_prior"].item() == pytest.approx(prior, rel=1e-4)

    loss.backward()
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert rel(total, tensor(f"step/gradnorm_total_regw{reg_weight}")) < GRADIENT
    watched = META["watch"]
    norms = torch.stack([model.get_parameter(name).grad.norm() for name in watched])
    torch.testing.assert_close(norms, tensor(f"step/gradnorm_regw{reg_weight}"), rtol=3e-5, atol=0)


def test_every_gradient_of_the_training_step(fresh_golden_model, monkeypatch):
    model = fresh_golden_model
    step_loss(model, ["train", "reg"], 1.0, monkeypatch)[0].backward()
    norms = json.loads((golden.DATA / "tiny_gradnorms.json").read_text())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(norms)
    for name, norm in norms.items():
        if name not in META["params_noise_grad"]:
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=5e-5), (
                name
            )
    recorded = [key for key in io() if key.startswith("step/grad/")]
    assert recorded
    for key in recorded:
        assert (
            rel(model.get_parameter(key.removeprefix("step/grad/")).grad, tensor(key)) < GRADIENT
        ), key


def test_training_step_of_two_pairs(golden_model, monkeypatch):
    loss, _ = step_loss(golden_model, ["train_b2", "reg_b2"], 1.0, monkeypatch)
    assert rel(loss, tensor("step/loss_b2_regw1.0")) < FORWARD


def test_unseeded_batches_draw_in_the_reference_order(golden_model):
    torch.manual_seed(23)
    loss, _ = golden_model.shared_step((recorded_batch("train"), recorded_batch("reg")), "train")
    assert rel(loss, tensor("step/loss_seed23")) < FORWARD
    assert torch.equal(torch.randn(4), tensor("step/rng_after_seed23"))


def test_training_modes(golden_model):
    golden_model.train()
    modes = {"unet": "model", "text": "cond_stage_model", "vae": "first_stage_model"}
    assert {name: getattr(golden_model, part).training for name, part in modes.items()} == META[
        "train_mode"
    ]


def test_optimizer_settings(fresh_golden_model):
    model, expected = fresh_golden_model, META["optimizer"]
    model.learning_rate = 1e-6
    optimizer = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == expected["cls"]
    assert len(group["params"]) == expected["n_tensors"]
    assert sum(p.numel() for p in group["params"]) == expected["n_params"]
    ours = {
        key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    }
    assert ours == {
        key: tuple(v) if isinstance(v := expected["hyper"][key], list) else v for key in ours
    }


def adamw_steps(model, learning_rate, steps, monkeypatch):
    model.learning_rate = learning_rate
    optimizer = model.configure_optimizers()
    losses = []

    def closure():
        loss, _ = step_loss(model, ["train", "reg"], 1.0, monkeypatch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return torch.stack(losses), step_loss(model, ["train", "reg"], 1.0, monkeypatch)[0].detach()


@pytest.fixture
def float64_model(fresh_golden_model, monkeypatch):
    """The golden model without rounding: each processor computes the same, and what is left is the
    recording's own.

    AdamW divides each gradient by its own size: where that is rounding noise, so is the step.
    """
    return in_float64(fresh_golden_model, monkeypatch)


def choose_everything(model):
    """Switch on all that a run may choose by itself (`ldm.training.engine`)."""
    unet = model.model.diffusion_model
    unet.recompute("attention")
    unet.channels_last = True
    model.configure_model()
    model.optimizer = "adamw_in_backward"


@pytest.mark.parametrize("chosen", [False, True])
def test_three_adamw_steps(float64_model, monkeypatch, chosen):
    model = float64_model
    if chosen:
        choose_everything(model)
    losses, after = adamw_steps(model, 1e-3, 3, monkeypatch)
    assert rel(losses, tensor("adamw_lr1e-3/losses")) < 1e-6
    assert rel(after, tensor("adamw_lr1e-3/loss_after")) < 1e-6
    prefix = "adamw_lr1e-3/after/"
    for key in (key for key in io() if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if name not in META["params_noise_grad"]:
            assert rel(model.get_parameter(name), tensor(key)) < 2e-4, name
    check_token_rows(model, "adamw_lr1e-3", 2e-4)


def test_losses_of_three_adamw_steps_in_float32(fresh_golden_model, monkeypatch):
    """Weights whose gradient is noise have wrong steps, but matter little to the loss: the gradient
    says so.
    """
    losses, after = adamw_steps(fresh_golden_model, 1e-3, 3, monkeypatch)
    assert rel(losses, tensor("adamw_lr1e-3/losses")) < FORWARD
    assert rel(after, tensor("adamw_lr1e-3/loss_after")) < FORWARD


def test_one_adamw_step_at_the_default_rate(float64_model, monkeypatch):
    model = float64_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw_steps(model, 1e-6, 1, monkeypatch)
    prefix = "adamw_lr1e-6/delta_f64/"
    for key in (key for key in io() if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if name not in META["params_noise_grad"]:
            delta = model.get_parameter(name).detach().double() - before[name].double()
            # The recorded weights are float32, whose numbers near 1 are 6e-8 or 1.2e-7 apart: 6 %
            # of a step, or 12 %.
            assert rel(delta, tensor(key)) < 0.1, name
    check_token_rows(model, "adamw_lr1e-6", 1e-6)


def check_token_rows(model, prefix, tolerance):
    rows = model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
    assert (
        rel(
            rows[tensor(f"{prefix}/token_embedding_rows")],
            tensor(f"{prefix}/token_embedding_after"),
        )
        < tolerance
    )
