"""The samplers in the numbers of the reference implementation (tests/data)."""

import pytest
import torch

from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.rng import SampleRandom
from tests.support.golden import FORWARD, PRED_X0, SAMPLE, io, rel, tensor


class Recorded(SampleRandom):
    """The recorded noise, one entry a draw."""

    def __init__(self, backwards=False):
        noise = tensor("sampler/noise")
        self.noise = iter(noise.flip(0) if backwards else noise)

    def randn(self, shape):
        noise = next(self.noise)
        assert noise.shape == tuple(shape)
        return noise


def draw(sampler, model, scale=7.5, random=None, **kwargs):
    return sampler(model).sample(
        S=10, batch_size=2, shape=(4, 16, 16), conditioning=tensor("sampler/c"), x_T=tensor("sampler/x_T"),
        verbose=False, log_every_t=1, unconditional_guidance_scale=scale,
        unconditional_conditioning=tensor("sampler/uc"), random=random or Recorded(), **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("sampler, name, kwargs", [
    (DDIMSampler, "ddim_eta0", {}),
    (DDIMSampler, "ddim_eta1", {"eta": 1.0}),
    (PLMSSampler, "plms", {}),
])  # fmt: skip
def test_samplers_at_every_step(golden_model, sampler, name, kwargs):
    out, intermediates = draw(sampler, golden_model, **kwargs)
    assert rel(out, tensor(f"{name}/out")) < SAMPLE
    predictions = torch.stack(intermediates["pred_x0"][1:])
    assert predictions.shape == tensor(f"{name}/pred_x0").shape
    assert rel(predictions, tensor(f"{name}/pred_x0")) < PRED_X0


@pytest.mark.parametrize("name, kwargs", [
    ("ddim_scale1", {"scale": 1.0}),
    ("ddim_eta0.5_temp0.8", {"eta": 0.5, "temperature": 0.8}),
])  # fmt: skip
def test_ddim_options(golden_model, name, kwargs):
    assert rel(draw(DDIMSampler, golden_model, **kwargs)[0], tensor(f"{name}/out")) < SAMPLE


def test_ddim_with_a_mask(golden_model):
    # The known region's noise was recorded by the index of the time step, which counts down.
    noise = Recorded(backwards=True)
    out, _ = draw(
        DDIMSampler,
        golden_model,
        mask=tensor("ddim_mask/mask"),
        x0=tensor("ddim_mask/x0"),
        random=noise,
    )
    assert rel(out, tensor("ddim_mask/out")) < SAMPLE


def test_ddim_schedule(golden_model):
    sampler = DDIMSampler(golden_model)
    sampler.make_schedule(10, ddim_eta=1.0)
    assert torch.equal(sampler.ddim_timesteps, tensor("ddim/timesteps"))
    for ours, name in [
        (sampler.ddim_alphas, "alphas"),
        (sampler.ddim_alphas_prev, "alphas_prev"),
        (sampler.ddim_alphas_prev, "alphas_prev_f64"),
        (sampler.ddim_sqrt_one_minus_alphas, "sqrt_one_minus_alphas"),
        (sampler.ddim_sigmas, "sigmas_eta1"),
        (sampler.ddim_sigmas, "sigmas_eta1_f64"),
    ]:
        torch.testing.assert_close(ours, tensor(f"ddim/{name}").float(), rtol=2e-6, atol=1e-8)


def test_img2img(golden_model):
    sampler, t_enc = DDIMSampler(golden_model), int(io()["img2img/t_enc"])
    sampler.make_schedule(10)
    steps = torch.full((2,), t_enc)
    encoded = sampler.stochastic_encode(
        tensor("img2img/init"), steps, noise=tensor("img2img/noise")
    )
    assert rel(encoded, tensor("img2img/z_enc")) < FORWARD
    out = sampler.decode(
        encoded, tensor("sampler/c"), t_enc, unconditional_guidance_scale=7.5,
        unconditional_conditioning=tensor("sampler/uc"), verbose=False,
    )  # fmt: skip
    assert rel(out, tensor("img2img/out")) < SAMPLE


@torch.no_grad()
def test_ancestral_steps(golden_model):
    sampler = DDPMSampler(golden_model)
    sampler.make_schedule(1000)
    x = tensor("sampler/x_T")
    recorded = Recorded()
    for t in tensor("p_sample/ts").tolist():
        denoise = lambda x, t: golden_model.apply_model(x, t, tensor("sampler/c"))  # noqa: E731
        x, _ = sampler.step(x, t, denoise, lambda: recorded.randn(x.shape))  # noqa: B023
    assert rel(x, tensor("p_sample/out")) < SAMPLE
