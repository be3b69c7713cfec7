"""Zero terminal SNR: schedules whose last step is noise alone."""

import pytest
import torch

from ldm.checkpoints.diffusers_format import scheduler_config
from ldm.checkpoints.pipeline_folder import schedule_of_pipeline
from ldm.errors import UserError
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler import trailing_timesteps
from ldm.models.diffusion.sampler_names import SAMPLERS
from ldm.models.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from ldm.sampling.text_to_image import load_model
from tests.support import golden
from tests.support.denoisers import SHAPE, Gaussian, count, fake, means, noise_of
from tests.support.models import (
    SCHEDULE,
    build,
)
from tests.support.runs import (
    Workspace,
    assert_resumes_exactly,
    checkpoint,
    golden_config,
    same,
)


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"), make_config=golden_config)


@pytest.fixture(scope="module")
def terminal():
    return NoiseSchedule.create(1000, "linear", 0.00085, 0.012, zero_terminal_snr=True)


def test_zero_terminal_snr_keeps_the_first_step_and_scales_the_others(terminal):
    plain = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    assert terminal.ends_in_noise and not plain.ends_in_noise
    assert terminal.alphas_cumprod[-1] == 0 and terminal.betas[-1] == 1
    torch.testing.assert_close(terminal.alphas_cumprod[0], plain.alphas_cumprod[0])
    # sqrt(acp) is moved and scaled, the same at every step.
    scaled, root = (s.sqrt_alphas_cumprod.double() for s in (terminal, plain))
    torch.testing.assert_close(
        scaled, (root - root[-1]) * root[0] / (root[0] - root[-1]), rtol=1e-4, atol=1e-6
    )
    for name, value in vars(terminal).items():
        assert value.isfinite().all(), name
    assert ((terminal.betas > 0) & (terminal.betas <= 1)).all() and (
        terminal.alphas_cumprod.diff() < 0
    ).all()


@pytest.mark.parametrize("beta_schedule", ["linear", "sqrt_linear", "cosine"])
def test_rescaling_twice_changes_nothing(beta_schedule):
    once = with_zero_terminal_snr(NoiseSchedule.create(100, beta_schedule).betas.double().numpy())
    torch.testing.assert_close(
        torch.tensor(with_zero_terminal_snr(once)), torch.tensor(once), rtol=1e-9, atol=1e-12
    )


def test_every_conversion_is_finite_where_no_signal_is_left(terminal):
    t = torch.tensor([0, 500, 999])
    x_start, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.manual_seed(0))
    x_t = terminal.q_sample(x_start, t, noise)
    assert torch.equal(x_t[2], noise[2])
    v = PARAMETERIZATIONS["v"]
    output = v.target(terminal, x_start, t, noise)
    assert torch.equal(output[2], -x_start[2])
    torch.testing.assert_close(v.to_noise(terminal, x_t, t, output), noise, rtol=0, atol=5e-5)
    torch.testing.assert_close(v.to_start(terminal, x_t, t, output), x_start, rtol=0, atol=5e-5)
    assert torch.equal(terminal.noise_from_start(x_t, t, x_start)[2], noise[2])
    torch.testing.assert_close(terminal.noise_from_start(x_t, t, x_start), noise, rtol=0, atol=1e-4)
    assert not terminal.start_from_noise(x_t, t, noise)[2].any()
    mean, log_variance = terminal.q_posterior(x_start, x_t, t)
    assert mean.isfinite().all() and log_variance.isfinite().all()
    # From noise alone the step before is that of the clean latent, whatever the noise is.
    torch.testing.assert_close(mean[2], terminal.alphas_cumprod[998].sqrt() * x_start[2])
    torch.testing.assert_close(
        log_variance[2].exp().flatten(), 1 - terminal.alphas_cumprod[998:999]
    )


def test_weights_are_finite_where_no_signal_is_left(terminal):
    v, t = PARAMETERIZATIONS["v"], torch.arange(1000)
    weights = v.min_snr_weight(terminal, t, 5.0)
    assert weights.isfinite().all() and weights[999] == 0 and (weights[:999] > 0).all()
    assert v.vlb_weights(terminal).tolist() == [1.0] * 1000
    model = build(
        parameterization="v", zero_terminal_snr=True, min_snr_gamma=5.0, original_elbo_weight=0.5
    )
    losses = model._losses(
        torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([999, 3]), noise_of_latents()
    )
    assert (
        all(value.isfinite().all() for value in losses.values()) and losses["loss_simple"].min() > 0
    )


def noise_of_latents():
    return torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_zero_terminal_snr_needs_v(parameterization):
    with pytest.raises(
        UserError, match=f"zero_terminal_snr: needs parameterization: v, got {parameterization}: "
    ):
        build(parameterization=parameterization, zero_terminal_snr=True)


def test_zero_terminal_snr_needs_two_steps():
    with pytest.raises(UserError, match="zero_terminal_snr: needs 2 timesteps"):
        NoiseSchedule.create(1, zero_terminal_snr=True)


# Sampling


@pytest.mark.parametrize("total", [2, 7, 1000])
def test_trailing_time_steps_end_with_the_last(total):
    for steps in range(1, total + 1):
        t = trailing_timesteps(steps, total)
        assert len(t) == steps and t.dtype == torch.int64
        assert t[0] >= 0 and (t.diff() > 0).all() and t[-1] == total - 1
    with pytest.raises(UserError, match=f"between 1 and {total}, got {total + 1}"):
        trailing_timesteps(total + 1, total)


