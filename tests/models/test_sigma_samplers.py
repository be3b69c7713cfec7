"""The samplers over noise levels: against k-diffusion, diffusers and solutions that are known."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler_names import (
    SAMPLERS,
    SIGMA_SAMPLERS,
    find_sampler,
    make_sampler,
)
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.diffusion.sigmas import (
    SCHEDULES,
    NoiseLevels,
    beta_quantiles,
    clean_latent,
    noise_levels,
)
from ldm.rng import SampleRandom
from tests.support import k_diffusion_numbers as judge

SHAPE = (2, 4, 4, 4)
every_sampler = pytest.mark.parametrize("name", SIGMA_SAMPLERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
STOCHASTIC = {name for name in SIGMA_SAMPLERS if "ancestral" in name or "sde" in name} | {"lcm"}


class Model:
    """The exact denoiser of data from three Gaussians, with a `LatentDiffusion`'s interface."""

    def __init__(self, parameterization="eps", **schedule):
        given = {"linear_start": 0.00085, "linear_end": 0.012, **schedule}
        self.schedule = NoiseSchedule.create(1000, "linear", **given)
        self.levels = NoiseLevels.of(self.schedule)
        self.parameterization, self.threshold = parameterization, None
        self.steps = []  # of every call

    def apply_model(self, x, t, cond):
        self.steps.append(float(t[0]))
        sigma = float(self.levels.sigma(float(t[0])))
        x = x * math.sqrt(1 + sigma**2)
        start = judge.mixture(x, sigma).to(x)
        eps = (x - start) / sigma
        if self.parameterization == "v":
            return (eps - sigma * start) / math.sqrt(1 + sigma**2)
        return {"eps": eps, "x0": start}[self.parameterization]


def run(name, sigmas, noise=None):
    """Sample the mixture from `judge.start` in float64 over the given noise levels."""
    sampler = SIGMA_SAMPLERS[name](Model())
    sampler.sigmas = list(sigmas)
    sampler.reset()
    x = judge.start() * sigmas[0]
    for index in range(len(sigmas) - 1):
        x = sampler.sigma_step(x, index, judge.mixture, noise or judge.noises(SHAPE))
    return x


def draw(model, name, schedule, steps, **more):
    cond = torch.zeros(2, 1, 1)
    more = {"random": SampleRandom([1, 2]), "verbose": False, **more}
    return make_sampler(model, name, schedule).sample(steps, 2, SHAPE[1:], cond, **more)


# Against others


