"""The numbers of the reference implementation (tests/data, see its README), at the size it was recorded."""

import json
import math

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.ema import LitEma
from ldm.rng import SampleRandom
from ldm.sampling.pictures import to_pil
from tests.support import golden
from tests.support.golden import META, io, rel, tensor

# What float32 rounds, here and in the recording: the noise floors between library versions are 2e-6, 3e-6, 5e-6 and
# 9e-6, and parity is a few times that. With twice the rounding of real kernels (OTHER_ROUNDING) they hold as well.
FORWARD, GRADIENT, SAMPLE, PRED_X0 = 6e-6, 1e-5, 1.5e-5, 3e-5


def test_state_dict_keys_shapes_and_types(golden_model):
    ours = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in golden_model.state_dict().items()
    }
    assert ours == json.loads((golden.DATA / "tiny_keys.json").read_text())


def test_sizes(golden_model):
    for name, count in META["param_counts"].items():
        assert sum(p.numel() for p in getattr(golden_model, name).parameters()) == count


@pytest.mark.parametrize("name", NoiseSchedule.names())
def test_schedule(golden_model, name):
    # float64, then cast: the last bit may differ between libraries' roots and logarithms.
    torch.testing.assert_close(getattr(golden_model, name), tensor(f"schedule/{name}"), rtol=3e-7, atol=1e-10)


def test_lvlb_weights_are_used_but_not_saved(golden_model):
    torch.testing.assert_close(golden_model.lvlb_weights, tensor("schedule/lvlb_weights"), rtol=1e-6, atol=0)
    assert not {"lvlb_weights", "logvar"} & set(golden_model.state_dict())


# Text


@pytest.mark.parametrize(
    "prompts, name",
    [("text_prompts", "tokens"), ("text_long_prompt", "long_tokens"), ("text_hard_prompts", "hard_tokens")],
)
def test_tokens(golden_model, prompts, name):
    texts = META[prompts] if isinstance(META[prompts], list) else [META[prompts]]
    assert torch.equal(golden_model.cond_stage_model.tokenize(texts), tensor(f"text/{name}"))


def test_text_embedding(golden_model):
    assert rel(golden_model.get_learned_conditioning(META["text_prompts"]), tensor("text/embedding")) < FORWARD


def test_sampler_conditionings(golden_model):
    assert rel(golden_model.get_learned_conditioning(META["sampler_prompts"]), tensor("sampler/c")) < FORWARD
    assert rel(golden_model.get_learned_conditioning(["", ""]), tensor("sampler/uc")) < FORWARD


# UNet


def test_timestep_embedding():
    """An exponential is off by its last bit, here and in the recording, and the time step multiplies that."""
    t, expected = tensor("unet/t"), tensor("unet/timestep_embedding_320")
    angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(160).double() / 160)
    off = (timestep_embedding(t, 320) - expected).abs()
    assert (off <= (angles.repeat(1, 2) + 1) * 2**-22).all()


def test_unet(golden_model):
    out = golden_model.apply_model(tensor("unet/x"), tensor("unet/t"), tensor("unet/context"))
    assert rel(out, tensor("unet/out")) < FORWARD


def test_unet_on_a_rectangle(golden_model):
    out = golden_model.apply_model(tensor("unet/x_rect"), torch.tensor([123]), tensor("unet/context")[:1])
    assert rel(out, tensor("unet/out_rect")) < FORWARD


def test_unet_with_several_channels_in_a_norm_group():
    params = golden.CONFIG["unet_config"]["params"] | {
        "model_channels": 64, "channel_mult": [1, 2, 2], "num_res_blocks": 2, "attention_resolutions": [4, 2, 1],
        "num_heads": 8, "context_dim": 32,
    }  # fmt: skip
    unet = UNetModel(**params)
    golden.load_golden_weights(unet, "unet64.")
    out = unet(tensor("unet64/x"), tensor("unet64/t"), tensor("unet64/context"))
    assert rel(out, tensor("unet64/out")) < FORWARD
    torch.nn.functional.mse_loss(out, tensor("unet64/target")).backward()
    norms = torch.stack([unet.get_parameter(name).grad.norm() for name in META["unet64_watch"]])
    torch.testing.assert_close(norms, tensor("unet64/gradnorm"), rtol=1e-5, atol=0)


# EMA


