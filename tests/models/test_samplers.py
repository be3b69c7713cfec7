"""What every sampler promises, on models whose exact answer is known."""

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.conditioning import concat_batches
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler import uniform_timesteps
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.schedule import NoiseSchedule, at
from ldm.rng import SampleRandom

SHAPE = (2, 4, 4)
FEW = 40
COUNTS = (1, 2, 3, 9, 27, 36, 250, 300, 999, 1000)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
deterministic = pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


class Gaussian:
    """The best denoiser of data ~ N(mean, std), elementwise; the conditioning holds each sample's mean.

    With std 0 all data are one point, which every prediction is.
    """

    def __init__(self, parameterization="eps", std=0.0, timesteps=1000):
        self.schedule = NoiseSchedule.create(timesteps, "linear", 0.00085, 0.012)
        self.parameterization = PARAMETERIZATIONS[parameterization]
        self.std = std
        self.steps, self.conds = [], []  # of every call

    def apply_model(self, x, t, cond):
        assert len(x) == len(t) and (t == t[0]).all()
        self.steps.append(int(t[0]))
        self.conds.append(cond)
        mean = self.mean(cond)
        assert len(mean) == len(x)
        acp = at(self.schedule.alphas_cumprod, t)
        gain = acp.sqrt() * self.std**2 / (acp * self.std**2 + 1 - acp)
        start = mean + gain * (x - acp.sqrt() * mean)
        return self.parameterization.target(self.schedule, start, t, self.schedule.noise_from_start(x, t, start))

    @staticmethod
    def mean(cond):
        if isinstance(cond, dict):
            cond = cond["c_crossattn"]
        if isinstance(cond, list):
            (cond,) = cond
        return cond.reshape(len(cond), 1, 1, 1)


def means(*values):
    return torch.tensor(values).reshape(-1, 1, 1)


def fake(name, *args, **kwargs):
    """A model for a sampler: with few time steps, where it visits all of them."""
    return Gaussian(*args, timesteps=FEW if name == "ddpm" else 1000, **kwargs)


def count(name, steps):
    """`steps`, or the only number that the sampler can do with its `fake` model."""
    return FEW if name == "ddpm" else steps


def draw(name, model, cond, steps=10, **kwargs):
    sampler = SAMPLERS[name](model)
    return sampler.sample(count(name, steps), len(Gaussian.mean(cond)), SHAPE, cond, verbose=False, **kwargs)


def noise_of(batch=2, seed=0):
    return SampleRandom(range(seed, seed + batch)).randn((batch, *SHAPE))


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
    expected = model.schedule.q_sample(model.mean(cond).expand_as(x_T), torch.zeros(2, dtype=torch.long), left)
    torch.testing.assert_close(draw(name, model, cond, x_T=x_T)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0)])
def test_samples_have_the_mean_and_spread_of_the_data(name, eta):
    torch.manual_seed(0)
    model, cond = fake(name, std=0.5), torch.full((400, 1, 1), 2.0)
    steps = count(name, 200)
    # From noise as the data would have it at the first visited step: in Stable Diffusion's schedule even
    # the last time step has 7 % of signal.
    t = uniform_timesteps(steps, len(model.schedule))[-1:].expand(400)
    x_T = model.schedule.q_sample(2 + 0.5 * torch.randn(400, *SHAPE), t, torch.randn(400, *SHAPE))
    out, _ = draw(name, model, cond, steps, eta=eta, x_T=x_T)
    assert out.mean().item() == pytest.approx(2.0, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, rel=0.05)  # fewer steps spread less


@every_sampler
def test_the_parameterization_does_not_change_the_sample(name):
    outs = [
        draw(name, fake(name, parameterization, std=0.5), means(1.0, 2.0), random=SampleRandom([7, 8]))[0]
        for parameterization in PARAMETERIZATIONS
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-3)


