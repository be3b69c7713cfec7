"""The schedule, the objective and `LatentDiffusion`, against identities that hold whatever the weights."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import DiffusionWrapper
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.schedule import NoiseSchedule, make_betas
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.losses.diffusion import PriorPreservation, per_sample_loss, split_like
from ldm.rng import SampleRandom
from tests.support import golden
from tests.support.golden import rel

SIZE = 16  # of images, the side
UNET = golden.CONFIG["unet_config"]["params"]
every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


def build(unet=None, text=None, **overrides):
    """The golden files' model with other parameters."""
    config = {
        **golden.CONFIG,
        "unet_config": {"target": golden.CONFIG["unet_config"]["target"], "params": {**UNET, **(unet or {})}},
        "cond_stage_config": {
            "target": golden.CONFIG["cond_stage_config"]["target"],
            "params": {"text_config": golden.TEXT_CONFIG, **(text or {})},
        },
        **overrides,
    }
    model = LatentDiffusion(**config)
    golden.load_golden_weights(model)
    return model.train()


def batch(*seeds, caption="photo of a sks dog"):
    """Images, captions and noise seeds that are a function of each sample's seed."""
    images = SampleRandom(seeds).randn((len(seeds), SIZE, SIZE, 3)).clamp(-2, 2) / 2
    return {"image": images, "caption": [f"{caption} {seed}" for seed in seeds], "noise_seed": list(seeds)}


def step(model, *halves):
    """The loss and the log of one training step."""
    return model.shared_step(halves if len(halves) > 1 else halves[0], "train")


# Schedule


def test_the_posterior_is_bayes_rule():
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    x0, x_t = torch.tensor(0.7), torch.tensor(-1.3)
    t = torch.arange(1, 1000)
    mean, log_variance = schedule.q_posterior(x0.expand(999, 1, 1, 1), x_t.expand(999, 1, 1, 1), t)
    beta = schedule.betas[1:].double()
    acp_prev = torch.cumprod(1 - schedule.betas.double(), 0)[:-1]
    # N(x_{t-1}; sqrt(acp_prev) x_0, 1 - acp_prev) times N(x_t; sqrt(1 - beta) x_{t-1}, beta)
    precision = 1 / (1 - acp_prev) + (1 - beta) / beta
    expected = (acp_prev.sqrt() * x0 / (1 - acp_prev) + (1 - beta).sqrt() * x_t / beta) / precision
    torch.testing.assert_close(mean.flatten().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance.flatten().double(), -precision.log(), rtol=1e-4, atol=1e-4)


def test_the_posterior_of_the_first_step_is_the_clean_latent():
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    x0, x_t = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    mean, log_variance = schedule.q_posterior(x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x0, rtol=1e-5, atol=1e-6)
    assert log_variance.isfinite().all() and log_variance.max() < -40


@pytest.mark.parametrize("beta_schedule", ["linear", "sqrt_linear", "cosine"])
def test_every_schedule_goes_from_signal_to_noise(beta_schedule):
    schedule = NoiseSchedule.create(1000, beta_schedule)
    acp = schedule.alphas_cumprod.double()
    assert len(schedule) == 1000 and set(NoiseSchedule.names()) == set(vars(schedule))
    assert (acp.diff() < 0).all() and acp[0] > 0.99 and acp[-1] < 0.01
    torch.testing.assert_close(acp, torch.cumprod(1 - schedule.betas.double(), 0), rtol=1e-4, atol=1e-9)
    for name, value in vars(schedule).items():
        assert value.dtype == torch.float32 and value.shape == (1000,) and value.isfinite().all(), name


def test_the_shapes_of_the_schedules():
    assert make_betas("sqrt_linear", 5, 0.1, 0.5, 0.0).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (make_betas("linear", 5, 0.04, 0.36, 0.0) ** 0.5).tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    betas = make_betas("cosine", 100, 1e-4, 2e-2, 0.008)
    assert betas.max() == 0.999  # clipped at the end, where the formula gives 1
    wanted = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    np.testing.assert_allclose(np.cumprod(1 - betas)[:99], np.array(wanted[1:]) / wanted[0], rtol=1e-9)