def test_ema_follows_the_reference():
    holder = torch.nn.Linear(3, 2, bias=False)
    weights, shadows = tensor("ema/w"), tensor("ema/shadow")
    with torch.no_grad():
        holder.weight.copy_(weights[0])
    ema = LitEma(holder)
    assert sorted(dict(ema.named_buffers())) == META["ema_buffers"]
    for weight, shadow in zip(weights[1:], shadows):
        with torch.no_grad():
            holder.weight.copy_(weight)
        ema(holder)
        torch.testing.assert_close(ema.weight, shadow, rtol=1e-6, atol=1e-7)


def test_ema_keys(golden_model):
    names = {f"model_ema.{name}" for name, _ in LitEma(golden_model.model).named_buffers()}
    assert set(META["ema_key_example"].values()) <= names


# First stage, as the latent diffusion model uses it


def test_first_stage_encoding(golden_model):
    posterior = golden_model.encode_first_stage(tensor("vae/image"))
    latent = golden_model.get_first_stage_encoding(posterior, tensor("vae/eps"))
    assert rel(latent, tensor("vae/scaled_latent")) < FORWARD


def test_first_stage_decoding_and_pictures(golden_model):
    images = golden_model.decode_first_stage(tensor("vae/z"))
    assert rel(images, tensor("vae/decode_first_stage")) < FORWARD
    ours = np.stack([np.asarray(image) for image in to_pil(images)]).astype(int)
    # Truncation may fall to the neighbour where the float differs in its last bits.
    difference = np.abs(ours - io()["image/samples_jpg_u8"].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


# Forward process and loss


def test_q_sample_and_its_inverse(golden_model):
    x_t = golden_model.q_sample(tensor("q/x0"), tensor("q/t"), tensor("q/noise"))
    assert rel(x_t, tensor("q/x_t")) < FORWARD
    # At t near 1000 the inverse divides by a signal of 7 %: compare with the reference's own.
    start = golden_model.predict_start_from_noise(tensor("q/x_t"), tensor("q/t"), tensor("q/noise"))
    assert rel(start, tensor("q/predict_start")) < FORWARD


def test_p_losses(golden_model):
    loss, logged = golden_model.p_losses(tensor("q/x0"), tensor("text/embedding"), tensor("q/t"), tensor("q/noise"))
    assert rel(loss, tensor("p_losses/loss")) < FORWARD
    assert rel(logged["train/loss_simple"], tensor("p_losses/loss_simple")) < FORWARD
    assert rel(logged["train/loss_vlb"], tensor("p_losses/loss_vlb")) < FORWARD


# One training step


def half(name):
    caption = META["data_caption_reg" if name.startswith("reg") else "data_caption_train"]
    images = tensor(f"step/{name}_image")
    return {"image": images, "caption": [caption] * len(images)}


def step_loss(model, names, reg_weight, monkeypatch):
    """The training loss of (subject, prior) with the recorded posterior noise, time steps and noise."""
    dtype = next(model.parameters()).dtype
    batches = {name: half(name) for name in names}
    draws = {id(batch): name for name, batch in batches.items()}
    recorded = {}
    for name, batch in batches.items():
        batch["image"] = batch["image"].to(dtype)
        eps, t, noise = (tensor(f"step/{name}_{what}") for what in ("eps", "t", "noise"))
        recorded[name] = [eps.to(dtype), t, noise.to(dtype)]
    monkeypatch.setattr(model, "_draw", lambda batch, shape: recorded[draws[id(batch)]])
    monkeypatch.setattr(model, "objective", type(model.objective)(reg_weight))
    return model.shared_step(tuple(batches.values()), "train")


@pytest.mark.parametrize("reg_weight", [1.0, 0.5, 0.0])
def test_training_step_loss_log_and_gradients(fresh_golden_model, monkeypatch, reg_weight):
    model = fresh_golden_model
    loss, logged = step_loss(model, ["train", "reg"], reg_weight, monkeypatch)
    assert rel(loss, tensor(f"step/loss_regw{reg_weight}")) < FORWARD
    for key, value in META[f"logged_regw{reg_weight}"].items():
        assert logged[key].item() == pytest.approx(value, rel=1e-5)
    assert logged["train/loss_total"].item() == pytest.approx(loss.item())
    prior = (loss.item() - logged["train/loss"].item()) / reg_weight if reg_weight else None
    assert prior is None or logged["train/loss_prior"].item() == pytest.approx(prior, rel=1e-4)

    loss.backward()
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert rel(total, tensor(f"step/gradnorm_total_regw{reg_weight}")) < GRADIENT
    watched = META["watch"]
    norms = torch.stack([model.get_parameter(name).grad.norm() for name in watched])
    torch.testing.assert_close(norms, tensor(f"step/gradnorm_regw{reg_weight}"), rtol=3e-5, atol=0)


def test_every_gradient_of_the_training_step(fresh_golden_model, monkeypatch):
    model = fresh_golden_model
    step_loss(model, ["train", "reg"], 1.0, monkeypatch)[0].backward()
    norms = json.loads((golden.DATA / "tiny_gradnorms.json").read_text())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(norms)
    for name, norm in norms.items():
        if name not in META["params_noise_grad"]:
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=5e-5), name
    recorded = [key for key in io() if key.startswith("step/grad/")]
    assert recorded
    for key in recorded:
        assert rel(model.get_parameter(key.removeprefix("step/grad/")).grad, tensor(key)) < GRADIENT, key