def test_plms_is_closer_to_the_exact_solution_than_ddim():
    model, cond, x_T = Gaussian(std=0.5), means(1.0, 2.0), noise_of()
    acp = model.schedule.alphas_cumprod
    first, last = acp[0], acp[uniform_timesteps(20, 1000)[-1]]
    spread = [(a * 0.25 + 1 - a).sqrt() for a in (first, last)]
    mean = model.mean(cond)
    exact = first.sqrt() * mean + spread[0] / spread[1] * (x_T - last.sqrt() * mean)
    errors = {name: (draw(name, model, cond, 20, x_T=x_T)[0] - exact).abs().max() for name in ("ddim", "plms")}
    assert errors["plms"] < errors["ddim"] / 3


# Time steps


@every_sampler
@pytest.mark.parametrize("steps", COUNTS)
def test_any_count_visits_exactly_that_many_time_steps(name, steps):
    if name == "ddpm" and steps != 1000:
        with pytest.raises(UserError, match=f"1000 time steps, not {steps}"):
            SAMPLERS[name](Gaussian()).make_schedule(steps)
        return
    model = Gaussian()
    SAMPLERS[name](model).sample(steps, 1, SHAPE, means(1.0), verbose=False)
    visited = list(dict.fromkeys(model.steps))
    assert len(visited) == steps
    assert visited == sorted(visited, reverse=True)
    assert visited[0] <= 999 and visited[-1] >= 0
    assert len(model.steps) == steps + (name == "plms")  # its first step looks ahead once


@pytest.mark.parametrize("total", [2, 7, 50, 1000])
def test_every_count_of_every_schedule_is_in_range(total):
    for steps in range(1, total + 1):
        t = uniform_timesteps(steps, total)
        assert len(t) == steps and t.dtype == torch.int64
        assert (t.diff() > 0).all() and t[0] >= 0 and t[-1] < total


@deterministic
def test_ten_steps_are_those_of_stable_diffusion(name):
    sampler = SAMPLERS[name](Gaussian())
    sampler.make_schedule(10)
    assert sampler.ddim_timesteps.tolist() == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]


