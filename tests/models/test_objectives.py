"""Objectives beside the reference's: each is off by default, does what its paper says, and resumes exactly."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy

import main
from ldm.checkpoints.diffusers_format import scheduler_config
from ldm.checkpoints.pipeline_folder import config_of_pipeline
from ldm.data.finding import find_images, list_images
from ldm.data.latents import CachedLatents
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler import trailing_timesteps
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from ldm.models.diffusion.trained import check_same_parameters, check_strategy
from ldm.modules.losses.diffusion import per_sample_loss, place_weights, with_offset
from ldm.optim.schedules import WarmupDecay
from ldm.rng import SampleRandom
from ldm.sampling.text_to_image import load_model
from tests.models.test_diffusion import SIZE, batch, build, loader, small_trainer, step
from tests.models.test_samplers import SHAPE, Gaussian, count, fake, means, noise_of
from tests.support import golden, runs
from tests.support.runs import Workspace, checkpoint, csv_rows, metrics, same

SCHEDULE = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


def assert_resumes_exactly(workspace, name, *more, at=2, steps=4):
    """A run that is stopped after `at` steps and resumed ends where the uninterrupted one does; both run folders."""
    straight = workspace.train(f"{name}-straight", "--max_steps", str(steps), *more)
    parts = workspace.train(f"{name}-parts", "--max_steps", str(at), *more)
    workspace.resume(parts, "--max_steps", str(steps))
    ours, theirs = checkpoint(parts), checkpoint(straight)
    assert ours["global_step"] == steps
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(ours[key], theirs[key]), key
    losses = {row["step"]: row["train/loss_total"] for row in metrics(straight)}
    assert losses == {row["step"]: row["train/loss_total"] for row in metrics(parts)}
    return straight, parts


# Offset noise


def test_offset_noise_is_a_constant_for_each_sample_and_channel():
    noise = SampleRandom([1, 2]).randn((2, 4, 8, 8))
    offset = (with_offset(noise, 0.5, [1, 2]) - noise) / 0.5
    constants = offset[:, :, :1, :1]
    torch.testing.assert_close(offset, constants.expand_as(offset), rtol=0, atol=1e-5)
    assert len({round(value, 4) for value in constants.flatten().tolist()}) == 8
    many = with_offset(torch.zeros(500, 4, 1, 1), 1.0, list(range(500)))
    assert many.mean().item() == pytest.approx(0, abs=0.1) and many.std().item() == pytest.approx(1, abs=0.1)


def test_offset_noise_is_a_function_of_the_samples_seed():
    zeros = torch.zeros(2, 4, 8, 8)
    first, swapped = with_offset(zeros, 0.1, [1, 2]), with_offset(zeros, 0.1, torch.tensor([2, 1]))
    assert torch.equal(first, swapped.flip(0)) and not torch.equal(first[0], first[1])
    assert with_offset(zeros, 0.0, [1, 2]) is zeros
    torch.manual_seed(0)
    drawn = with_offset(zeros, 0.1, None)
    torch.manual_seed(0)
    assert torch.equal(drawn, (0.1 * torch.randn(2, 4, 1, 1)).expand_as(zeros))


def test_offset_noise_leaves_the_other_draws_alone():
    half, shape = batch(1, 2), (4, 8, 8)
    plain, offset = (build(offset_noise=strength)._draw(half, shape) for strength in (0.0, 0.1))
    assert torch.equal(plain[0], offset[0]) and torch.equal(plain[1], offset[1])
    assert torch.equal(offset[2], with_offset(plain[2], 0.1, [1, 2]))
    half.pop("noise_seed")
    torch.manual_seed(0)
    state = [build()._draw(half, shape), torch.randn(1)]
    torch.manual_seed(0)
    assert same(state, [build(offset_noise=0.0)._draw(half, shape), torch.randn(1)])


def test_offset_noise_is_noised_with_and_predicted():
    model = build(offset_noise=0.3)
    plain = build()
    assert step(model, batch(1))[0] != step(plain, batch(1))[0]
    eps, t, noise = plain._draw(batch(1), (4, 8, 8))
    x_start = plain.get_first_stage_encoding(plain._posterior([batch(1)]), eps)
    cond = plain.get_learned_conditioning(batch(1)["caption"])
    expected, _ = plain.p_losses(x_start, cond, t, with_offset(noise, 0.3, [1]))
    torch.testing.assert_close(step(model, batch(1))[0], expected, rtol=1e-6, atol=0)


def test_a_run_with_offset_noise_resumes_exactly(workspace):
    _, run = assert_resumes_exactly(workspace, "offset", "model.params.offset_noise=0.1")
    assert checkpoint(run)["config"]["model"]["params"]["offset_noise"] == 0.1


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_offset_noise_out_of_range(wrong):
    with pytest.raises(UserError, match="offset_noise: expected 0 or more"):
        build(offset_noise=wrong)


# Zero terminal SNR


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
    torch.testing.assert_close(scaled, (root - root[-1]) * root[0] / (root[0] - root[-1]), rtol=1e-4, atol=1e-6)
    for name, value in vars(terminal).items():
        assert value.isfinite().all(), name
    assert ((terminal.betas > 0) & (terminal.betas <= 1)).all() and (terminal.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("beta_schedule", ["linear", "sqrt_linear", "cosine"])
def test_rescaling_twice_changes_nothing(beta_schedule):
    once = with_zero_terminal_snr(NoiseSchedule.create(100, beta_schedule).betas.double().numpy())
    torch.testing.assert_close(torch.tensor(with_zero_terminal_snr(once)), torch.tensor(once), rtol=1e-9, atol=1e-12)


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
    torch.testing.assert_close(log_variance[2].exp().flatten(), 1 - terminal.alphas_cumprod[998:999])


def test_weights_are_finite_where_no_signal_is_left(terminal):
    v, t = PARAMETERIZATIONS["v"], torch.arange(1000)
    weights = v.min_snr_weight(terminal, t, 5.0)
    assert weights.isfinite().all() and weights[999] == 0 and (weights[:999] > 0).all()
    assert v.vlb_weights(terminal).tolist() == [1.0] * 1000
    model = build(parameterization="v", zero_terminal_snr=True, min_snr_gamma=5.0, original_elbo_weight=0.5)
    losses = model._losses(torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([999, 3]), noise_of_latents())
    assert all(value.isfinite().all() for value in losses.values()) and losses["loss_simple"].min() > 0


def noise_of_latents():
    return torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_zero_terminal_snr_needs_v(parameterization):
    with pytest.raises(UserError, match=f"zero_terminal_snr: needs parameterization: v, got {parameterization}: "):
        build(parameterization=parameterization, zero_terminal_snr=True)


def test_zero_terminal_snr_needs_two_steps():
    with pytest.raises(UserError, match="zero_terminal_snr: needs 2 timesteps"):
        NoiseSchedule.create(1, zero_terminal_snr=True)


@pytest.mark.parametrize("total", [2, 7, 1000])
def test_trailing_time_steps_end_with_the_last(total):
    for steps in range(1, total + 1):
        t = trailing_timesteps(steps, total)
        assert len(t) == steps and t.dtype == torch.int64
        assert t[0] >= 0 and (t.diff() > 0).all() and t[-1] == total - 1
    with pytest.raises(UserError, match=f"between 1 and {total}, got {total + 1}"):
        trailing_timesteps(total + 1, total)


def test_ten_trailing_time_steps_are_those_of_the_paper():
    assert trailing_timesteps(10, 1000).tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]


def rescaled(name, std=0.0):
    """A sampler's `fake` model of v with zero terminal SNR."""
    model = fake(name, "v", std)
    model.schedule = NoiseSchedule.of_betas(with_zero_terminal_snr(model.schedule.betas.double().numpy()))
    return model


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0)])
def test_sampling_starts_at_the_last_step_and_finds_the_point_that_all_data_are(name, eta):
    model, cond = rescaled(name), means(1.5, -0.5)
    steps = count(name, 10)
    out, intermediates = SAMPLERS[name](model).sample(steps, 2, SHAPE, cond, x_T=noise_of(), eta=eta, verbose=False)
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
    out, _ = SAMPLERS[name](model).sample(steps, 400, SHAPE, cond, eta=eta, x_T=torch.randn(400, *SHAPE), verbose=False)
    # No signal of the data is in x_T: their mean comes from the model alone.
    assert out.mean().item() == pytest.approx(2.0, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, rel=0.1 if name == "ddpm" else 0.05)  # which visits 40 steps here


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 1000])
def test_plms_from_noise_alone_with_any_count(steps):
    model = rescaled("plms", std=0.5)
    out, _ = SAMPLERS["plms"](model).sample(steps, 2, SHAPE, means(1.0, 2.0), x_T=noise_of(), verbose=False)
    assert out.isfinite().all() and model.steps[0] == 999