@pytest.mark.parametrize("wrong", [
    {"linear_start": 0.0}, {"linear_start": -0.1}, {"linear_end": 1.0}, {"linear_end": 1.5}, {"linear_end": math.nan},
    {"timesteps": 0}, {"timesteps": -5}, {"beta_schedule": "sqrt_linear", "linear_end": 1.0},
])  # fmt: skip
def test_betas_out_of_range(wrong):
    with pytest.raises(UserError, match=r"timesteps: .* linear_start .* linear_end .*outside"):
        NoiseSchedule.create(**{"timesteps": 100, **wrong})


def test_unknown_schedule():
    with pytest.raises(UserError, match="beta_schedule: unknown 'cosinus'; accepted: linear, sqrt_linear, cosine"):
        NoiseSchedule.create(beta_schedule="cosinus")


@every_parameterization
def test_an_exact_output_gives_back_noise_and_clean_latent(parameterization):
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    t = torch.tensor([0, 10, 500, 999])
    x_start, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.manual_seed(0))
    x_t = schedule.q_sample(x_start, t, noise)
    p = PARAMETERIZATIONS[parameterization]
    output = p.target(schedule, x_start, t, noise)
    torch.testing.assert_close(p.to_noise(schedule, x_t, t, output), noise, rtol=0, atol=5e-5)
    torch.testing.assert_close(p.to_start(schedule, x_t, t, output), x_start, rtol=0, atol=5e-5)


def test_targets_are_what_their_names_say():
    schedule = NoiseSchedule.create()
    t = torch.tensor([300])
    x_start, noise = torch.randn(2, 1, 4, 8, 8)
    targets = {name: p.target(schedule, x_start, t, noise) for name, p in PARAMETERIZATIONS.items()}
    assert torch.equal(targets["eps"], noise) and torch.equal(targets["x0"], x_start)
    acp = schedule.alphas_cumprod[300]
    torch.testing.assert_close(targets["v"], acp.sqrt() * noise - (1 - acp).sqrt() * x_start)


def test_the_bounds_of_eps_and_x0_are_one_bound():
    schedule = NoiseSchedule.create()
    acp = schedule.alphas_cumprod.double()
    eps, x0 = (PARAMETERIZATIONS[name].vlb_weights(schedule).double() for name in ("eps", "x0"))
    # An error of the noise is one of the clean latent times the root of the signal-to-noise ratio.
    torch.testing.assert_close(eps[1:], x0[1:] * (1 - acp[1:]) / acp[1:], rtol=2e-3, atol=0)
    assert eps.isfinite().all() and (eps > 0).all()


def test_vlb_weights_of_v_are_one():
    assert PARAMETERIZATIONS["v"].vlb_weights(NoiseSchedule.create(50)).tolist() == [1.0] * 50


# Losses


def test_per_sample_loss():
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    assert per_sample_loss(output, target).tolist() == [5.0, 0.0]
    assert per_sample_loss(output, target, "l1").tolist() == [2.0, 0.0]
    assert per_sample_loss(output.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_unknown_loss():
    with pytest.raises(UserError, match="loss_type: unknown 'huber'; accepted: l1, l2"):
        per_sample_loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), "huber")


def test_prior_preservation():
    subject, prior = torch.tensor(2.0), torch.tensor(3.0)
    assert PriorPreservation(0.5).combine([subject, prior]).item() == 3.5
    assert PriorPreservation(0.5).combine([subject]).item() == 2.0
    first, second = {"image": 1}, {"image": 2}
    assert PriorPreservation.halves(first) == [first]
    assert PriorPreservation.halves((first, second)) == PriorPreservation.halves([first, second]) == [first, second]
    assert [part.tolist() for part in split_like(torch.arange(5), ["ab", "cde"])] == [[0, 1], [2, 3, 4]]


# The training objective


