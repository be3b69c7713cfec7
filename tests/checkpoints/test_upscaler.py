"""Stable Diffusion's x4 upscaler: its keys and shapes, and diffusers as the judge of a small one."""

import json

import pytest
import torch

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.diffusers_format import (
    scheduler_config,
    to_diffusers,
    unet_config,
    unet_names,
    vae_config,
    vae_names,
)
from ldm.checkpoints.families import CONFIGS
from ldm.config import load_config, to_plain
from ldm.models.diffusion.conditioning import with_beside
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.super_resolution import read_small
from ldm.modules.diffusionmodules.upscaling import SCHEDULE
from ldm.util import instantiate_from_config
from tests.support import cascade, golden

diffusers = pytest.importorskip("diffusers")

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# What unet/config.json and vae/config.json of the published pipeline say.
PUBLISHED_UNET = {
    "sample_size": 128, "in_channels": 7, "out_channels": 4, "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False), "layers_per_block": 2, "attention_head_dim": 8,
    "cross_attention_dim": 1024, "use_linear_projection": True, "num_class_embeds": 1000,
}  # fmt: skip
PUBLISHED_VAE = {
    "latent_channels": 4, "block_out_channels": (128, 256, 512), "layers_per_block": 2, "sample_size": 256,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def part(state, prefix):
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def test_the_config_has_the_published_models_keys_and_shapes():
    config = to_plain(load_config([CONFIGS / "x4-upscaling-inference.yaml"]))["model"]
    with torch.device("meta"):
        ours = shapes(instantiate_from_config(
            {key: config[key] for key in ("target", "params")}, "model"
        ).state_dict())  # fmt: skip
        unet = shapes(diffusers.UNet2DConditionModel(**PUBLISHED_UNET).state_dict())
        vae = shapes(diffusers.AutoencoderKL(**PUBLISHED_VAE).state_dict())

    own = part(ours, UNET)
    assert {unet_names(own)[key]: shape for key, shape in own.items()} == unet
    assert own["label_emb.weight"] == (1000, 1024)  # the name that the checkpoint has for it
    own = part(ours, VAE)
    flat = {
        key: shape[:2] if ".attn_1." in key and len(shape) == 4 else shape
        for key, shape in own.items()
    }
    assert {vae_names(own)[key]: shape for key, shape in flat.items()} == vae
    # The text encoder is Stable Diffusion 2's; the noise of the small picture has a schedule.
    published = json.loads((golden.DATA / "sd_v2_keys.json").read_text())
    assert part(ours, TEXT) == {k: tuple(v) for k, v in part(published, TEXT).items()}
    assert part(ours, "low_scale_model.") == dict.fromkeys(SCHEDULE, (1000,))


@pytest.fixture(scope="module")
def small():
    """An upscaler in latents of half the side, and its config."""
    first = golden.CONFIG["first_stage_config"]
    factor = 2 ** (len(first["params"]["ddconfig"]["ch_mult"]) - 1)
    params = {
        **cascade.config("sr")["params"],
        **{"beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 0.02, "timesteps": 1000},
        **{"scale_factor": 0.08333, "upscaling": factor, "first_stage_config": first, "thresholding": None},
    }  # fmt: skip
    params["low_scale_config"]["params"] = {
        "noise_schedule_config": {"linear_start": 1e-4, "linear_end": 0.02}, "max_noise_level": 40,
    }  # fmt: skip
    params["unet_config"]["params"] |= {
        "in_channels": 7, "out_channels": 4, "channel_mult": [1, 2, 2], "attention_resolutions": [2, 4],
        "disable_self_attentions": [True, True, False], "use_linear_in_transformer": True,
    }  # fmt: skip
    config = {"model": {"target": f"{cascade.DIFFUSION}LatentUpscaleDiffusion", "params": params}}
    return cascade.randomised(instantiate_from_config(config["model"], "model")).eval(), config


@pytest.fixture(scope="module")
def pipeline(small):
    """The same in diffusers."""
    model, config = small
    params = config["model"]["params"]
    parts = to_diffusers(model.state_dict())
    ours = unet_config(params["unet_config"]["params"], 8)
    unet = diffusers.UNet2DConditionModel.from_config(
        {**ours, "only_cross_attention": [True, True, False], "num_class_embeds": cascade.LEVELS}
    )
    vae = diffusers.AutoencoderKL.from_config(
        vae_config(params["first_stage_config"]["params"], 0.08333)
    )
    for network, name in ((unet, "unet"), (vae, "vae")):
        network.load_state_dict(parts[name])
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    made = diffusers.StableDiffusionUpscalePipeline(
        vae.eval(), model.cond_stage_model.transformer.text_model.eval(),
        model.cond_stage_model.tokenizer, unet.eval(),
        low_res_scheduler=diffusers.DDPMScheduler(**betas),
        scheduler=diffusers.DDIMScheduler.from_config(scheduler_config(params)),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def test_diffusers_enlarges_a_picture_to_the_same_one(small, pipeline):
    model, _ = small
    draws = torch.Generator().manual_seed(1)
    shown = torch.rand((1, 3, 8, 8), generator=draws)  # as diffusers reads it, in [0, 1]
    picture = 2 * shown - 1
    x_T = torch.randn((1, 4, 8, 8), generator=draws)
    theirs = pipeline(
        "a dog", shown, num_inference_steps=4, guidance_scale=3.0, noise_level=20, latents=x_T,
        generator=torch.Generator().manual_seed(7), output_type="np",
    ).images  # fmt: skip

    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(7))
    levels = torch.tensor([20])
    read = read_small(model, model.low_scale_model, picture, model.small.factor, levels, noise)
    texts = [with_beside(model.get_learned_conditioning([t]), read) for t in ("a dog", "")]
    latents, _ = DDIMSampler(model).sample(
        4, 1, (4, 8, 8), texts[0], x_T=x_T, verbose=False,
        unconditional_guidance_scale=3.0, unconditional_conditioning=texts[1],
    )  # fmt: skip
    ours = model.decode_first_stage(latents).permute(0, 2, 3, 1)
    assert ours.std() > 0.01
    torch.testing.assert_close(
        (ours / 2 + 0.5).clamp(0, 1), torch.tensor(theirs), rtol=0, atol=2e-5
    )


def test_a_pipelines_folder_is_read(small, pipeline, tmp_path):
    model, config = small
    pipeline.save_pretrained(tmp_path / "folder", safe_serialization=True)
    read = Checkpoint.open(tmp_path / "folder", config).state
    own = model.state_dict()
    assert len(read) > 200 and all(torch.equal(own[key], value) for key, value in read.items())
    assert not [
        k for k in own if k.startswith((UNET, VAE, TEXT)) and k not in read and "position" not in k
    ]