def test_other_schedules_are_sampled_as_before():
    sampler = SAMPLERS["ddim"](Gaussian("v"))
    sampler.make_schedule(10)
    assert sampler.ddim_timesteps.tolist() == list(range(1, 1000, 100))


def test_a_base_models_schedule_is_rescaled_and_a_rescaled_one_kept():
    base, model = (build(parameterization="v", zero_terminal_snr=on, **SCHEDULE) for on in (False, True))
    model.load_state_dict(base.state_dict())
    expected = NoiseSchedule.create(1000, "linear", 0.00085, 0.012, zero_terminal_snr=True)
    for name in NoiseSchedule.names():
        torch.testing.assert_close(getattr(model, name), getattr(expected, name), rtol=1e-3, atol=1e-5)
    assert model.schedule.ends_in_noise and not base.schedule.ends_in_noise
    again = build(parameterization="v", zero_terminal_snr=True, **SCHEDULE)
    again.load_state_dict(model.state_dict())
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    # Without the key the checkpoint's own schedule stays, too.
    base.load_state_dict(model.state_dict())
    assert torch.equal(base.alphas_cumprod, model.alphas_cumprod)


def test_a_run_with_zero_terminal_snr_from_a_base_model(workspace, tmp_path):
    torch.save({"state_dict": golden.latent_diffusion().state_dict()}, base := tmp_path / "base.ckpt")
    more = ["--actual_resume", str(base), "model.params.parameterization=v", "model.params.zero_terminal_snr=true"]
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
    ours = NoiseSchedule.create(1000, "linear", 0.00085, 0.012, zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(theirs.alphas_cumprod, ours, rtol=1e-3, atol=1e-6)
    assert "rescale_betas_zero_snr" not in plain


def test_a_pipeline_with_zero_terminal_snr_needs_a_config(tmp_path):
    configs = {"unet/config": "{}", "scheduler/scheduler_config": '{"rescale_betas_zero_snr": true}'}
    for part, content in configs.items():
        (tmp_path / part).parent.mkdir()
        (tmp_path / f"{part}.json").write_text(content)
    with pytest.raises(UserError, match=r"has zero terminal SNR: give a --config with .*zero_terminal_snr: true"):
        config_of_pipeline(tmp_path)


# Learning rate over time


def test_a_cosine_decay():
    factor = WarmupDecay(steps=100, warmup_steps=4, decay=0.5, final=0.2, shape="cosine")
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(30) == factor(50) == 1
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2 for done in (0.1, 0.5, 0.9)]
    assert [factor(step) for step in (55, 75, 95)] == pytest.approx(expected)
    assert factor(100) == factor(1000) == pytest.approx(0.2)


