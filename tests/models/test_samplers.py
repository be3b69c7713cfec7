"""What every sampler promises, on models whose exact answer is known: samples, seeds, masks."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler import uniform_timesteps
from ldm.models.diffusion.sampler_names import SAMPLERS
from ldm.rng import SampleRandom
from tests.support.denoisers import SHAPE, Gaussian, count, draw, fake, means, noise_of, noisy

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
deterministic = pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


# What is sampled


@every_parameterization
@every_sampler
def test_the_point_that_all_data_are_comes_out(name, parameterization):
    model, cond = fake(name, parameterization), means(1.5, -0.5)
    out, intermediates = draw(name, model, cond, x_T=noise_of())
    expected = model.mean(cond).expand(2, *SHAPE)
    torch.testing.assert_close(intermediates["pred_x0"][-1], expected, rtol=0, atol=1e-4)
    # The last step of DDIM and PLMS leaves the noise of the first time step, 3 %.
    assert (out - expected).abs().max() < (1e-4 if name == "ddpm" else 0.15)


@deterministic
def test_the_noise_left_at_the_end_is_that_of_the_first_time_step(name):
    model, cond, x_T = fake(name), means(1.5, -0.5), noise_of()
    first = torch.full((2,), 901)
    left = model.schedule.noise_from_start(x_T, first, model.mean(cond).expand_as(x_T))
    expected = model.schedule.q_sample(
        model.mean(cond).expand_as(x_T), torch.zeros(2, dtype=torch.long), left
    )
    torch.testing.assert_close(draw(name, model, cond, x_T=x_T)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0)])
def test_samples_have_the_mean_and_spread_of_the_data(name, eta):
    torch.manual_seed(0)
    model, cond = fake(name, std=0.5), torch.full((400, 1, 1), 2.0)
    steps = count(name, 200)
    # From noise as the data would have it at the first visited step: in Stable Diffusion's schedule
    # even the last time step has 7 % of signal.
    t = uniform_timesteps(steps, len(model.schedule))[-1:].expand(400)
    x_T = model.schedule.q_sample(2 + 0.5 * torch.randn(400, *SHAPE), t, torch.randn(400, *SHAPE))
    out, _ = draw(name, model, cond, steps, eta=eta, x_T=x_T)
    assert out.mean().item() == pytest.approx(2.0, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, rel=0.05)  # fewer steps spread less


@every_sampler
def test_the_parameterization_does_not_change_the_sample(name):
    outs = [
        draw(
            name,
            fake(name, parameterization, std=0.5),
            means(1.0, 2.0),
            random=SampleRandom([7, 8]),
        )[0]
        for parameterization in PARAMETERIZATIONS
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-3)


def error(name, steps):
    """Return the largest distance from the exact solution of the equation from noise to data."""
    model, cond, x_T = Gaussian(std=0.5), means(1.0, 2.0), noise_of()
    acp = model.schedule.alphas_cumprod
    first, last = acp[0], acp[uniform_timesteps(steps, 1000)[-1]]
    spread = [(a * 0.25 + 1 - a).sqrt() for a in (first, last)]
    mean = model.mean(cond)
    exact = first.sqrt() * mean + spread[0] / spread[1] * (x_T - last.sqrt() * mean)
    return (draw(name, model, cond, steps, x_T=x_T)[0] - exact).abs().max().item()


def test_plms_is_closer_to_the_exact_solution_than_ddim():
    assert error("plms", 20) < error("ddim", 20) / 3


def test_ddim_is_of_first_order():
    assert math.log2(error("ddim", 50) / error("ddim", 100)) == pytest.approx(1, abs=0.1)


# Random numbers


@every_sampler
def test_same_seeds_same_samples_and_other_seeds_others(name):
    first, again, other = (
        draw(name, fake(name, std=1.0), means(0.0, 0.0), random=SampleRandom(seeds), **noisy(name))[
            0
        ]
        for seeds in ([3, 4], [3, 4], [4, 3])
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert torch.equal(first[[1, 0]], other)


@every_sampler
@pytest.mark.parametrize("batches", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]])
def test_a_sample_does_not_depend_on_its_batch(name, batches):
    def images(batch):
        cond = means(*[float(seed) for seed in batch])
        return draw(name, fake(name, std=1.0), cond, random=SampleRandom(batch), **noisy(name))[0]

    together = images([0, 1, 2])
    for batch in batches:
        torch.testing.assert_close(images(batch), together[batch], rtol=0, atol=1e-6)


@deterministic
def test_without_eta_the_start_decides_everything(name):
    outs = [
        draw(
            name, fake(name, std=1.0), means(0.0, 0.0), x_T=noise_of(), random=SampleRandom(seeds)
        )[0]
        for seeds in ([1, 2], [3, 4])
    ]
    assert torch.equal(*outs)


def test_eta_adds_noise_and_temperature_scales_it():
    def spread(eta, temperature):
        out, _ = draw(
            "ddim", Gaussian(std=1.0), means(*[0.0] * 20), x_T=noise_of(1).expand(20, *SHAPE), eta=eta,
            temperature=temperature, random=SampleRandom(range(20)),
        )  # fmt: skip
        return out.std(dim=0).mean().item()

    assert max(spread(0.0, 1.0), spread(1.0, 0.0)) < 1e-6
    assert 0 < spread(0.2, 1.0) < spread(1.0, 1.0)
    assert spread(1.0, 0.5) == pytest.approx(
        0.5 * spread(1.0, 1.0), rel=1e-4
    )  # noise enters linearly here


def test_without_seeds_the_global_generator_decides():
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(draw("ddim", Gaussian(std=1.0), means(0.0), eta=1.0)[0])
    outs.append(draw("ddim", Gaussian(std=1.0), means(0.0), eta=1.0)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].supports_eta])
def test_samplers_without_eta_refuse_it(name):
    with pytest.raises(UserError, match=r"eta must be 0, got 0\.5"):
        draw(name, fake(name), means(0.0), eta=0.5)


# Masks


@every_sampler
def test_a_mask_keeps_what_it_covers(name):
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    x0 = torch.full((2, *SHAPE), 8.0)
    # Wide data: the last prediction follows what it sees.
    out, _ = draw(
        name,
        fake(name, std=10.0),
        means(0.0, 0.0),
        50,
        mask=mask,
        x0=x0,
        random=SampleRandom([0, 1]),
    )
    assert (out[..., :2] - 8).abs().max() < 0.7
    assert (out[..., 2:] - 8).abs().mean() > 4


@deterministic
def test_a_mask_leaves_the_rest_alone(name):
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    given = {"x_T": noise_of()}
    plain, _ = draw(name, fake(name, std=1.0), means(1.0, 2.0), **given)
    masked, _ = draw(
        name, fake(name, std=1.0), means(1.0, 2.0), **given, mask=mask, x0=torch.zeros(2, *SHAPE)
    )
    assert torch.equal(masked[..., 2:], plain[..., 2:])
    assert not torch.allclose(masked[..., :2], plain[..., :2], atol=0.1)


@every_sampler
@pytest.mark.parametrize("given", ["mask", "x0"])
def test_mask_and_x0_belong_together(name, given):
    with pytest.raises(ValueError, match="mask and x0"):
        draw(name, fake(name), means(0.0), **{given: torch.ones(1, *SHAPE)})


# From an image


@every_sampler
def test_stochastic_encode_gives_the_noise_of_a_visited_step(name):
    sampler, x0, noise = SAMPLERS[name](model := fake(name)), noise_of(), noise_of(seed=5)
    sampler.make_schedule(count(name, 10))
    t = torch.tensor([2, 7])
    expected = model.schedule.q_sample(x0, sampler.ddim_timesteps[t], noise)
    assert torch.equal(sampler.stochastic_encode(x0, t, noise=noise), expected)
    expected = model.schedule.q_sample(x0, t, noise)
    assert torch.equal(
        sampler.stochastic_encode(x0, t, use_original_steps=True, noise=noise), expected
    )


def test_stochastic_encode_draws_its_own_noise():
    sampler, x0 = SAMPLERS["ddim"](Gaussian()), torch.zeros(50, *SHAPE)
    sampler.make_schedule(10)
    encoded = sampler.stochastic_encode(x0, torch.full((50,), 6))
    sigma = sampler.ddim_sqrt_one_minus_alphas[6].item()
    assert encoded.std().item() == pytest.approx(sigma, rel=0.1)


@every_sampler
def test_decode_undoes_stochastic_encode(name):
    sampler, cond = SAMPLERS[name](model := fake(name)), means(1.0, 2.0)
    sampler.make_schedule(count(name, 10))
    x0 = model.mean(cond).expand(2, *SHAPE)
    noise, steps = noise_of(), 6
    encoded = sampler.stochastic_encode(x0, torch.full((2,), steps - 1), noise=noise)
    out = sampler.decode(encoded, cond, steps, verbose=False)
    if name == "ddpm":
        torch.testing.assert_close(out, x0, rtol=0, atol=1e-4)
    else:
        left = model.schedule.q_sample(x0, torch.zeros(2, dtype=torch.long), noise)
        torch.testing.assert_close(out, left, rtol=0, atol=1e-4)
    assert list(dict.fromkeys(model.steps)) == sampler.ddim_timesteps[:steps].tolist()[::-1]


@every_sampler
def test_decode_of_no_step_returns_its_input_and_guides_like_sample(name):
    sampler = SAMPLERS[name](model := fake(name))
    sampler.make_schedule(count(name, 10))
    x = sampler.stochastic_encode(
        means(3.0, 6.0)[..., None].expand(2, *SHAPE), torch.full((2,), 2), noise=noise_of()
    )
    assert torch.equal(sampler.decode(x, means(1.0, 2.0), 0, verbose=False), x)
    out = sampler.decode(
        x, means(1.0, 2.0), 3, verbose=False,
        unconditional_guidance_scale=3.0, unconditional_conditioning=means(0.0, 0.0),
    )  # fmt: skip
    assert all(len(cond) == 4 for cond in model.conds)
    assert out.mean(dim=(1, 2, 3)).tolist() == pytest.approx([3.0, 6.0], abs=0.03)
