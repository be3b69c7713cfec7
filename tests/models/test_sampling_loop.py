"""The sampling loop: which time steps are visited, conditioning and guidance, what is seen on the
way.
"""

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.conditioning import concat_batches
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler import uniform_timesteps
from ldm.models.diffusion.sampler_names import SAMPLERS
from ldm.rng import SampleRandom
from tests.support.denoisers import SHAPE, Gaussian, count, draw, fake, means, noise_of

COUNTS = (1, 2, 3, 9, 27, 36, 250, 300, 999, 1000)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
deterministic = pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


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


def test_only_the_uniform_discretization_is_known():
    with pytest.raises(UserError, match="ddim_discretize: unknown 'quad'; accepted: uniform"):
        SAMPLERS["ddim"](Gaussian()).make_schedule(10, "quad")


def test_the_last_ancestral_step_adds_no_noise():
    sampler = DDPMSampler(model := Gaussian())
    sampler.make_schedule(1000)

    def never():
        raise AssertionError("noise in the last step")

    out, _ = sampler.step(
        noise_of(), 0, lambda x, t: model.apply_model(x, t, means(1.0, 2.0)), never
    )
    torch.testing.assert_close(out, model.mean(means(1.0, 2.0)).expand_as(out), rtol=0, atol=1e-5)


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
    return [
        tensor
        for part in (cond.values() if isinstance(cond, dict) else cond)
        for tensor in tensors(part)
    ]


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
    conds = {
        "conditioning": means(1.0, 2.0),
        "unconditional_conditioning": means(1.0, 2.0),
        which: means(1.0),
    }
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
    assert all(
        torch.equal(a, b) for (_, a), b in zip(pictures, intermediates["pred_x0"][1:], strict=True)
    )


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
        sampler.sample(
            count(name, 10), 2, SHAPE, means(1.0, 2.0), random=SampleRandom([0, 1]), verbose=False
        )[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)


@every_sampler
def test_no_graph_is_built(name):
    cond = means(1.0).requires_grad_()
    assert not draw(name, fake(name), cond)[0].requires_grad