def test_a_constant_rate_after_its_warm_up():
    factor = WarmupDecay(steps=100, warmup_steps=1, decay=0)
    assert [factor(step) for step in (0, 1, 50, 99, 100, 1000)] == [0.5, 1, 1, 1, 1, 1]


def test_an_unknown_shape():
    with pytest.raises(UserError, match=r"shape: unknown 'cosinus' \(did you mean 'cosine'\?\); accepted: linear, cos"):
        WarmupDecay(steps=2, shape="cosinus")


def test_a_run_with_a_cosine_decay_resumes_exactly(workspace):
    schedule = (
        "model.params.scheduler_config={target: ldm.optim.schedules.WarmupDecay, params: {steps: 4, shape: cosine}}",
    )
    assert_resumes_exactly(workspace, "cosine", *schedule)
    rates = [float(row["lr-AdamW"]) for row in csv_rows(workspace.run("cosine-parts")) if row.get("lr-AdamW")]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


# The text encoder's own rate and end


def groups_of(model):
    """Name, rate and number of parameters of a model's optimizer's groups."""
    model.learning_rate = 1e-3
    groups = model.configure_optimizers().param_groups
    return [(group.get("name"), group["lr"], len(group["params"])) for group in groups]


def test_one_group_by_default_and_two_with_a_rate_for_the_text_encoder():
    plain, split = build(), build(text_encoder_lr=5e-7)
    unet, text = (len(list(part.parameters())) for part in (plain.model, plain.cond_stage_model))
    assert groups_of(plain) == [(None, 1e-3, unet + text)]
    assert groups_of(build(text_encoder_stop=3)) == groups_of(plain)
    assert groups_of(split) == [("unet", 1e-3, unet), ("text_encoder", 5e-7, text)]


