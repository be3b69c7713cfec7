"""Inpainting: a part of a photo is drawn anew; of the rest not a bit changes.

Any model can do it: in each step, what stays is put there with the step's noise (Lugmayr et al.,
2201.09865, without their resampling). A model with 9 input channels reads the photo and the mask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.resizing import fit
from ldm.sampling.first_stage import encode
from ldm.sampling.image_to_image import pictures_of, redraw
from ldm.sampling.photos import mask_tensor, paste, region_of, region_size, to_tensor
from ldm.sampling.text_to_image import Recipe, sampling_mode, size_step

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


@torch.no_grad()
def inpaint(
    model: LatentDiffusion,
    photo: Image.Image,
    mask: Image.Image,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    negative_prompt: str = "",
    padding: int = 32,
    precision: str = "full",
    verbose: bool = False,
) -> list[Image.Image]:
    """Return the photo for each prompt, drawn anew where the mask is white.

    A part of a large photo is drawn, at the recipe's size, and put back at its place.

    Args:
        photo: RGB, of any size.
        mask: black and white, of the photo's size.
        recipe: its `strength` is the share of the steps that are taken: 1 ignores what was there;
            its `mask_blur` mixes photo and painting over as many pixels inside the mask.
        padding: pixels around the mask that the model sees at least.

    Raises:
        UserError: a sampler, strength or number of steps that the model cannot do.
    """
    # Cut out what the model sees, at the size that it draws.
    wanted = recipe.width, recipe.height
    region = region_of(mask, padding, wanted)
    size = region_size(region, wanted, size_step(model))
    image = to_tensor(fit(photo, region, size)).to(model.device)
    hidden = mask_tensor(mask.crop(region), size).to(model.device)

    # Draw that part anew, at the size that the model knows.
    with sampling_mode(model, precision):
        latents = _latents(model, image, hidden, prompts, seeds, recipe, negative_prompt, verbose)
        painted = pictures_of(model, latents)

    # Put it back: with a soft border inside the mask, and the photo's own pixels outside.
    blur = recipe.mask_blur or 0
    return [paste(photo, picture, mask, region, blur) for picture in painted]


def _latents(
    model: LatentDiffusion,
    image: Tensor,
    hidden: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    negative_prompt: str,
    verbose: bool,
) -> Tensor:
    """Return latents of the image, (1, 3, h, w), drawn anew where `hidden`, (1, 1, h, w), is 1."""
    from ldm.models.diffusion.inpainting import inpaints, masked_channels

    # The photo's latent is the beginning of each picture, with the noise of the strength.
    count = len(prompts)
    x0 = encode(model, image).expand(count, -1, -1, -1)
    # A model that was trained for it reads what stays, and fits to that what it draws.
    if inpaints(model):
        channels = masked_channels(model, image, hidden).expand(count, -1, -1, -1)
        read = {"c_concat": channels}
        return redraw(model, x0, prompts, seeds, recipe, negative_prompt, read, verbose)

    # Any other model is shown it in each step. A place of the latent is drawn if any of its pixels
    # is to be.
    known = 1 - F.adaptive_max_pool2d(hidden, x0.shape[2:])
    latents = redraw(model, x0, prompts, seeds, recipe, negative_prompt, None, verbose, known)
    # The decoder looks over the mask's border: it sees what stays there as it is.
    return known * x0 + (1 - known) * latents
