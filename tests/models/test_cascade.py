"""A base model in pixels and a super-resolution model against their papers' formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS, make_sampler
from ldm.models.diffusion.super_resolution import sampled_small
from ldm.models.diffusion.thresholding import Threshold, threshold_of
from ldm.rng import SampleRandom, derive_seed
from ldm.util import instantiate_from_config
from tests.support import cascade
from tests.support.denoisers import FEW, SHAPE, AnyTime, Gaussian, means
from tests.support.models import batch, in_float64, step

WEIGHT = 0.5  # of the prior


# The training step


def cosine_acp(steps=1000, s=0.008):
    """Nichol & Dhariwal, 2102.09672, eq. 17."""
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * np.pi / 2) ** 2
    return torch.tensor(f[1:] / f[0])


def small_and_level(x_start, seeds):
    """Ho et al., 2106.15282, section 4.2: the small picture, with noise of a random level."""
    small = F.interpolate(x_start, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
    betas = np.linspace(1e-5**0.5, 0.02**0.5, 1000) ** 2
    kept = torch.tensor(np.cumprod(1 - betas))
    level = SampleRandom([derive_seed("augmentation level", seed) for seed in seeds])
    level = level.randint(cascade.LEVELS, len(seeds))
    noise = SampleRandom([derive_seed("augmentation noise", seed) for seed in seeds])
    noise = noise.randn(small.shape).double()
    kept = kept[level].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * small + (1 - kept).sqrt() * noise
    return F.interpolate(noisy, cascade.SIZE, mode="bilinear"), level


def reference_loss(model, parts, kind):
    """DreamBooth's loss (2208.12242, eq. 2) of a network that predicts v (2202.00512, eq. 9)."""
    total = 0
    for part, weight in zip(parts, (1, WEIGHT)):
        x_start = part["image"].double().permute(0, 3, 1, 2)
        draws = SampleRandom(part["noise_seed"])
        draws.randn(x_start.shape)  # the posterior's, which has no variance here
        t = draws.randint(1000, len(x_start))
        noise = draws.randn(x_start.shape).double()
        kept = cosine_acp()[t].view(-1, 1, 1, 1)
        x_t = kept.sqrt() * x_start + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * x_start
        text, level = model.get_learned_conditioning(part["caption"]), None
        if kind == "sr":
            small, level = small_and_level(x_start, part["noise_seed"])
            x_t = torch.cat([x_t, small], 1)
        output = model.model.diffusion_model(x_t, t, context=text, y=level)
        total += weight * (output - velocity).square().mean()
    return total


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_loss_and_every_gradient_are_those_of_the_papers(kind, monkeypatch):
    model = in_float64(cascade.model(kind, reg_weight=WEIGHT), monkeypatch)
    parts = batch(1, 2), batch(3, caption="photo of a dog")
    loss, logged = step(model, *parts)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert logged["train/loss_total"] == loss and not any("cond_stage" in name for name in ours)

    model.zero_grad()
    expected = reference_loss(model, parts, kind)
    expected.backward()
    # The schedule's buffers are those of a float32 checkpoint.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in ours.items():
        wanted = model.get_parameter(name).grad
        # A bias before a norm of one channel a group has no gradient, but for rounding.
        assert (gradient - wanted).norm() <= 2e-6 * wanted.norm() + 1e-15, name
    assert {name.split(".")[0] for name in ours} == {"model"}


def test_the_latents_of_a_model_in_pixels_are_its_images():
    model = cascade.model("base")
    images = batch(1)["image"].permute(0, 3, 1, 2)
    posterior = model.encode_first_stage(images)
    assert torch.equal(model.get_first_stage_encoding(posterior), images)
    assert torch.equal(model.decode_first_stage(images), images)
    assert (model.channels, model.downsampling) == (3, 1)


# Thresholding (Imagen, 2205.11487, section 2.3)


def test_static_thresholding_cuts_off_and_dynamic_shrinks():
    images = 3 * SampleRandom([0, 1]).randn((2, 3, 8, 8))
    images[1] /= 100  # all inside
    assert torch.equal(threshold_of("static")(images), images.clip(-1, 1))
    found = threshold_of("dynamic:0.9")(images)
    for image, ours in zip(images.numpy(), found.numpy()):
        s = max(1, np.percentile(np.abs(image), 90))
        np.testing.assert_allclose(ours, np.clip(image, -s, s) / s, rtol=1e-5)
    assert torch.equal(found[1], images[1])
    assert threshold_of("none") is None is threshold_of(None)
    assert threshold_of("dynamic") == Threshold(0.995)


@pytest.mark.parametrize("name", ["clip", "dynamic:high", "dynamic:2", "static:0.9"])
def test_an_unknown_thresholding_is_refused(name):
    with pytest.raises(UserError, match="thresholding: "):
        threshold_of(name)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", [*SAMPLERS, *SIGMA_SAMPLERS])