def test_muon_has_the_groups_of_its_two_kinds():
    plain, split = (groups_of(build(optimizer="muon", text_encoder_lr=lr)) for lr in (None, 5e-7))
    assert [name for name, _, _ in plain] == [None, None]
    rates = {name: lr for name, lr, _ in split}
    assert rates == {"unet-adam": 1e-3, "unet-muon": 1e-3, "text_encoder-adam": 5e-7, "text_encoder-muon": 5e-7}
    assert sum(n for _, _, n in split) == sum(n for _, _, n in plain)


SPLIT = ("model.params.text_encoder_lr=1e-4", "model.params.text_encoder_stop=2")


def parts_that_moved(first, last):
    return {key.split(".")[0] for key in first if not torch.equal(first[key], last[key])}


@pytest.fixture(scope="module")
def stopped(workspace):
    """A run of four steps, of which the text encoder takes two."""
    return workspace.train("stopped", *SPLIT)


def test_the_text_encoder_stops_exactly(stopped):
    second, last = (checkpoint(stopped, name) for name in ("epoch=000000-step=000000002.ckpt", "last.ckpt"))
    assert parts_that_moved(second["state_dict"], last["state_dict"]) == {"model"}  # AdamW would decay its weights
    unet, text = last["optimizer_states"][0]["param_groups"]
    assert (unet["name"], unet["lr"], text["name"], text["lr"]) == ("unet", 1e-3, "text_encoder", 1e-4)
    states = last["optimizer_states"][0]["state"]
    assert {int(states[index]["step"]) for index in text["params"]} == {2}
    assert {int(states[index]["step"]) for index in unet["params"]} == {4}
    rates = [row for row in csv_rows(stopped) if row.get("lr-AdamW/unet")]
    assert {(float(row["lr-AdamW/unet"]), float(row["lr-AdamW/text_encoder"])) for row in rates} == {(1e-3, 1e-4)}


def test_until_its_stop_the_text_encoder_is_trained(stopped, workspace):
    run = workspace.train("not-stopped", SPLIT[0], "--max_steps", "2")
    first, second = (checkpoint(r, "epoch=000000-step=000000002.ckpt")["state_dict"] for r in (run, stopped))
    assert same(first, second)
    assert "cond_stage_model" in parts_that_moved(golden.latent_diffusion().state_dict(), second)


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_resumes_exactly_before_and_after_the_stop(workspace, stopped, at):
    parts = workspace.train(f"stopped-at-{at}", "--max_steps", str(at), *SPLIT)
    workspace.resume(parts, "--max_steps", "4")
    for key in ("state_dict", "optimizer_states"):
        assert same(checkpoint(parts)[key], checkpoint(stopped)[key]), key


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_after_the_stop_no_gradient_is_computed_for_the_text_encoder(monkeypatch):
    model = build(text_encoder_stop=1)
    model.learning_rate = 1e-6
    with_gradient = []

    def note(self, optimizer):
        of_parts = [[p.grad is not None for p in part.parameters()] for part in (self.model, self.cond_stage_model)]
        with_gradient.append([sum(found) / len(found) for found in of_parts])

    monkeypatch.setattr(LatentDiffusion, "on_before_optimizer_step", note)
    small_trainer(max_steps=2).fit(model, loader(batch(1), batch(2)))
    assert not model.text_trains and not model.train().cond_stage_model.training
    assert not any(parameter.requires_grad for parameter in model.cond_stage_model.parameters())
    assert with_gradient == [[1, 1], [1, 0]]
    assert not model.get_learned_conditioning(["a dog"]).requires_grad


