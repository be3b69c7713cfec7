"""What changes classifier-free guidance: against plain formulas in float64, and in every sampler."""

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.guidance import Guidance, Interval, Projection, Rescale, guided
from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS, make_sampler
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.rng import SampleRandom
from tests.support.denoisers import FEW, SHAPE, AnyTime, means

SCALE = 5.0
every_sampler = pytest.mark.parametrize("name", [*SAMPLERS, *SIGMA_SAMPLERS])
both = pytest.mark.parametrize("parameterization", ["eps", "v"])


# Formulas


class Told:
    """A model whose output is its conditioning."""

    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)

    def __init__(self, parameterization="eps"):
        self.parameterization, self.threshold = parameterization, None
        self.calls = []

    def apply_model(self, x, t, cond):
        self.calls.append(len(x))
        return cond


def latents(seed, count=2):
    return SampleRandom(range(seed, seed + count)).randn((count, *SHAPE))


def outputs(guidance, parameterization="eps", t=500, model=None):
    """Return x_t, the two outputs and the guided one; all but the last in float64."""
    x, cond, uncond = latents(0), latents(10), latents(20)
    model = model or Told(parameterization)
    found = guided(model, cond, uncond, SCALE, guidance)(x, torch.full((2,), t))
    return x.double(), cond.double(), uncond.double(), found


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_classifier_free_guidance_is_equation_6():
    _, cond, uncond, found = outputs(None)
    close(found, (1 - SCALE) * uncond + SCALE * cond)
    assert torch.equal(found, outputs(Guidance())[-1])


def test_rescaling_gives_the_spread_of_the_prompts_own_output():
    _, cond, uncond, found = outputs(Guidance(rescale=Rescale(0.7)))
    expected = []
    for c, u in zip(cond, uncond):
        plain = u + SCALE * (c - u)
        expected.append(0.7 * plain * c.std() / plain.std() + 0.3 * plain)
    close(found, torch.stack(expected))


@pytest.mark.parametrize("t, guides", [(999, False), (700, True), (400, True), (100, False)])
def test_an_interval_guides_inside_of_it_and_runs_the_model_once_elsewhere(t, guides):
    acp = Told.schedule.alphas_cumprod.double()
    low, high = (float(((1 - a) / a).sqrt()) for a in acp[[399, 700]])
    model = Told()
    _, cond, uncond, found = outputs(Guidance(interval=Interval(low, high)), t=t, model=model)
    close(found, uncond + SCALE * (cond - uncond) if guides else cond)
    assert model.calls == ([4] if guides else [2])


def clean(parameterization, x, output, acp):
    if parameterization == "eps":
        return (x - (1 - acp).sqrt() * output) / acp.sqrt()
    return acp.sqrt() * x - (1 - acp).sqrt() * output


def output_for(parameterization, x, start, acp):
    if parameterization == "eps":
        return (x - acp.sqrt() * start) / (1 - acp).sqrt()
    return (acp.sqrt() * x - start) / (1 - acp).sqrt()


def projected(cond, uncond, parallel, norm, momentum, scale):
    """Guide clean latents of one sample, given at several steps, as the paper says."""
    average, found = 0.0, []
    for c, u in zip(cond, uncond):
        average = (c - u) + momentum * average
        difference = average * min(1.0, norm / float(average.norm())) if norm else average
        unit = c / c.norm()
        along = (difference * unit).sum() * unit
        found.append(c + (scale - 1) * (difference - along + parallel * along))
    return found


@both
@pytest.mark.parametrize(
    "parallel, norm, momentum",
    [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.3, 5.0, 0.0), (0.0, 1000.0, -0.5), (0.0, 2.5, -0.75)],
)
def test_projected_guidance_is_the_papers_formula(parameterization, parallel, norm, momentum):
    model, x, steps = Told(parameterization), latents(0), (900, 500, 20)
    cond, uncond = latents(10), latents(20)
    guidance = Guidance(projection=Projection(parallel, norm, momentum))
    denoise = guided(model, cond, uncond, SCALE, guidance)
    found = [denoise(x, torch.full((2,), t)) for t in steps]
    acp = model.schedule.alphas_cumprod.double()[list(steps)]
    for sample in range(2):
        starts = [
            [clean(parameterization, x[sample].double(), o[sample].double(), a) for a in acp]
            for o in (cond, uncond)
        ]
        expected = projected(*starts, parallel, norm, momentum, SCALE)
        for output, start, a in zip(found, expected, acp):
            close(output[sample], output_for(parameterization, x[sample].double(), start, a))