def test_training_step_of_two_pairs(golden_model, monkeypatch):
    loss, _ = step_loss(golden_model, ["train_b2", "reg_b2"], 1.0, monkeypatch)
    assert rel(loss, tensor("step/loss_b2_regw1.0")) < FORWARD


def test_unseeded_batches_draw_in_the_reference_order(golden_model):
    torch.manual_seed(23)
    loss, _ = golden_model.shared_step((half("train"), half("reg")), "train")
    assert rel(loss, tensor("step/loss_seed23")) < FORWARD
    assert torch.equal(torch.randn(4), tensor("step/rng_after_seed23"))


def test_training_modes(golden_model):
    golden_model.train()
    modes = {"unet": "model", "text": "cond_stage_model", "vae": "first_stage_model"}
    assert {name: getattr(golden_model, part).training for name, part in modes.items()} == META["train_mode"]


def test_optimizer_settings(fresh_golden_model):
    model, expected = fresh_golden_model, META["optimizer"]
    model.learning_rate = 1e-6
    optimizer = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == expected["cls"]
    assert len(group["params"]) == expected["n_tensors"]
    assert sum(p.numel() for p in group["params"]) == expected["n_params"]
    ours = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
    assert ours == {key: tuple(v) if isinstance(v := expected["hyper"][key], list) else v for key in ours}


def adamw_steps(model, learning_rate, steps, monkeypatch):
    model.learning_rate = learning_rate
    optimizer = model.configure_optimizers()
    losses = []
    for _ in range(steps):
        loss, _ = step_loss(model, ["train", "reg"], 1.0, monkeypatch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), step_loss(model, ["train", "reg"], 1.0, monkeypatch)[0].detach()