def test_the_text_encoders_rate_is_scaled_as_well(workspace, caplog):
    run = workspace.train(
        "scaled", "--scale_lr", "--accumulate_grad_batches", "3", "data.params.batch_size=2", "--max_steps", "1", *SPLIT
    )
    (state,) = checkpoint(run)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [1e-3 * 3 * 1 * 2, 1e-4 * 3 * 1 * 2]
    assert "learning rate 0.006, text encoder at 0.0006 until step 2" in caplog.text


@pytest.mark.parametrize("wrong, message", [
    ({"text_encoder_lr": 0.0}, "text_encoder_lr: expected a positive number, got 0.0"),
    ({"text_encoder_stop": -1}, "text_encoder_stop: expected a positive number, got -1"),
    ({"text_encoder_lr": math.nan}, "text_encoder_lr: expected a positive number, got nan"),
    ({"text_encoder_lr": 1e-6, "cond_stage_trainable": False}, "text_encoder_lr: needs cond_stage_trainable: true"),
    ({"text_encoder_stop": 5, "cond_stage_trainable": False}, "text_encoder_stop: needs cond_stage_trainable: true"),
])  # fmt: skip
def test_rates_and_stops_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)


def test_processes_that_wait_for_all_gradients_cannot_stop_the_text_encoder():
    with pytest.raises(UserError, match="needs --strategy ddp_find_unused_parameters_true"):
        check_strategy(DDPStrategy())
    check_strategy(DDPStrategy(find_unused_parameters=True))


# Freezing

INPUT = "model.diffusion_model.input_blocks.*"


def test_frozen_patterns_are_left_out_of_the_training():
    plain, model = (build(use_ema=True, freeze=patterns) for patterns in (None, [INPUT, "*.token_embedding.weight"]))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and "first_stage" not in name}
    fits = [n for n, _ in plain.named_parameters() if n.startswith(INPUT[:-1]) or n.endswith(".token_embedding.weight")]
    assert frozen == set(fits) and len(fits) > 10
    step(model, batch(1))[0].backward()
    optimised = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        trained = name not in frozen and not name.startswith("first_stage_model")
        assert (id(parameter) in optimised) == (parameter.grad is not None) == trained, name
    averages = {key for key in plain.state_dict() if key.startswith("model_ema.")} - set(model.state_dict())
    assert averages == {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in fits if name.startswith("model.")
    }


def test_a_run_with_frozen_parameters(workspace, caplog):
    more = (f"model.params.freeze=['{INPUT}']", "model.params.use_ema=true")
    straight, _ = assert_resumes_exactly(workspace, "frozen", *more)
    first, last = (checkpoint(straight, n)["state_dict"] for n in ("epoch=000000-step=000000002.ckpt", "last.ckpt"))
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert any(key.startswith("model.") for key in moved) and not any(key.startswith(INPUT[:-1]) for key in moved)
    assert "frozen: UNet 0." in caplog.text
    model = load_model(straight / "checkpoints/last.ckpt")
    for name, parameter in model.model.named_parameters():
        average = last.get(f"model_ema.{name.replace('.', '')}", last[f"model.{name}"])
        assert torch.equal(parameter, average), name


@pytest.mark.parametrize("patterns, message", [
    (["model.difusion_model.out.2.wieght"], r"fits no trained parameter \(did you mean 'model\.diffusion_model\.out"),
    ([INPUT, "nothing.*"], r"'nothing\.\*' fits no trained parameter$"),
    (["first_stage_model.*"], "fits only parameters that are not trained anyway"),
    (["*"], "nothing is left to train"),
    (INPUT, r"expected a list of patterns, got 'model"),
])  # fmt: skip
def test_patterns_that_make_no_sense(patterns, message):
    with pytest.raises(UserError, match=message):
        build(freeze=patterns)


@pytest.fixture
def lora():
    """The golden model with adapters, but those that the patterns fit."""
    pytest.importorskip("peft")

    def made(*patterns):
        model = build(lora={"rank": 2}, freeze=patterns)
        model.configure_model()
        return model

    return made