@pytest.mark.parametrize("steps", judge.STEPS)
@pytest.mark.parametrize("name", judge.NAMES)
def test_latents_are_those_of_k_diffusion(name, steps):
    numbers = np.load(judge.DATA)
    found = run(name, numbers[f"sigmas_{steps}"].tolist(), judge.noises(SHAPE))
    expected = torch.from_numpy(numbers[f"{name}_{steps}"])
    # Both compute in float64: what differs is the order of sums.
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", ["uni_pc", "deis"])
def test_latents_are_those_of_diffusers(name, steps):
    from diffusers import DEISMultistepScheduler, UniPCMultistepScheduler

    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "use_karras_sigmas": True,
    }
    if name == "uni_pc":
        scheduler = UniPCMultistepScheduler(**common, solver_order=2, solver_type="bh2")
    else:
        scheduler = DEISMultistepScheduler(**common, solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas.tolist()
    x = judge.start() * sigmas[0] / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, t in zip(sigmas, scheduler.timesteps):
        noisy = x * math.sqrt(1 + sigma**2)
        eps = (noisy - judge.mixture(noisy, sigma)) / sigma
        x = scheduler.step(eps, t, x).prev_sample
    found = run(name, sigmas) / math.sqrt(1 + sigmas[-1] ** 2)
    assert (found - x).abs().max() < 1e-12 * x.abs().max()


def exact(x, sigma, after, steps):
    """Solve the mixture's ODE by Heun's method and Richardson's extrapolation."""

    def heun(steps):
        levels = np.exp(np.linspace(math.log(sigma), math.log(after), steps + 1)).tolist()
        sampler = SIGMA_SAMPLERS["heun"](Model())
        sampler.sigmas = levels
        found = x
        for index in range(steps):
            found = sampler.sigma_step(found, index, judge.mixture, judge.noises(SHAPE))
        return found

    return (4 * heun(2 * steps) - heun(steps)) / 3


@functools.cache
def whole_way():
    """Solve the ODE from noise level 10 to 0.05."""
    return exact(judge.start() * 10, 10, 0.05, 1000)


@pytest.mark.parametrize(
    "name, order",
    [
        ("euler", 1),
        ("heun", 2),
        ("dpm_2", 2),
        ("dpmpp_2m", 2),
        ("uni_pc", 3),
        ("deis", 3),
        ("lms", 4),
    ],
)
def test_the_error_falls_with_the_published_order(name, order):
    """Measure it from a start with exact slopes: a multistep method's own first step is Euler's."""
    errors = []
    for steps in (40, 80):
        sampler = SIGMA_SAMPLERS[name](Model())
        sampler.sigmas = np.exp(np.linspace(math.log(10), math.log(0.05), steps + 1)).tolist()
        sampler.reset()
        x, first = judge.start() * 10, 0
        if name in ("lms", "deis"):
            for first in range(sampler.remembered):
                sigma, after = sampler.sigmas[first : first + 2]
                sampler.remember(sigma, (x - judge.mixture(x, sigma)) / sigma)
                x = exact(x, sigma, after, 40)
            first += 1
        for index in range(first, steps):
            x = sampler.sigma_step(x, index, judge.mixture, judge.noises(SHAPE))
        errors.append(float((x - whole_way()).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_renewed_noise_keeps_the_spread_of_the_data(name):
    """Draw data from one Gaussian: mean and spread of many samples are the data's."""
    sigmas = noise_levels("karras", Model().levels, 60)
    sampler = SIGMA_SAMPLERS[name](Model())
    sampler.sigmas = sigmas
    sampler.reset()
    torch.manual_seed(0)
    x = torch.randn(4000, 1, 1, 1) * sigmas[0] + 1.0

    def denoised(x, sigma):
        return 1.0 + 0.5**2 / (0.5**2 + sigma**2) * (x - 1.0)

    for index in range(60):
        x = sampler.sigma_step(x, index, denoised, lambda: torch.randn(4000, 1, 1, 1))
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)
    if name != "lcm":  # which is for models that were distilled: on others it spreads too little
        assert x.std().item() == pytest.approx(0.5, rel=0.12)


# Schedules and counts


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 999, 1000])
def test_a_schedule_has_exactly_the_steps_that_were_asked_for(schedule, steps):
    sigmas = noise_levels(schedule, Model().levels, steps)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert all(after < before for before, after in itertools.pairwise(sigmas))
    assert sigmas[0] <= Model().levels.largest * (1 + 1e-12)


@every_schedule
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_other_counts_are_refused(schedule, steps):
    with pytest.raises(UserError, match=f"between 1 and 1000, got {steps}"):
        noise_levels(schedule, Model().levels, steps)


@pytest.mark.parametrize(
    "schedule, keyword",
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")],
)
def test_schedules_are_those_of_diffusers(schedule, keyword):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **{keyword: True}
    )
    theirs.set_timesteps(12)
    ours = noise_levels(schedule, Model().levels, 12)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=2e-6)  # theirs are float32


def test_quantiles_of_the_beta_distribution():
    """Compare with scipy.stats.beta(0.6, 0.6).ppf, written down."""
    found = beta_quantiles(np.array([0.05, 0.25, 0.5, 0.9]), 0.6)
    np.testing.assert_allclose(found, [0.012554, 0.175680, 0.5, 0.960416], atol=1e-5)


@every_sampler
@pytest.mark.parametrize("steps", [1, 5])
def test_any_number_of_steps_ends_in_finite_latents(name, steps):
    """Go through the loop; test_sampler_contract.py has every schedule and number of steps."""
    out, _ = draw(Model("v"), name, "sgm_uniform", steps)
    assert out.shape == SHAPE and out.isfinite().all()


@every_sampler
def test_a_schedule_that_ends_in_noise_alone_is_sampled(name):
    model = Model("v", zero_terminal_snr=True)
    out, _ = draw(model, name, "sgm_uniform", 20)
    assert model.steps[0] == 999 and out.isfinite().all()


@every_sampler
def test_the_parameterization_does_not_change_the_sample(name):
    outs = [draw(Model(p), name, "karras", 10)[0] for p in PARAMETERIZATIONS]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=2e-3)


@every_sampler
def test_a_sample_does_not_depend_on_its_neighbours(name):
    cond = torch.zeros(1, 1, 1)
    both, _ = draw(Model(), name, "karras", 6)
    alone, _ = make_sampler(Model(), name, "karras").sample(
        6, 1, SHAPE[1:], cond, random=SampleRandom([2]), verbose=False
    )
    torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-4)


@every_sampler
def test_what_the_mask_keeps_follows_the_image(name):
    kept = torch.ones(1, 1, 4, 4)
    kept[..., :2] = 0
    image = torch.full(SHAPE, 0.7)
    out, _ = draw(Model(), name, "karras", 30, mask=kept, x0=image)
    assert (out[..., 2:] - 0.7).abs().mean() < (out[..., :2] - 0.7).abs().mean()