def test_every_sampler_ends_in_the_thresholded_image(name, parameterization):
    # Of data at one point the prediction is that point: 3 is outside, and cut off at 1.
    kind = Gaussian if name in SAMPLERS else AnyTime
    steps = FEW if name == "ddpm" else 12
    model = kind(parameterization, std=0.0, timesteps=FEW if name == "ddpm" else 1000)
    sampler = make_sampler(model, name, thresholding="static")
    assert make_sampler(model, name).threshold is None
    seen = []
    found, _ = sampler.sample(
        steps, 2, SHAPE, means(3.0, 0.5), verbose=False, random=SampleRandom([0, 1]),
        img_callback=lambda start, number: seen.append(start),
    )  # fmt: skip
    assert all(start.abs().max() <= 1 for start in seen)
    # DDIM and PLMS end at the schedule's first step, which has a little noise.
    tolerance = 0.15 if name in ("ddim", "plms") else 1e-3
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([1.0, 0.5]), rtol=0, atol=tolerance)


# Noise-conditioning augmentation


def test_levels_are_the_variances_of_a_noise_schedule():
    augmentation = instantiate_from_config(cascade.AUGMENTATION)
    betas = np.linspace(1e-5**0.5, 0.02**0.5, 1000) ** 2
    variances = 1 - np.cumprod(1 - betas)
    for level in (0, 7, 32, 999):
        assert augmentation.level_of(variances[level]) == level
    assert augmentation.level_of(1e-5) == 0 and 25 < augmentation.level_of(1e-3) < 40
    images, noise = (
        SampleRandom([0, 1]).randn((2, 3, 4, 4)),
        SampleRandom([2, 3]).randn((2, 3, 4, 4)),
    )
    found, levels = augmentation(images, torch.tensor([0, 32]), noise)
    v = torch.tensor(variances)[levels].view(-1, 1, 1, 1)
    expected = (1 - v).sqrt() * images + v.sqrt() * noise
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    _, drawn = augmentation(images.expand(20, 2, 3, 4, 4).flatten(0, 1))
    assert int(drawn.max()) < cascade.LEVELS and len(drawn.unique()) > 5
    with pytest.raises(UserError, match=r"noise_augmentation: expected a variance from 1e-05"):
        augmentation.level_of(1e-7)
    # Weights that were made with other levels.
    other = {key: value * 2 for key, value in augmentation.state_dict().items()}
    with pytest.raises(UserError, match="noise_schedule_config: is not that of the weights"):
        augmentation.load_state_dict(other)
    augmentation.load_state_dict({k: v.half() for k, v in augmentation.state_dict().items()})


def test_noise_of_a_small_picture_is_a_function_of_its_seed_alone():
    model = cascade.model("sr")
    whole = model.beside(model.batch_of(batch(1, 2)))
    alone = [model.beside(model.batch_of(batch(seed))) for seed in (1, 2)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([one[name] for one in alone]))
    assert whole["c_concat"].shape == (2, 3, cascade.SIZE, cascade.SIZE)


def test_less_noise_in_training_and_sampling():
    model = cascade.model("sr", noise_augmentation=1e-5)
    pair = batch(1) | {"LR": torch.zeros(1, 8, 8, 3)}
    read = model.beside(model.batch_of(pair))
    assert read["c_adm"].tolist() == [0] and 0 < read["c_concat"].abs().max() < 0.02
    small = torch.zeros(1, 3, 8, 8)
    for given, variance in ((None, 1e-5), (5e-4, 5e-4)):
        read = sampled_small(model, model.low_scale_model, model.small, small, [5], given)
        assert read["c_adm"].tolist() == [model.low_scale_model.level_of(variance)]
    with pytest.raises(UserError, match=r"noise augmentation: 0\.5 is level \d+, .* knows 40"):
        sampled_small(model, model.low_scale_model, model.small, small, [5], 0.5)


@pytest.mark.parametrize("wrong, message", [
    ({"upscaling": 0}, "upscaling: "),
    ({"noise_augmentation": 0.5}, "noise_augmentation: 0.5 is level"),
    ({"conditioning_key": "hybrid"}, "conditioning_key: must be hybrid-adm"),
    ({"low_scale_facotr": 2}, "low_scale_facotr: unknown key .*LatentUpscaleDiffusion"),
])  # fmt: skip
def test_what_a_super_resolution_model_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        instantiate_from_config(cascade.config("sr", **wrong), "model")


def test_images_that_the_factor_does_not_divide_are_refused():
    model = cascade.model("sr", upscaling=3)
    with pytest.raises(UserError, match="upscaling: 3 does not divide images of 16x16 pixels"):
        step(model, batch(1))
