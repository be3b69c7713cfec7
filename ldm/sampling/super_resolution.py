"""Super-resolution: a small picture and its text become a large picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ldm.errors import UserError
from ldm.models.diffusion.super_resolution import (
    LatentUpscaleDiffusion,
    sampled_small,
    upscales,
)
from ldm.rng import derive_seed
from ldm.sampling.photos import to_tensor
from ldm.sampling.text_to_image import Recipe, draw_images

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Beside


def check_upscales(model: object) -> LatentUpscaleDiffusion:
    """Return a model that enlarges pictures; raise a `UserError` for one that does not."""
    if not isinstance(model, LatentUpscaleDiffusion) or not upscales(model):
        raise UserError("no super-resolution model: it draws pictures of a text alone")
    return model


def enlarge(
    model: LatentUpscaleDiffusion,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    augmentation: float | None = None,
    negative_prompt: str = "",
    precision: str = "full",
    verbose: bool = False,
) -> list[Image.Image]:
    """Return each small picture of one size, enlarged: a function of it, its prompt and its seed.

    Args:
        recipe: of the large pictures, whose size follows from the small ones.
        augmentation: variance of the noise on the small pictures. Little keeps what they show, also
            what is wrong in them; much lets the model draw details anew. By default as in the
            model's training.

    Raises:
        UserError: a size, sampler or noise that the model cannot do.
    """
    # The pictures as the model reads them, in [-1, 1].
    small = torch.cat([to_tensor(picture) for picture in pictures]).to(model.device)

    # Noise of its own: the small picture may have been drawn from the same seed.
    own = [derive_seed("super-resolution", int(seed)) for seed in seeds]

    def beside() -> Beside:
        low_scale = model.low_scale_model
        return sampled_small(model, low_scale, model.small, small, own, augmentation)

    return draw_images(model, prompts, own, recipe, beside, negative_prompt, precision, verbose)