@every_sampler
def test_an_image_with_little_noise_comes_back(name):
    """Encode to the noise of the last 3 of 30 steps, and decode."""
    sampler = make_sampler(Model(), name, "karras")
    sampler.make_schedule(30)
    image = draw(Model(), "heun", "karras", 30)[0]
    noisy = sampler.stochastic_encode(image, torch.tensor([2, 2]), noise=torch.randn(SHAPE))
    assert (noisy - image).std() == pytest.approx(sampler.sigmas[-4], rel=0.3)
    back = sampler.decode(
        noisy, torch.zeros(2, 1, 1), 3, random=SampleRandom([1, 2]), verbose=False
    )
    assert (back - image).abs().mean() < 0.2


@every_sampler
def test_what_is_seen_on_the_way(name, capsys):
    """The loop is that of DDIM: the same callbacks, intermediates and progress bar."""
    numbers, pictures = [], []
    x_T = SampleRandom([1, 2]).randn(SHAPE)
    out, seen = draw(
        Model(), name, "karras", 6, x_T=x_T, log_every_t=4, verbose=True, callback=numbers.append,
        img_callback=lambda pred_x0, number: pictures.append((number, pred_x0)),
    )  # fmt: skip
    sigma = Model().levels.largest
    torch.testing.assert_close(seen["x_inter"][0], x_T * math.sqrt(1 + sigma**2))
    assert torch.equal(seen["x_inter"][-1], out)
    assert numbers == [number for number, _ in pictures] == list(range(6))
    # The first step, and those of which 4 and 0 are left.
    assert len(seen["x_inter"]) == len(seen["pred_x0"]) == 1 + 3
    kept = [pictures[number][1] for number in (0, 1, 5)]
    assert all(map(torch.equal, seen["pred_x0"][1:], kept))
    assert type(make_sampler(Model(), name)).__name__ in capsys.readouterr().err


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_clean_latent_of_an_output(parameterization):
    """Compare with the schedule's own arithmetic at a time step of it."""
    model, t = Model(), torch.tensor([400])
    start, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    output = PARAMETERIZATIONS[parameterization].target(model.schedule, start, t, noise)
    sigma = float(model.levels.values[400])
    found = clean_latent(parameterization, start + sigma * noise, sigma, output)
    torch.testing.assert_close(found, start, rtol=0, atol=1e-5)


# Names


@pytest.mark.parametrize(
    "given, expected",
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m", ("dpmpp_2m", "normal")),
        ("DPM++ 2S a", ("dpmpp_2s_ancestral", "normal")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential")),
        ("Euler a", ("euler_ancestral", "normal")),
        ("DPM2 a Karras", ("dpm_2_ancestral", "karras")),
        ("sample_dpmpp_sde", ("dpmpp_sde", "normal")),
        ("UniPC", ("uni_pc", "normal")),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", "normal")),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", "normal")),
        ("DPM++ 2M AYS", ("dpmpp_2m", "align_your_steps")),
        ("Euler Trailing", ("euler", "sgm_uniform")),
        ("k_euler_a", ("euler_ancestral", "normal")),
        ("DDIM", ("ddim", None)),
        ("PNDMScheduler", ("plms", None)),
    ],
)
def test_names_of_other_programs(given, expected):
    assert find_sampler(given) == expected


def test_a_schedule_in_the_name_and_beside_it():
    """The same schedule twice is one; two of them are refused."""
    assert find_sampler("DPM++ 2M Karras", "karras") == ("dpmpp_2m", "karras")
    assert find_sampler("Euler AYS", "Align Your Steps") == ("euler", "align_your_steps")
    assert find_sampler("euler", "DDIM") == ("euler", "ddim_uniform")
    with pytest.raises(UserError, match="has karras in its name: leave 'beta' out"):
        find_sampler("DPM++ 2M Karras", "beta")


@pytest.mark.parametrize("name", [*SAMPLERS, *SIGMA_SAMPLERS])
def test_own_names_are_themselves(name):
    assert find_sampler(name)[0] == name


def test_unknown_names_and_schedules_are_refused():
    with pytest.raises(UserError, match=r"unknown 'dpmpp_2n'.*dpmpp_2m"):
        find_sampler("dpmpp_2n")
    with pytest.raises(UserError, match=r"schedule: unknown 'karas'.*karras"):
        find_sampler("euler", "karas")
    with pytest.raises(UserError, match="has its own time steps"):
        find_sampler("ddim", "karras")
