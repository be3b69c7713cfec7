"""A small autoencoder with an objective, pictures for it, and the shapes that were recorded of real
ones.
"""

import json

import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from tests.support import golden

TINY = golden.CONFIG["first_stage_config"]["params"]
SMALLEST = {**TINY["ddconfig"], "ch_mult": [1, 1], "resolution": 32}
LOSS = {
    "disc_start": 0,
    "perceptual_weight": 0.0,
    "kl_weight": 1e-6,
    "disc_ch": 8,
    "disc_num_layers": 2,
}


def trainable(ddconfig=SMALLEST, seed=0, use_checkpoint=False, **loss) -> AutoencoderKL:
    """A small autoencoder with an objective."""
    torch.manual_seed(seed)
    lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {**LOSS, **loss}}
    model = AutoencoderKL(
        ddconfig, lossconfig, embed_dim=4, monitor="val/rec_loss", use_checkpoint=use_checkpoint
    )
    model.learning_rate = 2e-3
    return model


def images(count=2, side=32, seed=0):
    """Smooth pictures, (b, c, h, w) in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def shapes(module):
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def recorded_shapes(name):
    prefix, entries = "first_stage_model.", json.loads((golden.DATA / name).read_text())
    found = {
        key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)
    }
    return {key: value[0] if isinstance(value[0], list) else value for key, value in found.items()}
