"""The noise schedule and what an output stands for, against identities that hold whatever the
weights.
"""

import math

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.diffusionmodules.util import make_beta_schedule
from tests.support.models import (
    build,
)

every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


def test_the_posterior_is_bayes_rule():
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    x0, x_t = torch.tensor(0.7), torch.tensor(-1.3)
    t = torch.arange(1, 1000)
    mean, log_variance = schedule.q_posterior(x0.expand(999, 1, 1, 1), x_t.expand(999, 1, 1, 1), t)
    beta = schedule.betas[1:].double()
    acp_prev = torch.cumprod(1 - schedule.betas.double(), 0)[:-1]
    # N(x_{t-1}; sqrt(acp_prev) x_0, 1 - acp_prev) times N(x_t; sqrt(1 - beta) x_{t-1}, beta)
    precision = 1 / (1 - acp_prev) + (1 - beta) / beta
    expected = (acp_prev.sqrt() * x0 / (1 - acp_prev) + (1 - beta).sqrt() * x_t / beta) / precision
    torch.testing.assert_close(mean.flatten().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        log_variance.flatten().double(), -precision.log(), rtol=1e-4, atol=1e-4
    )


def test_the_posterior_of_the_first_step_is_the_clean_latent():
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    x0, x_t = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    mean, log_variance = schedule.q_posterior(x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x0, rtol=1e-5, atol=1e-6)
    assert log_variance.isfinite().all() and log_variance.max() < -40


@pytest.mark.parametrize("beta_schedule", ["linear", "sqrt_linear", "cosine"])
def test_every_schedule_goes_from_signal_to_noise(beta_schedule):
    schedule = NoiseSchedule.create(1000, beta_schedule)
    acp = schedule.alphas_cumprod.double()
    assert len(schedule) == 1000 and set(NoiseSchedule.names()) == set(vars(schedule))
    assert (acp.diff() < 0).all() and acp[0] > 0.99 and acp[-1] < 0.01
    torch.testing.assert_close(
        acp, torch.cumprod(1 - schedule.betas.double(), 0), rtol=1e-4, atol=1e-9
    )
    for name, value in vars(schedule).items():
        assert value.dtype == torch.float32 and value.shape == (1000,) and value.isfinite().all(), (
            name
        )


def test_the_shapes_of_the_schedules():
    assert make_beta_schedule("sqrt_linear", 5, 0.1, 0.5, 0.0).tolist() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert (make_beta_schedule("linear", 5, 0.04, 0.36, 0.0) ** 0.5).tolist() == pytest.approx(
        [0.2, 0.3, 0.4, 0.5, 0.6]
    )
    betas = make_beta_schedule("cosine", 100, 1e-4, 2e-2, 0.008)
    assert betas.max() == 0.999  # clipped at the end, where the formula gives 1
    wanted = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    np.testing.assert_allclose(
        np.cumprod(1 - betas)[:99], np.array(wanted[1:]) / wanted[0], rtol=1e-9
    )


@pytest.mark.parametrize("wrong", [
    {"linear_start": 0.0}, {"linear_start": -0.1}, {"linear_end": 1.0}, {"linear_end": 1.5}, {"linear_end": math.nan},
    {"timesteps": 0}, {"timesteps": -5}, {"beta_schedule": "sqrt_linear", "linear_end": 1.0},
])  # fmt: skip
def test_betas_out_of_range(wrong):
    with pytest.raises(UserError, match=r"timesteps: .* linear_start .* linear_end .*outside"):
        NoiseSchedule.create(**{"timesteps": 100, **wrong})


def test_a_noise_that_falls_is_refused():
    with pytest.raises(UserError, match=r"linear_start: 0\.02 is above linear_end 0\.01"):
        NoiseSchedule.create(100, linear_start=0.02, linear_end=0.01)


def test_unknown_schedule():
    with pytest.raises(
        UserError, match="beta_schedule: unknown 'cosinus'; accepted: linear, sqrt_linear, cosine"
    ):
        NoiseSchedule.create(beta_schedule="cosinus")


# What the UNet predicts


@every_parameterization
def test_an_exact_output_gives_back_noise_and_clean_latent(parameterization):
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    t = torch.tensor([0, 10, 500, 999])
    x_start, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.manual_seed(0))
    x_t = schedule.q_sample(x_start, t, noise)
    p = PARAMETERIZATIONS[parameterization]
    output = p.target(schedule, x_start, t, noise)
    torch.testing.assert_close(p.to_noise(schedule, x_t, t, output), noise, rtol=0, atol=5e-5)
    torch.testing.assert_close(p.to_start(schedule, x_t, t, output), x_start, rtol=0, atol=5e-5)


def test_targets_are_what_their_names_say():
    schedule = NoiseSchedule.create()
    t = torch.tensor([300])
    x_start, noise = torch.randn(2, 1, 4, 8, 8)
    targets = {name: p.target(schedule, x_start, t, noise) for name, p in PARAMETERIZATIONS.items()}
    assert torch.equal(targets["eps"], noise) and torch.equal(targets["x0"], x_start)
    acp = schedule.alphas_cumprod[300]
    torch.testing.assert_close(targets["v"], acp.sqrt() * noise - (1 - acp).sqrt() * x_start)


def test_the_bounds_of_eps_and_x0_are_one_bound():
    schedule = NoiseSchedule.create()
    acp = schedule.alphas_cumprod.double()
    eps, x0 = (PARAMETERIZATIONS[name].vlb_weights(schedule).double() for name in ("eps", "x0"))
    # An error of the noise is one of the clean latent times the root of the signal-to-noise ratio.
    torch.testing.assert_close(eps[1:], x0[1:] * (1 - acp[1:]) / acp[1:], rtol=2e-3, atol=0)
    assert eps.isfinite().all() and (eps > 0).all()


def test_vlb_weights_of_v_are_one():
    assert PARAMETERIZATIONS["v"].vlb_weights(NoiseSchedule.create(50)).tolist() == [1.0] * 50


def test_unknown_parameterization():
    with pytest.raises(
        UserError, match="parameterization: unknown 'epsilon'; accepted: eps, x0, v"
    ):
        build(parameterization="epsilon")