def test_adapters_are_frozen_by_the_names_of_their_weights(lora):
    plain, model = lora(), lora(INPUT, "*.to_q.weight")
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {name for name in trained if not name.startswith(INPUT[:-1]) and ".to_q." not in name}
    assert {name.partition(".")[0] for name in kept} == {"model", "cond_stage_model"}
    with pytest.raises(UserError, match="fits only parameters that are not trained anyway"):
        lora("model.diffusion_model.out.2.weight")  # which gets no adapter


def test_a_run_cannot_go_on_with_other_parameters(workspace, caplog):
    run = workspace.train("one-group", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "2", SPLIT[0]]) == 1
    assert "model.params.text_encoder_lr: None in the run, now " in caplog.text
    run = workspace.train("all-parameters", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "2", f"model.params.freeze=['{INPUT}']"]) == 1
    assert f"model.params.freeze: None in the run, now ['{INPUT}']" in caplog.text


def test_a_stop_can_be_added_to_a_run(workspace):
    run = workspace.train("stop-added", "--max_steps", "2")
    workspace.resume(run, "--max_steps", "4", "model.params.text_encoder_stop=2")
    second, last = (checkpoint(run, name)["state_dict"] for name in ("epoch=000000-step=000000002.ckpt", "last.ckpt"))
    assert parts_that_moved(second, last) == {"model"}


@pytest.mark.parametrize("trained, given, same_set", [
    (["a.*"], ["a.*"], True), (["a.*"], ["b.*"], False), ([], ["b.*"], False),
])  # fmt: skip
def test_other_patterns_of_as_many_parameters_are_noticed(trained, given, same_set):
    saved = {
        "optimizer_states": [{"param_groups": [{"params": [0, 1]}]}],
        "config": {"model": {"params": {"freeze": trained, "timesteps": 10}}},
    }
    if same_set:
        return check_same_parameters(saved, [None], 2, given)
    with pytest.raises(UserError, match="have to stay as they were"):
        check_same_parameters(saved, [None], 2, given)


# Masks


def masked(root, shape=(20, 30), count=2, masks=(0,), suffix=".png"):
    """Photos of noise, of which some have a mask; photo and mask have the same values, which are large to the right."""
    random = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        values = np.linspace(0, 255, shape[1])[None] * random.uniform(0.9, 1, shape)
        Image.fromarray(values.astype(np.uint8)).convert("RGB").save(root / f"{i:02}.png")
        if i in masks:
            Image.fromarray(values.astype(np.uint8)).save(root / f"{i:02}.mask{suffix}")
    return root


def photos(root, **params):
    return PersonalizedBase(root, **{"size": 16, "interpolation": "bilinear", "masks": True, **params})


def test_a_mask_is_never_a_photo(tmp_path):
    root = masked(tmp_path, suffix=".PNG")
    (root / "00.mask.PNG").rename(root / "00.Mask.PNG")
    for found in (list_images(root), find_images(root), photos(root).paths, photos(root, masks=False).paths):
        assert [path.name for path in found] == ["00.png", "01.png"]
    assert "mask" not in photos(root, masks=False)[0]