def test_a_weak_model_takes_the_place_of_the_empty_prompt():
    """Compare with personalization guidance: the weak model's own output without the prompt."""
    weak = AnyTime()
    x, cond, uncond = latents(0), latents(10), means(3.0, -3.0)
    t = torch.full((2,), 500)
    found = guided(Told(), cond, uncond, SCALE, Guidance(weak=weak.apply_model))(x, t)
    from_weak = AnyTime().apply_model(x, t, uncond).double()
    close(found, from_weak + SCALE * (cond.double() - from_weak))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rescale(1.5),
        lambda: Rescale(float("nan")),
        lambda: Interval(2.0, 1.0),
        lambda: Interval(-1.0, 1.0),
        lambda: Projection(parallel=float("inf")),
        lambda: Projection(norm=-1.0),
        lambda: Projection(norm=float("nan")),
        lambda: Projection(momentum=1.0),
    ],
)
def test_values_that_mean_nothing_are_refused(make):
    with pytest.raises(UserError, match=r"expected|must be"):
        make()


# In the samplers


KINDS = {
    "plain": Guidance(),
    "interval": Guidance(interval=Interval(0.3, 5.0)),
    "projection": Guidance(projection=Projection(0.0, 2.0, -0.5)),
    "rescale": Guidance(rescale=Rescale(0.7)),
    "all": Guidance(Rescale(0.5), Interval(0.3, 5.0), Projection(0.2, 2.0, -0.5)),
}


def draw(name, parameterization, guidance, seeds=(1, 2), cond=(1.0, -2.0)):
    """Sample with guidance; return the latents and the model, which remembers its calls."""
    model = AnyTime(parameterization, std=0.5, timesteps=FEW)
    steps = FEW if name == "ddpm" else 6
    x, _ = make_sampler(model, name).sample(
        steps, len(seeds), SHAPE, means(*cond), verbose=False, guidance=guidance,
        random=SampleRandom(seeds), unconditional_guidance_scale=3.0,
        unconditional_conditioning=means(*[0.0] * len(seeds)),
    )  # fmt: skip
    return x, model


@every_sampler
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_takes_every_guidance(name, kind):
    eps, model = draw(name, "eps", KINDS[kind])
    v, _ = draw(name, "v", KINDS[kind])
    assert eps.isfinite().all() and v.isfinite().all()
    # Rescaling is of the output, whatever that is. The others are the same for eps and v.
    if KINDS[kind].rescale is None:
        torch.testing.assert_close(eps, v, rtol=2e-3, atol=2e-3)
    # The interval saves calls, and only the interval does.
    single = [size for size in model.sizes if size == 2]
    assert bool(single) == (KINDS[kind].interval is not None)
    assert len(single) < len(model.sizes)


@every_sampler
def test_every_sampler_asks_the_weak_model(name):
    weak = AnyTime(std=0.5, timesteps=FEW)
    found, model = draw(name, "eps", Guidance(weak=weak.apply_model))
    # The same model as its own weak model is classifier-free guidance.
    torch.testing.assert_close(found, draw(name, "eps", None)[0], rtol=1e-4, atol=1e-4)
    assert weak.sizes == model.sizes and set(weak.sizes) == {2}


@every_sampler
def test_a_guided_sample_does_not_depend_on_its_neighbours(name):
    together, _ = draw(name, "eps", KINDS["all"])
    alone, _ = draw(name, "eps", KINDS["all"], seeds=(2,), cond=(-2.0,))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_second_run_begins_without_the_momentum_of_the_first():
    first, second = (draw("euler", "eps", KINDS["projection"])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, draw("euler", "eps", None)[0], atol=1e-2)


def test_decoding_from_an_image_is_guided_in_the_same_way():
    model = AnyTime(std=0.5)
    found = []
    for guidance in (None, KINDS["projection"]):
        sampler = make_sampler(model, "ddim")
        sampler.make_schedule(10)
        found.append(
            sampler.decode(
                latents(0), means(1.0, -2.0), 6, 3.0, means(0.0, 0.0), verbose=False,
                guidance=guidance,
            )
        )  # fmt: skip
    assert not torch.allclose(*found, atol=1e-2)