@pytest.mark.parametrize("reg_weight", [1.0, 0.3, 0.0])
@torch.no_grad()
def test_one_pass_over_both_halves_equals_two(golden_model, monkeypatch, reg_weight):
    monkeypatch.setattr(golden_model, "objective", PriorPreservation(reg_weight))
    subject, prior = batch(1, 2), batch(11, 12, 13, caption="photo of a dog")
    loss, logged = step(golden_model, subject, prior)
    alone, logged_alone = step(golden_model, subject)
    alone_prior, _ = step(golden_model, prior)
    torch.testing.assert_close(loss, alone + reg_weight * alone_prior, rtol=1e-5, atol=0)
    torch.testing.assert_close(logged["train/loss_total"], loss)
    torch.testing.assert_close(logged["train/loss_prior"], alone_prior, rtol=1e-5, atol=0)
    for name in ("loss", "loss_simple", "loss_vlb"):  # of the subject, as the reference logs them
        torch.testing.assert_close(logged[f"train/{name}"], logged_alone[f"train/{name}"], rtol=1e-5, atol=0)
    assert set(logged_alone) == set(logged) - {"train/loss_prior"}
    assert not alone.isclose(alone_prior, rtol=1e-3)


@torch.no_grad()
def test_a_sample_has_its_noise_whatever_its_neighbours(golden_model):
    first, second, both, swapped = (step(golden_model, batch(*seeds))[0] for seeds in ([1], [2], [1, 2], [2, 1]))
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(swapped, both, rtol=1e-5, atol=0)
    assert not first.isclose(second, rtol=1e-3)
    assert torch.equal(first, step(golden_model, batch(1))[0])


@torch.no_grad()
def test_the_noise_changes_with_its_seed(golden_model):
    image = batch(1)
    losses = {step(golden_model, image | {"noise_seed": [seed]})[0].item() for seed in range(4)}
    assert len(losses) == 4


@torch.no_grad()
def test_without_seeds_the_noise_is_the_global_generators(golden_model):
    image = {key: value for key, value in batch(1).items() if key != "noise_seed"}
    torch.manual_seed(0)
    first, second = (step(golden_model, image)[0] for _ in range(2))
    torch.manual_seed(0)
    assert step(golden_model, image)[0] == first != second


@pytest.mark.parametrize("parameterization, loss_type", [("eps", "l2"), ("eps", "l1"), ("x0", "l2"), ("v", "l2")])
def test_a_fixed_batch_is_learned(parameterization, loss_type):
    model = build(parameterization=parameterization, loss_type=loss_type)
    model.learning_rate = 2e-3
    optimizer = model.configure_optimizers()
    halves = batch(1), batch(11, caption="photo of a dog")
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, _ = step(model, *halves)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


@torch.no_grad()
def test_the_bound_joins_the_loss_with_its_weight(golden_model, monkeypatch):
    x, cond = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 77, 32)
    t = torch.tensor([5, 800])
    monkeypatch.setattr(golden_model, "original_elbo_weight", 0.25)
    loss, logged = golden_model.p_losses(x[0], cond, t, x[1])
    simple, vlb = logged["train/loss_simple"], logged["train/loss_vlb"]
    torch.testing.assert_close(loss, simple + 0.25 * vlb)
    output = golden_model.apply_model(golden_model.q_sample(x[0], t, x[1]), t, cond)
    each = per_sample_loss(output, x[1])
    torch.testing.assert_close(simple, each.mean())
    torch.testing.assert_close(vlb, (golden_model.lvlb_weights[t] * each).mean())


@torch.no_grad()
def test_p_losses_draws_noise_and_logs_under_the_mode(golden_model):
    x, cond, t = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([500])
    first, second = (golden_model.p_losses(x, cond, t)[0] for _ in range(2))
    assert first != second
    try:
        assert set(golden_model.eval().p_losses(x, cond, t)[1]) == {"val/loss", "val/loss_simple", "val/loss_vlb"}
    finally:
        golden_model.train()


def test_unknown_parameterization():
    with pytest.raises(UserError, match="parameterization: unknown 'epsilon'; accepted: eps, x0, v"):
        build(parameterization="epsilon")


# What trains


@pytest.mark.parametrize("trainable", [True, False])
def test_which_networks_train(trainable):
    model = build(cond_stage_trainable=trainable)
    step(model, batch(1), batch(2))[0].backward()
    parts = {"model": True, "cond_stage_model": trainable, "first_stage_model": False}
    optimised = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    for name, trains in parts.items():
        part = getattr(model, name)
        assert part.training == trains
        for key, parameter in part.named_parameters():
            assert parameter.requires_grad == trains, key
            assert (id(parameter) in optimised) == trains, key
            assert (parameter.grad is not None) == trains, key
    grads = {name: sum(p.grad.abs().sum() for p in getattr(model, name).parameters()) for name in parts if parts[name]}
    assert all(grad > 0 for grad in grads.values())
    model.eval()
    assert not any(getattr(model, name).training for name in parts)
    assert model.get_learned_conditioning(["a dog"]).requires_grad == trainable