def test_ten_trailing_time_steps_are_those_of_the_paper():
    assert trailing_timesteps(10, 1000).tolist() == [
        99,
        199,
        299,
        399,
        499,
        599,
        699,
        799,
        899,
        999,
    ]


def rescaled(name, std=0.0):
    """A sampler's `fake` model of v with zero terminal SNR."""
    model = fake(name, "v", std)
    model.schedule = NoiseSchedule.of_betas(
        with_zero_terminal_snr(model.schedule.betas.double().numpy())
    )
    return model


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0)])
def test_sampling_starts_at_the_last_step_and_finds_the_point_that_all_data_are(name, eta):
    model, cond = rescaled(name), means(1.5, -0.5)
    steps = count(name, 10)
    out, intermediates = SAMPLERS[name](model).sample(
        steps, 2, SHAPE, cond, x_T=noise_of(), eta=eta, verbose=False
    )
    assert model.steps[0] == len(model.schedule) - 1 and len(set(model.steps)) == steps
    expected = model.mean(cond).expand(2, *SHAPE)
    assert all(x.isfinite().all() for x in intermediates["x_inter"])
    torch.testing.assert_close(intermediates["pred_x0"][-1], expected, rtol=0, atol=1e-4)
    assert (out - expected).abs().max() < 0.15


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0)])
def test_from_noise_alone_samples_have_the_mean_and_spread_of_the_data(name, eta):
    torch.manual_seed(0)
    model, cond = rescaled(name, std=0.5), torch.full((400, 1, 1), 2.0)
    steps = count(name, 200)
    out, _ = SAMPLERS[name](model).sample(
        steps, 400, SHAPE, cond, eta=eta, x_T=torch.randn(400, *SHAPE), verbose=False
    )
    # No signal of the data is in x_T: their mean comes from the model alone.
    assert out.mean().item() == pytest.approx(2.0, abs=0.02)
    assert out.std().item() == pytest.approx(
        0.5, rel=0.1 if name == "ddpm" else 0.05
    )  # which visits 40 steps here


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 1000])
def test_plms_from_noise_alone_with_any_count(steps):
    model = rescaled("plms", std=0.5)
    out, _ = SAMPLERS["plms"](model).sample(
        steps, 2, SHAPE, means(1.0, 2.0), x_T=noise_of(), verbose=False
    )
    assert out.isfinite().all() and model.steps[0] == 999


def test_other_schedules_are_sampled_as_before():
    sampler = SAMPLERS["ddim"](Gaussian("v"))
    sampler.make_schedule(10)
    assert sampler.ddim_timesteps.tolist() == list(range(1, 1000, 100))


# Models and files


def test_a_base_models_schedule_is_rescaled_and_a_rescaled_one_kept():
    base, model = (
        build(parameterization="v", zero_terminal_snr=on, **SCHEDULE) for on in (False, True)
    )
    model.load_state_dict(base.state_dict())
    expected = NoiseSchedule.create(1000, "linear", 0.00085, 0.012, zero_terminal_snr=True)
    for name in NoiseSchedule.names():
        torch.testing.assert_close(
            getattr(model, name), getattr(expected, name), rtol=1e-3, atol=1e-5
        )
    assert model.schedule.ends_in_noise and not base.schedule.ends_in_noise
    again = build(parameterization="v", zero_terminal_snr=True, **SCHEDULE)
    again.load_state_dict(model.state_dict())
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    # Without the key the checkpoint's own schedule stays, too.
    base.load_state_dict(model.state_dict())
    assert torch.equal(base.alphas_cumprod, model.alphas_cumprod)


def test_a_run_with_zero_terminal_snr_from_a_base_model(workspace, tmp_path):
    torch.save(
        {"state_dict": golden.latent_diffusion().state_dict()}, base := tmp_path / "base.ckpt"
    )
    more = [
        "--actual_resume",
        str(base),
        "model.params.parameterization=v",
        "model.params.zero_terminal_snr=true",
    ]
    run, _ = assert_resumes_exactly(workspace, "terminal", *more, at=1, steps=2)
    state = checkpoint(run)["state_dict"]
    assert state["alphas_cumprod"][-1] == 0 and state["sqrt_recip_alphas_cumprod"].isfinite().all()
    model = load_model(run / "checkpoints/last.ckpt")
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])
    sampler = SAMPLERS["ddim"](model)
    sampler.make_schedule(10)
    assert sampler.ddim_timesteps[-1] == 999


def test_diffusers_is_told_of_zero_terminal_snr():
    params = {"linear_start": 0.00085, "linear_end": 0.012, "parameterization": "v"}
    plain, told = scheduler_config(params), scheduler_config({**params, "zero_terminal_snr": True})
    assert (plain["timestep_spacing"], told["timestep_spacing"]) == ("leading", "trailing")
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config(told)
    theirs.set_timesteps(30)
    assert theirs.timesteps.tolist() == trailing_timesteps(30, 1000).flip(0).tolist()
    ours = NoiseSchedule.create(
        1000, "linear", 0.00085, 0.012, zero_terminal_snr=True
    ).alphas_cumprod
    torch.testing.assert_close(theirs.alphas_cumprod, ours, rtol=1e-3, atol=1e-6)
    assert "rescale_betas_zero_snr" not in plain


def test_a_pipeline_says_that_its_last_step_is_noise_alone(tmp_path):
    config = tmp_path / "scheduler/scheduler_config.json"
    config.parent.mkdir()
    config.write_text('{"rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}')
    found = schedule_of_pipeline(tmp_path)
    assert found["zero_terminal_snr"] is True and found["parameterization"] == "v"
