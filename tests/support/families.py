"""A small model of each family, and what goes into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoints.families import CONFIGS
from ldm.config import load_config, to_plain
from tests.support import golden

TEXT_V2 = {"width": 64, "heads": 4, "layers": 3}
PROMPTS = ["photo of a sks dog", ""]


def params(family: str) -> dict[str, Any]:
    """Return the parameters of a small model of a family, with every feature that it has; or of the
    full one.
    """
    if family == "full-v1":
        return to_plain(load_config([CONFIGS / "v1-inference.yaml"]))["model"]["params"]
    unet = {
        **golden.CONFIG["unet_config"]["params"],
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 2,
    }
    unet["attention_resolutions"] = [2, 1]
    found = {**golden.CONFIG, "image_size": 8, "use_ema": False, "cond_stage_trainable": False}
    found["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": golden.TEXT_CONFIG},
    }
    if "v2" in family:
        unet = {key: value for key, value in unet.items() if key != "num_heads"}
        unet |= {"num_head_channels": 16, "use_linear_in_transformer": True, "context_dim": 64}
        found["cond_stage_config"] = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"text_config": TEXT_V2},
        }
        found["parameterization"] = "v" if family == "v2-v" else "eps"
    if "inpainting" in family:
        unet["in_channels"] = 9
        found["conditioning_key"] = "hybrid"
    return {**found, "unet_config": {"target": found["unet_config"]["target"], "params": unet}}


def config(family: str = "v1") -> dict[str, Any]:
    """Return a whole config of such a model."""
    return {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params(family)}
    }


def yaml(folder: Path, family: str = "v1") -> Path:
    """Write such a config to a folder, for weights that do not carry it; return its path."""
    path = folder / f"{family}.yaml"
    OmegaConf.save(config(family), path)
    return path


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