def gradients(model, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = step(model, batch(1), batch(2))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(autocast, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    for module in ("ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"):
        monkeypatch.setattr(f"{module}.checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    models = [build({"use_checkpoint": on}, {"use_checkpoint": on}) for on in (False, True)]
    plain, expected = gradients(models[0], autocast)
    assert not calls
    loss, checkpointed = gradients(models[1], autocast)
    assert len(calls) == sum(hasattr(m, "use_checkpoint") for m in models[1].model.modules()) > 0
    assert any(getattr(m, "gradient_checkpointing", False) for m in models[1].cond_stage_model.modules())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert checkpointed.keys() == expected.keys()
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (checkpointed[name] - grad).abs().max() <= 1e-6 * scale, name


def test_attention_alone_is_checkpointed(monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    for module in ("ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"):
        monkeypatch.setattr(f"{module}.checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    plain, expected = gradients(build({"use_checkpoint": False}), False)
    assert not calls
    loss, found = gradients(build({"use_checkpoint": "attention"}), False)
    assert calls and all(isinstance(call.__self__, BasicTransformerBlock) for call in calls)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert all(torch.allclose(found[name], grad, rtol=1e-4, atol=1e-7) for name, grad in expected.items())
    with pytest.raises(UserError, match="use_checkpoint: expected true, false or attention, got 'attn'"):
        UNetModel(**{**UNET, "use_checkpoint": "attn"})


@pytest.mark.parametrize("use_checkpoint", [True, "attention"])
def test_compiled_and_channels_last_change_no_gradient(use_checkpoint):
    plain, expected = gradients(build(), False)
    # torch's own backend for tests: the graphs are traced, and run as they are.
    changed = {"use_checkpoint": use_checkpoint, "channels_last": True, "compile": {"backend": "eager"}}
    model = build(changed)
    model.configure_model()
    weight = model.model.diffusion_model.middle_block[0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert model.state_dict().keys() == build().state_dict().keys()
    torch._dynamo.utils.counters.clear()
    loss, found = gradients(model, False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # sampling is not compiled
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        step(model, batch(1, 2, 3))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compile_options_that_torch_does_not_take():
    with pytest.raises(UserError, match=r"compile: .*bakend"):
        UNetModel(**{**UNET, "compile": {"bakend": "eager"}})


def test_autocast_is_close_to_full_precision():
    model = build()
    full, halved = gradients(model, False)[0], gradients(model, True)[0]
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, full, rtol=0.05, atol=0)


# Weight averages


class Boom(Exception):
    pass


@pytest.fixture
def averaged_model():
    """A model whose UNet is 1 away from its average."""
    model = build(use_ema=True)
    model.model_ema = LitEma(model.model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += 1
    return model


def unet_of(model):
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


@pytest.mark.parametrize("error", [None, Boom])
def test_ema_scope_swaps_and_restores(averaged_model, error):
    own = unet_of(averaged_model)

    def inside():
        with averaged_model.ema_scope("test"):
            for name, parameter in averaged_model.model.named_parameters():
                torch.testing.assert_close(parameter.detach(), own[name] - 1, rtol=0, atol=1e-5)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            inside()
    else:
        inside()
    assert all(torch.equal(parameter, own[name]) for name, parameter in unet_of(averaged_model).items())


def test_ema_lives_in_the_state_dict(averaged_model):
    state = averaged_model.state_dict()
    averages = {key for key in state if key.startswith("model_ema.")}
    expected = {f"model_ema.{name.replace('.', '')}" for name in unet_of(averaged_model)}
    assert averages == expected | {"model_ema.decay", "model_ema.num_updates"}
    other = build(use_ema=True)
    other.load_state_dict(state)
    for name, buffer in averaged_model.model_ema.named_buffers():
        assert torch.equal(other.model_ema.get_buffer(name), buffer)


def test_without_an_ema_the_scope_changes_nothing(golden_model):
    assert not any(key.startswith("model_ema") for key in golden_model.state_dict())
    before = golden_model.model.diffusion_model.out[2].weight
    value = before.detach().clone()
    with golden_model.ema_scope():
        assert golden_model.model.diffusion_model.out[2].weight is before and torch.equal(before, value)


def test_ema_converges_to_constant_weights_and_starts_with_a_short_memory():
    layer = torch.nn.Linear(2, 2, bias=False)
    ema = LitEma(layer, decay=0.9)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema(layer)
    torch.testing.assert_close(ema.weight - start, torch.full((2, 2), 1 - 2 / 11))  # (1 + n) / (10 + n)
    for _ in range(200):
        ema(layer)
    torch.testing.assert_close(ema.weight, layer.weight.detach(), rtol=0, atol=1e-5)
    assert ema.num_updates == 201


def test_ema_without_counting_has_its_full_memory_from_the_start():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = LitEma(layer, decay=0.75, use_num_updates=False)
    start = layer.weight.item()
    with torch.no_grad():
        layer.weight += 1
    ema(layer)
    assert ema.weight.item() == pytest.approx(start + 0.25, abs=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=str(decay)):
        LitEma(torch.nn.Linear(1, 1), decay)


def small_trainer(**kwargs):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip


def loader(*batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_the_average_moves_once_for_each_step_and_is_evaluated():
    model = build(use_ema=True)
    before = unet_of(model)
    trainer = small_trainer(max_steps=2, accumulate_grad_batches=2)
    trainer.fit(model, loader(*[batch(i) for i in range(4)]), loader(batch(9)))
    assert trainer.global_step == 2 and model.model_ema.num_updates == 2
    assert any(not torch.equal(before[name], after) for name, after in unet_of(model).items())
    names = {f"val/{name}{ema}" for name in ("loss", "loss_simple", "loss_vlb", "loss_total") for ema in ("", "_ema")}
    assert names <= set(trainer.callback_metrics)
    assert golden.CONFIG["monitor"] in names
    plain, average = (trainer.callback_metrics[f"val/loss_simple{ema}"] for ema in ("", "_ema"))
    assert plain != average


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_without_an_average_the_monitored_metric_is_there_too(golden_model):
    trainer = small_trainer()
    (metrics,) = trainer.validate(golden_model, loader(batch(9)), verbose=False)
    assert metrics["val/loss_simple_ema"] == metrics["val/loss_simple"] > 0
    golden_model.train()


# Methods that others call


@pytest.fixture
def pictures_of(golden_model):
    """`log_images` with few steps."""

    def call(halves, **kwargs):
        return golden_model.log_images(halves, ddim_steps=2, **kwargs)

    return call


@pytest.mark.parametrize("n, count", [(1, 2), (4, 5)])
def test_log_images(pictures_of, n, count):
    halves = batch(1, 2), batch(11, 12, 13, caption="photo of a dog")
    pictures = pictures_of(halves, N=n)
    assert {name: image.shape for name, image in pictures.items()} == dict.fromkeys(
        ("inputs", "reconstruction", "samples"), (count, 3, SIZE, SIZE)
    )
    assert torch.equal(pictures["inputs"][0], halves[0]["image"][0].permute(2, 0, 1))
    assert torch.equal(pictures["inputs"][-1], halves[1]["image"][min(n, 3) - 1].permute(2, 0, 1))
    assert all(image.isfinite().all() for image in pictures.values())


def test_log_images_is_reproducible_and_leaves_the_generator_alone(pictures_of):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (pictures_of(batch(1), seed=seed)["samples"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_log_images_without_samples_of_one_batch(pictures_of):
    assert set(pictures_of(batch(1), sample=False)) == {"inputs", "reconstruction"}


def test_log_images_shows_the_averaged_weights(averaged_model):
    inside = averaged_model.log_images(batch(1), ddim_steps=2)["samples"]
    averaged_model.model_ema.copy_to(averaged_model.model)
    averaged_model.model_ema = None
    # The copy to the model and back rounds: its weights are 1 away from the average.
    assert torch.equal(inside, averaged_model.log_images(batch(1), ddim_steps=2)["samples"])


@torch.no_grad()
def test_latents_are_scaled_samples_of_the_posterior(golden_model):
    posterior = golden_model.encode_first_stage(torch.rand(2, 3, 16, 16) * 2 - 1)
    scale = golden.CONFIG["scale_factor"]
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(golden_model.get_first_stage_encoding(z), scale * z)
    given = golden_model.get_first_stage_encoding(posterior, z)
    torch.testing.assert_close(given, scale * (posterior.mean + posterior.std * z))
    first, second = (golden_model.get_first_stage_encoding(posterior) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(golden_model.decode_first_stage(z), golden_model.first_stage_model.decode(z / scale))
    assert (golden_model.latent_channels, golden_model.downsampling) == (4, 2)


def test_the_schedule_is_that_of_the_buffers(fresh_golden_model):
    assert fresh_golden_model.schedule.betas is fresh_golden_model.betas
    other = NoiseSchedule.create(1000, "cosine")
    fresh_golden_model.load_state_dict(
        fresh_golden_model.state_dict() | {name: getattr(other, name) for name in NoiseSchedule.names()}
    )
    sampler = DDIMSampler(fresh_golden_model)
    sampler.make_schedule(10)
    assert torch.equal(sampler.ddim_alphas, other.alphas_cumprod[sampler.ddim_timesteps])


# Conditioning


def unet_inputs(channels=4):
    random = SampleRandom([0, 1])
    return random.randn((2, channels, 8, 8)), torch.tensor([3, 800]), random.randn((2, 77, 32))


@torch.no_grad()
def test_crossattn_takes_tensors_lists_and_mappings(golden_model):
    x, t, c = unet_inputs()
    expected = golden_model.apply_model(x, t, c)
    for cond in ([c], {"c_crossattn": [c]}, {"c_crossattn": (c[:, :40], c[:, 40:])}):
        torch.testing.assert_close(golden_model.apply_model(x, t, cond), expected, rtol=0, atol=1e-6)
    assert rel(golden_model.apply_model(x, t, 2 * c), expected) > 1e-3


@pytest.fixture(scope="module")
def inpainting_model():
    """Nine input channels: noisy latent, mask and masked latent."""
    return build({"in_channels": 9}, conditioning_key="hybrid")


@torch.no_grad()
def test_hybrid_joins_channels_and_text(inpainting_model):
    x, t, c = unet_inputs()
    extra = torch.randn(2, 5, 8, 8)
    out = inpainting_model.apply_model(x, t, {"c_concat": [extra[:, :1], extra[:, 1:]], "c_crossattn": [c]})
    expected = inpainting_model.model.diffusion_model(torch.cat([x, extra], dim=1), t, context=c)
    assert out.shape == x.shape
    assert torch.equal(out, expected)


def test_hybrid_samples_with_guidance(inpainting_model):
    x, _, c = unet_inputs()
    extra = torch.randn(2, 5, 8, 8)
    conds = [{"c_concat": [extra], "c_crossattn": [text]} for text in (c, torch.zeros_like(c))]
    out, _ = DDIMSampler(inpainting_model).sample(
        2, 2, (4, 8, 8), conds[0], x_T=x, verbose=False,
        unconditional_guidance_scale=3.0, unconditional_conditioning=conds[1],
    )  # fmt: skip
    assert out.shape == x.shape and out.isfinite().all()


@torch.no_grad()
def test_concat_reads_a_bare_tensor_as_channels():
    wrapper = DiffusionWrapper(
        {"target": golden.CONFIG["unet_config"]["target"], "params": {**UNET, "in_channels": 8, "context_dim": None}},
        "concat",
    )
    golden.load_golden_weights(wrapper)
    model = build({"context_dim": None, "in_channels": 8}, conditioning_key="concat")
    model.model = wrapper
    x, t, _ = unet_inputs()
    extra = torch.randn(2, 4, 8, 8)
    expected = wrapper.diffusion_model(torch.cat([x, extra], dim=1), t)
    assert torch.equal(model.apply_model(x, t, extra), expected)


def test_unknown_conditioning_key():
    with pytest.raises(UserError, match="conditioning_key: unknown 'adm'; accepted: crossattn, concat, hybrid"):
        DiffusionWrapper(golden.CONFIG["unet_config"], "adm")


# UNet and text encoder


@pytest.mark.parametrize("wrong, message", [
    ({"model_channels": 48}, "48 channels is not a multiple of the 32"),
    ({"num_heads": 5}, "32 channels cannot be split into attention heads"),
    ({"num_heads": -1, "num_head_channels": 24}, "32 channels cannot be split into attention heads"),
    ({"num_heads": -1}, "num_heads: give it or num_head_channels"),
    ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks: has 3 entries for 2 in channel_mult"),
    ({"use_spatial_transformer": False}, "use_spatial_transformer: must be true"),
])  # fmt: skip
def test_unet_with_impossible_widths(wrong, message):
    with pytest.raises(UserError, match=message):
        UNetModel(**{**UNET, **wrong})


@torch.no_grad()
@pytest.mark.parametrize("other", [{"num_heads": -1, "num_head_channels": 8}, {"num_res_blocks": [1, 1]}])
def test_two_ways_to_say_the_same_unet(other):
    # 8 channels a head are 4 heads at the first level and 8 at the second: only the keys are the same there.
    first, second = UNetModel(**UNET), UNetModel(**{**UNET, **other})
    second.load_state_dict(first.state_dict())
    heads = [m.heads for m in second.modules() if hasattr(m, "heads")]
    assert set(heads) == ({4, 8} if "num_head_channels" in other else {4})


@torch.no_grad()
def test_a_new_unet_predicts_zero_and_linear_projections_are_the_convolutions():
    x, t, c = unet_inputs()
    unet = UNetModel(**UNET)
    assert not unet(x, t, c).any()
    golden.load_golden_weights(unet)
    linear = UNetModel(**UNET, use_linear_in_transformer=True)
    state = {
        key: value[..., 0, 0] if "proj_in.weight" in key or "proj_out.weight" in key else value
        for key, value in unet.state_dict().items()
    }
    linear.load_state_dict(state)
    assert rel(linear(x, t, c), unet(x, t, c)) < 1e-5


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(golden_model):
    x, t, c = unet_inputs()
    together = golden_model.apply_model(x, t, c)
    alone = golden_model.apply_model(x[1:], t[1:], c[1:])
    assert rel(alone, together[1:]) < 1e-5


@pytest.mark.parametrize("params, message", [
    ({"text_config": golden.TEXT_CONFIG, "max_length": 78}, "max_length: 78 exceeds max_position_embeddings 77"),
    ({"text_config": {**golden.TEXT_CONFIG, "vocab_size": 1000}}, "vocab_size: 1000 is below CLIP's 49408"),
    ({"text_config": {"hiden_size": 32}}, "text_config.hiden_size: unknown field .did you mean 'hidden_size'"),
    ({"version": "no/such/folder/at/all"}, "cannot load the hub model or local folder 'no/such/folder/at/all'"),
])  # fmt: skip
def test_text_encoders_that_cannot_be_built(params, message):
    with pytest.raises(UserError, match=message):
        FrozenCLIPEmbedder(**params)


@torch.no_grad()
def test_text_encoder_from_a_folder_of_transformers(golden_model, tmp_path):
    golden_model.cond_stage_model.transformer.text_model.save_pretrained(tmp_path)
    loaded = FrozenCLIPEmbedder(version=str(tmp_path))
    texts = ["photo of a sks dog", ""]
    assert rel(loaded(texts), golden_model.cond_stage_model(texts)) < 1e-6
    with pytest.raises(UserError, match="cannot load the folder"):
        FrozenCLIPEmbedder(version=str(tmp_path.parent))


@torch.no_grad()
def test_shorter_texts(golden_model):
    short = FrozenCLIPEmbedder(max_length=10, text_config=golden.TEXT_CONFIG)
    short.load_state_dict(golden_model.cond_stage_model.state_dict())
    out = short.encode(["photo of a sks dog"])
    assert out.shape == (1, 10, 32)
    # Attention is causal: what is cut off behind does not matter.
    assert rel(out, golden_model.get_learned_conditioning(["photo of a sks dog"])[:, :10]) < 1e-5
