"""Between pictures and latents: large ones in tiles, and none lost to half precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ldm.host import give_back_free_pages
from ldm.models.autoencoder import IdentityFirstStage

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

# Autoencoders whose values were too large for half precision once: they stay in full.
_IN_FULL: WeakSet[nn.Module] = WeakSet()


def save_memory(model: LatentDiffusion, tiling: bool = False, slicing: bool = False) -> None:
    """Let the autoencoder work in tiles of the size that the model is made for, or one by one.

    Args:
        tiling: pictures larger than that in tiles; their pixels differ.
        slicing: the pictures of a batch one after another.
    """
    model.first_stage_model.tile = model.image_size if tiling else None
    # Tiles of a whole batch would take the memory that they are to save.
    model.first_stage_model.slices = slicing or tiling


# Pixels of a picture that keeps a processor busy alone.
LARGE_PICTURE = 256 * 256


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Return images, about in [-1, 1], of scaled latents.

    Where half precision overflows, which would be a black picture, it is decoded in full.
    """
    # What the UNet has freed lies between the weights, and the decoder takes larger blocks.
    if latents.device.type == "cpu":
        give_back_free_pages()
    # On a CPU a batch of large pictures takes no less time than one after another, and a multiple
    # of the memory.
    pixels = latents.shape[-2] * latents.shape[-1] * model.downsampling**2
    parts = 1 if latents.device.type == "cpu" and pixels >= LARGE_PICTURE else len(latents)
    found = [
        _without_overflow(model, model.decode_first_stage, part) for part in latents.split(parts)
    ]
    return torch.cat(found)


def encode(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Return the most likely scaled latents of images in [-1, 1]."""

    def compute(images: Tensor) -> Tensor:
        return model.get_first_stage_encoding(model.encode_first_stage(images).mode())

    return _without_overflow(model, compute, images)


def _without_overflow(
    model: LatentDiffusion, compute: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Return `compute(x)`; in float32 where the autoencoder overflows in half precision."""
    autoencoder = model.first_stage_model
    if isinstance(autoencoder, IdentityFirstStage):
        return compute(x)
    kind = next(autoencoder.parameters()).dtype
    is_cast = torch.is_autocast_enabled(x.device.type)
    halved = kind == torch.float16 or is_cast
    # Try as it is. One that has overflowed once would do so again, so it is remembered.
    if autoencoder not in _IN_FULL:
        found = compute(x if is_cast else x.to(kind))
        # Input that is not finite is not the autoencoder's fault. More precision would not help.
        if not halved or torch.isfinite(found).all() or not torch.isfinite(x).all():
            return found
        log.warning("half precision overflows in this autoencoder: it computes in float32 now")
        _IN_FULL.add(autoencoder)
    # The whole autoencoder in float32, which has the range that half precision lacks.
    autoencoder.float()
    with torch.autocast(x.device.type, enabled=False):
        return compute(x.float())