@pytest.mark.parametrize("params", [{}, {"resize": "center_crop"}, {"resize": "random_crop"}, {"size": None}])
def test_a_mask_goes_through_what_its_photo_does(tmp_path, params):
    dataset = photos(masked(tmp_path), **params)
    plain = photos(tmp_path, masks=False, **params)
    sides = set()
    for seed in range(12):
        item = dataset.example(0, torch.Generator().manual_seed(seed))
        # The photo has the mask's values: all that happens to one has to happen to the other.
        np.testing.assert_allclose(item["mask"], (item["image"][..., 0] + 1) / 2, atol=2 / 255)
        assert item["mask"].dtype == np.float32 and 0 <= item["mask"].min() < item["mask"].max() <= 1
        same_draws = plain.example(0, torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(item["image"], same_draws["image"])
        sides.add(bool(item["mask"][:, 0].mean() < item["mask"][:, -1].mean()))
    assert sides == {True, False}


def test_variants_are_what_is_drawn(tmp_path):
    dataset = photos(masked(tmp_path), flip_p=1.0)
    path = dataset.paths[0]
    drawn, variant = dataset.augmented(path), dict(dataset.variants())[path, True]
    dataset.flip_p = 0.0
    other = dict(dataset.variants())[path, False]
    for key in ("image", "mask"):
        np.testing.assert_array_equal(drawn[key], variant[key])
        np.testing.assert_array_equal(other[key], variant[key][:, ::-1])


def test_a_mask_stays_with_its_latent(tmp_path):
    run = runs.Workspace(tmp_path)
    run.photos = masked(tmp_path / "photos-masked", masks=(0, 1))
    masks = ("data.params.train.params.masks=true", "--max_steps", "3", "model.base_learning_rate=1e-4")
    without, cached = (run.train(name, *masks, f"data.params.latent_cache={name}") for name in ("false", "true"))
    plain = run.train("plain", *masks[1:])
    found = [[float(row["train/loss"]) for row in metrics(folder)] for folder in (without, cached, plain)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] != pytest.approx(found[0], rel=1e-3)


def test_without_a_mask_all_of_a_photo_counts(tmp_path):
    dataset = photos(masked(tmp_path))
    assert dataset[0]["mask"].min() < 0.5 and (dataset[1]["mask"] == 1).all()


def test_a_cut_out_as_a_mask(tmp_path):
    """Transparency counts nothing, whatever its colour; deeper greys keep their share."""
    root = masked(tmp_path, shape=(2, 3), count=1, masks=())
    pixels = np.full((2, 3, 4), 255, np.uint8)
    pixels[:, 0, 3] = 0
    Image.fromarray(pixels).save(root / "00.mask.png")
    assert photos(root, size=None, flip_p=0)[0]["mask"].tolist() == [[0, 1, 1]] * 2
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]] * 2, np.uint16)).save(root / "00.mask.png")
    np.testing.assert_allclose(photos(root, size=None, flip_p=0)[0]["mask"], [[0, 128 / 255, 1]] * 2)


def test_masks_that_cannot_be_used(tmp_path):
    root = masked(tmp_path, masks=())
    with pytest.raises(UserError, match=r"masks: true, but no mask in it; that of 01\.jpg is 01\.mask\.png beside it"):
        photos(root)
    wide = np.zeros((20, 30), np.uint8)
    Image.fromarray(wide[:, :20]).save(root / "00.mask.png")
    with pytest.raises(UserError, match=r"00\.mask\.png: is 20x20, its image 00\.png 30x20 pixels"):
        photos(root).check()
    Image.fromarray(wide).save(root / "00.mask.png")
    for how in ("squash", "random_crop"):
        with pytest.raises(UserError, match=r"00\.mask\.png: this mask is all black; paint white what counts"):
            photos(root, resize=how).check()
    wide[:, :3] = 255  # which the central square does not have
    Image.fromarray(wide).save(root / "00.mask.png")
    photos(root).check()
    with pytest.raises(UserError, match=r"00\.mask\.png: this mask is all black after cropping"):
        photos(root, resize="center_crop").check()
    Image.fromarray(wide).save(root / "00.mask.webp")
    with pytest.raises(UserError, match=r"00\.mask\.webp: 00\.png has another mask, 00\.mask\.png: remove one"):
        photos(root)
    (root / "00.mask.webp").rename(root / "7.mask.webp")
    with pytest.raises(UserError, match=r"7\.mask\.webp: a mask without its image"):
        photos(root)
    (root / "7.mask.webp").unlink()
    (root / "00.mask.png").write_text("no image")
    with pytest.raises(UserError, match=r"00\.mask\.png: cannot read this image"):
        photos(root).check()


def test_masks_and_cached_latents_do_not_mix(tmp_path):
    config = {
        "target": "ldm.data.personalized.PersonalizedBase",
        "params": {"data_root": str(masked(tmp_path)), "masks": True},
    }
    with pytest.raises(UserError, match="masks are not cached with latents"):
        CachedLatents(tmp_path / "cache.safetensors", config)