@deterministic
@pytest.mark.parametrize("steps", [n for n in range(1, 1000) if 1000 % n == 0])
def test_divisors_of_the_schedule_visit_what_the_reference_does(name, steps):
    sampler = SAMPLERS[name](Gaussian())
    sampler.make_schedule(steps)
    assert sampler.ddim_timesteps.tolist() == (np.arange(0, 1000, 1000 // steps) + 1).tolist()


@every_sampler
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_counts_are_refused(name, steps):
    with pytest.raises(UserError, match=str(steps)):
        SAMPLERS[name](Gaussian()).sample(steps, 1, SHAPE, means(1.0), verbose=False)


@every_sampler
def test_a_short_schedule_is_sampled_as_well(name):
    model = Gaussian(timesteps=20)
    SAMPLERS[name](model).sample(20, 1, SHAPE, means(1.0), verbose=False)
    assert list(dict.fromkeys(model.steps)) == list(range(20))[::-1]


# Random numbers


def noisy(name):
    return {"eta": 1.0} if SAMPLERS[name].supports_eta else {}


@every_sampler
def test_same_seeds_same_samples_and_other_seeds_others(name):
    first, again, other = (
        draw(name, fake(name, std=1.0), means(0.0, 0.0), random=SampleRandom(seeds), **noisy(name))[0]
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
        draw(name, fake(name, std=1.0), means(0.0, 0.0), x_T=noise_of(), random=SampleRandom(seeds))[0]
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
    assert spread(1.0, 0.5) == pytest.approx(0.5 * spread(1.0, 1.0), rel=1e-4)  # noise enters linearly here


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
    out, _ = draw(name, fake(name, std=10.0), means(0.0, 0.0), 50, mask=mask, x0=x0, random=SampleRandom([0, 1]))
    assert (out[..., :2] - 8).abs().max() < 0.7
    assert (out[..., 2:] - 8).abs().mean() > 4


@deterministic
def test_a_mask_leaves_the_rest_alone(name):
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    given = {"x_T": noise_of()}
    plain, _ = draw(name, fake(name, std=1.0), means(1.0, 2.0), **given)
    masked, _ = draw(name, fake(name, std=1.0), means(1.0, 2.0), **given, mask=mask, x0=torch.zeros(2, *SHAPE))
    assert torch.equal(masked[..., 2:], plain[..., 2:])
    assert not torch.allclose(masked[..., :2], plain[..., :2], atol=0.1)


@every_sampler
@pytest.mark.parametrize("given", ["mask", "x0"])
def test_mask_and_x0_belong_together(name, given):
    with pytest.raises(ValueError, match="mask and x0"):
        draw(name, fake(name), means(0.0), **{given: torch.ones(1, *SHAPE)})


# Conditioning and guidance


@every_parameterization
@every_sampler
def test_guidance_moves_away_from_the_unconditional_prediction(name, parameterization):
    _, intermediates = draw(
        name, fake(name, parameterization), means(1.0, 2.0), x_T=noise_of(),
        unconditional_guidance_scale=3.0, unconditional_conditioning=means(0.5, 0.5),
    )  # fmt: skip
    expected = means(0.5 + 3 * 0.5, 0.5 + 3 * 1.5)[..., None].expand(2, *SHAPE)
    torch.testing.assert_close(intermediates["pred_x0"][-1], expected, rtol=0, atol=1e-3)


FORMS = {
    "tensor": lambda c: c,
    "list": lambda c: [c],
    "dict": lambda c: {"c_crossattn": [c], "c_concat": [c[..., None].expand(-1, 3, 4, 4)]},
}


def tensors(cond):
    if isinstance(cond, torch.Tensor):
        return [cond]
    return [tensor for part in (cond.values() if isinstance(cond, dict) else cond) for tensor in tensors(part)]


@every_sampler
@pytest.mark.parametrize("form", FORMS)
def test_guidance_runs_both_halves_in_one_batch_the_unconditional_first(name, form):
    model, cond, uncond = fake(name), FORMS[form](means(1.0, 2.0)), FORMS[form](means(3.0, 4.0))
    draw(name, model, cond, unconditional_guidance_scale=2.0, unconditional_conditioning=uncond)
    for seen in model.conds:
        for both, first, second in zip(tensors(seen), tensors(uncond), tensors(cond), strict=True):
            assert torch.equal(both, torch.cat([first, second]))


@every_sampler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale, with_uncond", [(1.0, True), (7.5, False)])
def test_without_guidance_the_model_runs_on_one_half_only(name, form, scale, with_uncond):
    model, cond = fake(name), FORMS[form](means(1.0, 2.0))
    uncond = FORMS[form](means(3.0, 4.0)) if with_uncond else None
    draw(name, model, cond, unconditional_guidance_scale=scale, unconditional_conditioning=uncond)
    assert all(seen is cond for seen in model.conds)


@every_sampler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["conditioning", "unconditional_conditioning"])
def test_a_conditioning_of_another_batch_size_is_refused(name, form, which):
    conds = {"conditioning": means(1.0, 2.0), "unconditional_conditioning": means(1.0, 2.0), which: means(1.0)}
    conds = {key: FORMS[form](cond) for key, cond in conds.items()}
    with pytest.raises(ValueError, match="for 1 samples, batch_size is 2"):
        SAMPLERS[name](fake(name)).sample(
            count(name, 10), 2, SHAPE, verbose=False, unconditional_guidance_scale=2.0, **conds
        )


def test_conditionings_of_two_forms_do_not_mix():
    with pytest.raises(ValueError, match="Tensor and dict"):
        concat_batches(means(1.0), {"c_crossattn": [means(1.0)]})


# On the way


@every_sampler
def test_callbacks_count_the_steps_and_see_the_predictions(name):
    numbers, pictures = [], []
    _, intermediates = draw(
        name, fake(name, std=1.0), means(1.0, 2.0), log_every_t=1,
        callback=numbers.append, img_callback=lambda pred_x0, number: pictures.append((number, pred_x0)),
    )  # fmt: skip
    steps = list(range(count(name, 10)))
    assert numbers == steps
    assert [number for number, _ in pictures] == steps
    assert all(torch.equal(a, b) for (_, a), b in zip(pictures, intermediates["pred_x0"][1:], strict=True))


@every_sampler
def test_intermediates_begin_with_the_noise_and_end_with_the_result(name):
    x_T = noise_of()
    out, intermediates = draw(name, fake(name, std=1.0), means(1.0, 2.0), x_T=x_T, log_every_t=4)
    steps = count(name, 10)
    kept = {0, *(steps - 1 - index for index in range(0, steps, 4))}
    assert set(intermediates) == {"x_inter", "pred_x0"}
    for values in intermediates.values():
        assert torch.equal(values[0], x_T)
        assert len(values) == 1 + len(kept)
    assert torch.equal(intermediates["x_inter"][-1], out)
    assert out.shape == (2, *SHAPE)


@every_sampler
def test_the_progress_bar_is_shown_only_when_asked_for(name, capsys):
    sampler = SAMPLERS[name](fake(name))
    sampler.sample(count(name, 2), 1, SHAPE, means(1.0), verbose=False)
    assert capsys.readouterr() == ("", "")
    sampler.sample(count(name, 2), 1, SHAPE, means(1.0))
    assert type(sampler).__name__ in capsys.readouterr().err


@every_sampler
def test_a_sampler_can_be_used_again(name):
    sampler = SAMPLERS[name](fake(name, std=1.0))
    first, again = (
        sampler.sample(count(name, 10), 2, SHAPE, means(1.0, 2.0), random=SampleRandom([0, 1]), verbose=False)[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)


@every_sampler
def test_no_graph_is_built(name):
    cond = means(1.0).requires_grad_()
    assert not draw(name, fake(name), cond)[0].requires_grad


# From an image


@every_sampler
def test_stochastic_encode_gives_the_noise_of_a_visited_step(name):
    sampler, x0, noise = SAMPLERS[name](model := fake(name)), noise_of(), noise_of(seed=5)
    sampler.make_schedule(count(name, 10))
    t = torch.tensor([2, 7])
    expected = model.schedule.q_sample(x0, sampler.ddim_timesteps[t], noise)
    assert torch.equal(sampler.stochastic_encode(x0, t, noise=noise), expected)
    expected = model.schedule.q_sample(x0, t, noise)
    assert torch.equal(sampler.stochastic_encode(x0, t, use_original_steps=True, noise=noise), expected)


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
    x = sampler.stochastic_encode(means(3.0, 6.0)[..., None].expand(2, *SHAPE), torch.full((2,), 2), noise=noise_of())
    assert torch.equal(sampler.decode(x, means(1.0, 2.0), 0, verbose=False), x)
    out = sampler.decode(
        x, means(1.0, 2.0), 3, verbose=False,
        unconditional_guidance_scale=3.0, unconditional_conditioning=means(0.0, 0.0),
    )  # fmt: skip
    assert all(len(cond) == 4 for cond in model.conds)
    assert out.mean(dim=(1, 2, 3)).tolist() == pytest.approx([3.0, 6.0], abs=0.03)


def test_the_last_ancestral_step_adds_no_noise():
    sampler = DDPMSampler(model := Gaussian())
    sampler.make_schedule(1000)

    def never():
        raise AssertionError("noise in the last step")

    out, _ = sampler.step(noise_of(), 0, lambda x, t: model.apply_model(x, t, means(1.0, 2.0)), never)
    torch.testing.assert_close(out, model.mean(means(1.0, 2.0)).expand_as(out), rtol=0, atol=1e-5)


def test_only_the_uniform_discretization_is_known():
    with pytest.raises(UserError, match="ddim_discretize: unknown 'quad'; accepted: uniform"):
        SAMPLERS["ddim"](Gaussian()).make_schedule(10, "quad")
