"""A small base model in pixels and a small super-resolution model, and overrides that make a run's
config one of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ldm.util import instantiate_from_config
from tests.support import golden
from tests.support.runs import SMALL_TEXT

SIZE, FACTOR, LEVELS = 16, 2, 40
DIFFUSION = "ldm.models.diffusion.ddpm."
AUGMENTATION = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {
        "noise_schedule_config": {"linear_start": 1e-5, "linear_end": 0.02},
        "max_noise_level": LEVELS,
    },
}
UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
    "context_dim": SMALL_TEXT["hidden_size"],
    "use_scale_shift_norm": True,
}
PARAMS: dict[str, Any] = {
    "beta_schedule": "cosine",
    "parameterization": "v",
    "thresholding": "dynamic",
    "image_size": SIZE,
    "use_ema": False,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": UNET,
    },
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": {**golden.TEXT_CONFIG, **SMALL_TEXT}},
    },
}
OF_SR = {
    "conditioning_key": "hybrid-adm",
    "upscaling": FACTOR,
    "low_scale_config": AUGMENTATION,
}

# A run's config of `tests.support.runs` as one of the two.
IN_PIXELS = [
    "model.params.first_stage_config={target: ldm.models.autoencoder.IdentityFirstStage, params: }",
    "model.params.unet_config.params={in_channels: 3, out_channels: 3}",
    "model.params={beta_schedule: cosine, parameterization: v, thresholding: dynamic}",
    "model.params={scale_factor: 1.0, image_size: 8}",
]
ENLARGING = [
    *IN_PIXELS,
    f"model.target={DIFFUSION}LatentUpscaleDiffusion",
    f"model.params={{conditioning_key: hybrid-adm, upscaling: {FACTOR}}}",
    f"model.params.unet_config.params={{in_channels: 6, num_classes: {LEVELS}}}",
    f"model.params.low_scale_config={{target: {AUGMENTATION['target']}}}",
    "model.params.low_scale_config.params={noise_schedule_config: {linear_start: 1e-05}}",
    f"model.params.low_scale_config.params={{max_noise_level: {LEVELS}}}",
]


def config(kind: str, **more: Any) -> dict[str, Any]:
    """Return the config of the `base` or the `sr` model, with other params."""
    params = {**copy.deepcopy(PARAMS), **more}
    if kind == "base":
        return {"target": f"{DIFFUSION}LatentDiffusion", "params": params}
    params = {**params, **copy.deepcopy(OF_SR), **more}
    params["unet_config"]["params"] |= {"in_channels": 6, "num_classes": LEVELS}
    return {"target": f"{DIFFUSION}LatentUpscaleDiffusion", "params": params}


def model(kind: str, **more: Any) -> Any:
    """Build one of the two, with weights none of which is 0."""
    made = instantiate_from_config(config(kind, **more), "model")
    return randomised(made)


def randomised(made: Any) -> Any:
    """Give all networks small random weights, the same in each process."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    return made