def test_a_weighted_mean_of_the_error():
    output = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).reshape(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    weights = torch.tensor([[1.0, 0.0], [0.5, 1.5]]).reshape(2, 1, 2)
    assert per_sample_loss(output, target, weights=weights).tolist() == [1.0, (0.5 * 4 + 1.5 * 16) / 2]
    assert per_sample_loss(output, target, "l1", weights=torch.zeros(2, 1, 2)).tolist() == [0.0, 0.0]
    random = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(per_sample_loss(*random, weights=torch.ones(3, 8, 8)), per_sample_loss(*random))
    # Normalised: what is outside the mask changes nothing, and half as much area does not halve the loss.
    half = torch.cat([torch.ones(3, 8, 4), torch.zeros(3, 8, 4)], dim=2)
    inside = per_sample_loss(*random[..., :4])
    torch.testing.assert_close(per_sample_loss(*random, weights=half), inside)


def test_weights_of_places():
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :6] = 1  # of every third place of 2 pixels all, of none a part
    mask[:, 0, 6] = 1
    latents = [torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8)]
    assert place_weights([None, None], latents) is None
    weights = place_weights([mask, None], latents)
    assert weights.shape == (3, 8, 8) and (weights[1:] == 1).all()
    assert weights[0, 0].tolist() == [1, 1, 1, 0.25, 0, 0, 0, 0] and weights[0, 1].tolist() == [1] * 3 + [0] * 5
    floored = place_weights([mask, None], latents, 0.2)
    assert (floored[1:] == 1).all() and floored[0].min().item() == pytest.approx(0.2)
    assert floored[0, 0, 3].item() == pytest.approx(0.2 + 0.8 * 0.25)
    small = torch.rand(1, 8, 8)
    assert torch.equal(place_weights([small], latents[:1]), small)  # of the latents' size already


@torch.no_grad()
def test_only_the_masked_part_of_the_subject_counts(golden_model):
    subject, prior = batch(1), batch(11, caption="photo of a dog")
    mask = torch.ones(1, SIZE, SIZE)
    loss, logged = step(golden_model, subject, prior)
    white, _ = step(golden_model, subject | {"mask": mask}, prior)
    assert torch.equal(loss, white)
    half = mask.clone()
    half[:, :, SIZE // 2 :] = 0
    changed, changed_logged = step(golden_model, subject | {"mask": half}, prior)
    assert changed != loss and torch.equal(changed_logged["train/loss_prior"], logged["train/loss_prior"])
    _, other_logged = step(golden_model, subject, prior | {"mask": half})
    assert other_logged["train/loss_prior"] != logged["train/loss_prior"]
    assert torch.equal(other_logged["train/loss"], logged["train/loss"])
    both = [step(golden_model, subject | {"mask": m})[0] for m in (half, 1 - half)]
    torch.testing.assert_close(sum(both) / 2, logged["train/loss"])  # of two halves of one size


@torch.no_grad()
def test_the_floor_of_the_mask(golden_model, monkeypatch):
    half = torch.ones(1, SIZE, SIZE)
    half[:, :, SIZE // 2 :] = 0
    losses = []
    for floor in (0.0, 0.5, 1.0):
        monkeypatch.setattr(golden_model, "unmasked_weight", floor)
        losses.append(step(golden_model, batch(1) | {"mask": half})[0].item())
    black = step(build(), batch(1) | {"mask": 1 - half})[0].item()
    assert losses[2] == pytest.approx(step(golden_model, batch(1))[0].item(), rel=1e-6)
    assert losses[1] == pytest.approx((losses[0] + 0.5 * black) / 1.5, rel=1e-5)
    with pytest.raises(UserError, match=r"unmasked_weight: expected a share from 0 to 1, got 1\.5"):
        build(unmasked_weight=1.5)


def test_a_masked_run_resumes_exactly(tmp_path):
    workspace = Workspace(tmp_path)
    for number, photo in enumerate(sorted(workspace.photos.iterdir())[:2]):
        mask = np.zeros((40, 50), np.uint8)
        mask[:, : 20 + 10 * number] = 255
        Image.fromarray(mask).save(photo.with_suffix(".mask.png"))
    more = ("data.params.train.params.masks=true", "model.params.unmasked_weight=0.1")
    masked_run, _ = assert_resumes_exactly(workspace, "masked", *more)
    plain = workspace.train("plain", "--max_steps", "1")
    (row, *_), (other,) = metrics(masked_run), metrics(plain)
    assert row["train/loss_prior"] == other["train/loss_prior"]
