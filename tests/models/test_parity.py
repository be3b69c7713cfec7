"""The networks and the loss in the numbers of the reference implementation (tests/data)."""

import json
import math

import numpy as np
import pytest
import torch

from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.ema import LitEma
from ldm.sampling.pictures import to_pil
from tests.support import golden
from tests.support.golden import FORWARD, META, io, rel, tensor


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
    torch.testing.assert_close(
        getattr(golden_model, name), tensor(f"schedule/{name}"), rtol=3e-7, atol=1e-10
    )


def test_lvlb_weights_are_used_but_not_saved(golden_model):
    torch.testing.assert_close(
        golden_model.lvlb_weights, tensor("schedule/lvlb_weights"), rtol=1e-6, atol=0
    )
    assert not {"lvlb_weights", "logvar"} & set(golden_model.state_dict())


# Text


@pytest.mark.parametrize(
    "prompts, name",
    [
        ("text_prompts", "tokens"),
        ("text_long_prompt", "long_tokens"),
        ("text_hard_prompts", "hard_tokens"),
    ],
)
def test_tokens(golden_model, prompts, name):
    texts = META[prompts] if isinstance(META[prompts], list) else [META[prompts]]
    assert torch.equal(golden_model.cond_stage_model.tokenize(texts), tensor(f"text/{name}"))


def test_text_embedding(golden_model):
    assert (
        rel(golden_model.get_learned_conditioning(META["text_prompts"]), tensor("text/embedding"))
        < FORWARD
    )


def test_sampler_conditionings(golden_model):
    assert (
        rel(golden_model.get_learned_conditioning(META["sampler_prompts"]), tensor("sampler/c"))
        < FORWARD
    )
    assert rel(golden_model.get_learned_conditioning(["", ""]), tensor("sampler/uc")) < FORWARD


# UNet


def test_timestep_embedding():
    """An exponential is off by its last bit, here and in the recording, and the time step
    multiplies that.
    """
    t, expected = tensor("unet/t"), tensor("unet/timestep_embedding_320")
    angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(160).double() / 160)
    off = (timestep_embedding(t, 320) - expected).abs()
    assert (off <= (angles.repeat(1, 2) + 1) * 2**-22).all()


def test_unet(golden_model):
    out = golden_model.apply_model(tensor("unet/x"), tensor("unet/t"), tensor("unet/context"))
    assert rel(out, tensor("unet/out")) < FORWARD


def test_unet_on_a_rectangle(golden_model):
    out = golden_model.apply_model(
        tensor("unet/x_rect"), torch.tensor([123]), tensor("unet/context")[:1]
    )
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
    loss, logged = golden_model.p_losses(
        tensor("q/x0"), tensor("text/embedding"), tensor("q/t"), tensor("q/noise")
    )
    assert rel(loss, tensor("p_losses/loss")) < FORWARD
    assert rel(logged["train/loss_simple"], tensor("p_losses/loss_simple")) < FORWARD
    assert rel(logged["train/loss_vlb"], tensor("p_losses/loss_vlb")) < FORWARD