@pytest.fixture
def float64_model(fresh_golden_model, monkeypatch):
    """The golden model without rounding: each processor computes the same, and what is left is the recording's own.

    AdamW divides each gradient by its own size: where that is rounding noise, so is the step.
    """

    def embedding(t, dim):
        angles = t[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        return torch.cat([angles.cos(), angles.sin()], 1)

    monkeypatch.setattr("ldm.modules.diffusionmodules.openaimodel.timestep_embedding", embedding)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return fresh_golden_model.double()


def test_three_adamw_steps(float64_model, monkeypatch):
    model = float64_model
    losses, after = adamw_steps(model, 1e-3, 3, monkeypatch)
    assert rel(losses, tensor("adamw_lr1e-3/losses")) < 1e-6
    assert rel(after, tensor("adamw_lr1e-3/loss_after")) < 1e-6
    prefix = "adamw_lr1e-3/after/"
    for key in (key for key in io() if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if name not in META["params_noise_grad"]:
            assert rel(model.get_parameter(name), tensor(key)) < 2e-4, name
    check_token_rows(model, "adamw_lr1e-3", 2e-4)


def test_losses_of_three_adamw_steps_in_float32(fresh_golden_model, monkeypatch):
    """Weights whose gradient is noise have wrong steps, but matter little to the loss: the gradient says so."""
    losses, after = adamw_steps(fresh_golden_model, 1e-3, 3, monkeypatch)
    assert rel(losses, tensor("adamw_lr1e-3/losses")) < FORWARD
    assert rel(after, tensor("adamw_lr1e-3/loss_after")) < FORWARD


def test_one_adamw_step_at_the_default_rate(float64_model, monkeypatch):
    model = float64_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw_steps(model, 1e-6, 1, monkeypatch)
    prefix = "adamw_lr1e-6/delta_f64/"
    for key in (key for key in io() if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if name not in META["params_noise_grad"]:
            delta = model.get_parameter(name).detach().double() - before[name].double()
            # The recorded weights are float32, whose numbers near 1 are 6e-8 or 1.2e-7 apart: 6 % of a step, or 12 %.
            assert rel(delta, tensor(key)) < 0.1, name
    check_token_rows(model, "adamw_lr1e-6", 1e-6)


def check_token_rows(model, prefix, tolerance):
    rows = model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
    assert rel(rows[tensor(f"{prefix}/token_embedding_rows")], tensor(f"{prefix}/token_embedding_after")) < tolerance


# Samplers


class Recorded(SampleRandom):
    """The recorded noise, one entry a draw."""

    def __init__(self, backwards=False):
        noise = tensor("sampler/noise")
        self.noise = iter(noise.flip(0) if backwards else noise)

    def randn(self, shape):
        noise = next(self.noise)
        assert noise.shape == tuple(shape)
        return noise


def draw(sampler, model, scale=7.5, random=None, **kwargs):
    return sampler(model).sample(
        S=10, batch_size=2, shape=(4, 16, 16), conditioning=tensor("sampler/c"), x_T=tensor("sampler/x_T"),
        verbose=False, log_every_t=1, unconditional_guidance_scale=scale,
        unconditional_conditioning=tensor("sampler/uc"), random=random or Recorded(), **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("sampler, name, kwargs", [
    (DDIMSampler, "ddim_eta0", {}),
    (DDIMSampler, "ddim_eta1", {"eta": 1.0}),
    (PLMSSampler, "plms", {}),
])  # fmt: skip
def test_samplers_at_every_step(golden_model, sampler, name, kwargs):
    out, intermediates = draw(sampler, golden_model, **kwargs)
    assert rel(out, tensor(f"{name}/out")) < SAMPLE
    predictions = torch.stack(intermediates["pred_x0"][1:])
    assert predictions.shape == tensor(f"{name}/pred_x0").shape
    assert rel(predictions, tensor(f"{name}/pred_x0")) < PRED_X0


@pytest.mark.parametrize("name, kwargs", [
    ("ddim_scale1", {"scale": 1.0}),
    ("ddim_eta0.5_temp0.8", {"eta": 0.5, "temperature": 0.8}),
])  # fmt: skip
def test_ddim_options(golden_model, name, kwargs):
    assert rel(draw(DDIMSampler, golden_model, **kwargs)[0], tensor(f"{name}/out")) < SAMPLE


def test_ddim_with_a_mask(golden_model):
    # The known region's noise was recorded by the index of the time step, which counts down.
    noise = Recorded(backwards=True)
    out, _ = draw(DDIMSampler, golden_model, mask=tensor("ddim_mask/mask"), x0=tensor("ddim_mask/x0"), random=noise)
    assert rel(out, tensor("ddim_mask/out")) < SAMPLE


def test_ddim_schedule(golden_model):
    sampler = DDIMSampler(golden_model)
    sampler.make_schedule(10, ddim_eta=1.0)
    assert torch.equal(sampler.ddim_timesteps, tensor("ddim/timesteps"))
    for ours, name in [
        (sampler.ddim_alphas, "alphas"),
        (sampler.ddim_alphas_prev, "alphas_prev"),
        (sampler.ddim_alphas_prev, "alphas_prev_f64"),
        (sampler.ddim_sqrt_one_minus_alphas, "sqrt_one_minus_alphas"),
        (sampler.ddim_sigmas, "sigmas_eta1"),
        (sampler.ddim_sigmas, "sigmas_eta1_f64"),
    ]:
        torch.testing.assert_close(ours, tensor(f"ddim/{name}").float(), rtol=2e-6, atol=1e-8)


def test_img2img(golden_model):
    sampler, t_enc = DDIMSampler(golden_model), int(io()["img2img/t_enc"])
    sampler.make_schedule(10)
    steps = torch.full((2,), t_enc)
    encoded = sampler.stochastic_encode(tensor("img2img/init"), steps, noise=tensor("img2img/noise"))
    assert rel(encoded, tensor("img2img/z_enc")) < FORWARD
    out = sampler.decode(
        encoded, tensor("sampler/c"), t_enc, unconditional_guidance_scale=7.5,
        unconditional_conditioning=tensor("sampler/uc"), verbose=False,
    )  # fmt: skip
    assert rel(out, tensor("img2img/out")) < SAMPLE


@torch.no_grad()
def test_ancestral_steps(golden_model):
    sampler = DDPMSampler(golden_model)
    sampler.make_schedule(1000)
    x = tensor("sampler/x_T")
    recorded = Recorded()
    for t in tensor("p_sample/ts").tolist():
        denoise = lambda x, t: golden_model.apply_model(x, t, tensor("sampler/c"))  # noqa: E731
        x, _ = sampler.step(x, t, denoise, lambda: recorded.randn(x.shape))  # noqa: B023
    assert rel(x, tensor("p_sample/out")) < SAMPLE
