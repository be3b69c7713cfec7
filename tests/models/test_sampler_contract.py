"""Every sampler in every schedule, for eps and v, at any number of steps: that many, and finite.

The product has 1344 runs of up to 1000 steps. With latents they would take minutes. So what is
sampled is one number, whose exact denoiser is known, and the steps compute with Python's floats.
"""

import functools
import itertools
import math

import jaxtyping
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion import multistep
from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS, make_sampler
from ldm.models.diffusion.sigmas import SCHEDULES, clean_latent
from ldm.rng import SampleRandom
from tests.support.denoisers import SHAPE, AnyTime, means

STEPS = (1, 2, 5, 50, 999, 1000)
KINDS = ("eps", "v")
MEAN, SPREAD = 1.0, 0.5  # of the data, which are one Gaussian
MODELS = {kind: AnyTime(kind, SPREAD) for kind in KINDS}
NOISES = (0.5, -1.0, 0.3, 0.2)


@pytest.fixture(autouse=True, scope="module")
def numbers_for_tensors():
    """Leave types unchecked: a step that is written for tensors computes with numbers, too.

    The weights of multistep methods, the same for both kinds of model, are computed once.
    """
    integrals = functools.cache(multistep.lagrange_integrals)
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multistep, "lagrange_integrals", lambda nodes, *rest: integrals(tuple(nodes), *rest)
        )
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def sample(name, schedule, kind, steps):
    """Sample one number; return it, and at which noise levels the model was asked, by step."""
    sampler = make_sampler(MODELS[kind], name, schedule)
    sampler.make_schedule(steps)
    sampler.reset()
    asked = []

    def denoised(x, sigma):
        asked[-1].append(sigma)
        start = MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)
        eps = (x - start) / sigma
        output = eps if kind == "eps" else (eps - sigma * start) / math.sqrt(1 + sigma**2)
        return clean_latent(kind, x, sigma, output)

    x, noise = sampler.sigmas[0], itertools.cycle(NOISES)
    for index in range(len(sampler.sigmas) - 1):
        asked.append([])
        x = sampler.sigma_step(x, index, denoised, lambda: next(noise))
    return x, asked


@pytest.mark.parametrize("name", SIGMA_SAMPLERS)
def test_over_noise_levels(name):
    for schedule, steps in itertools.product(SCHEDULES, STEPS):
        case = f"{name} {schedule} {steps}"
        found = []
        for kind in KINDS:
            x, asked = sample(name, schedule, kind, steps)
            assert len(asked) == steps and all(asked), case
            # The model is asked once or twice in a step. The first time is at a level that it knows.
            assert all(len(of_step) <= 2 for of_step in asked), case
            levels = MODELS[kind].levels
            low, high = levels.smallest * (1 - 1e-9), levels.largest * (1 + 1e-9)
            assert all(low <= of_step[0] <= high for of_step in asked), case
            assert all(0 < of_step[-1] <= high for of_step in asked), case
            # Two steps from noise to data may miss, but not go astray.
            limit = 10 * SPREAD if steps >= 5 else levels.largest
            assert math.isfinite(x) and abs(x - MEAN) < limit, case
            found.append(float(x))
        assert found[0] == pytest.approx(found[1], abs=1e-6), case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_over_the_models_own_time_steps(name, kind):
    model = MODELS[kind]
    for steps in STEPS:
        model.sizes.clear()
        done = []
        sampler = make_sampler(model, name)

        def draw(steps=steps, sampler=sampler, done=done):
            return sampler.sample(
                steps, 1, SHAPE, means(MEAN), verbose=False, callback=done.append,
                random=SampleRandom([0]),
            )  # fmt: skip

        if name == "ddpm" and steps < 1000:
            with pytest.raises(UserError, match=f"1000.*{steps}"):
                draw()
            continue
        x, _ = draw()
        assert done == list(range(steps))
        assert len(model.sizes) == steps + (name == "plms")
        assert torch.isfinite(x).all() and (x - MEAN).abs().max() < 10 * SPREAD


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("name", [*SAMPLERS, *SIGMA_SAMPLERS])
def test_other_counts_are_one_clear_error(name, steps):
    sampler = make_sampler(MODELS["eps"], name)
    with pytest.raises(UserError, match=f"1000.*{steps}"):
        sampler.sample(steps, 1, SHAPE, means(MEAN), verbose=False)
