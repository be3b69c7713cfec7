"""Image to image: a photo gets some noise, and the rest of the steps draws it anew (SDEdit, Meng et
al., 2108.01073).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.rng import SampleRandom
from ldm.sampling.first_stage import decode, encode
from ldm.sampling.photos import to_tensor
from ldm.sampling.pictures import to_pil
from ldm.sampling.prompting import read_prompts
from ldm.sampling.text_to_image import Recipe, check_draws, check_size, guide_of, sampling_mode

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Beside
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


def steps_of(strength: float, steps: int) -> int:
    """Return how many of the steps a strength takes, rounded down as CompVis's script does.

    Raises:
        UserError: it is no share, or so small that no step is left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength}: expected more than 0, and at most 1")
    # CompVis's script does the same, so that a strength means the same there and here.
    taken = min(steps, int(strength * steps))
    if taken < 1:
        raise UserError(f"strength {strength}: of {steps} steps none is left; take more of either")
    return taken


@torch.no_grad()
def encoded(
    model: LatentDiffusion, image: Image.Image, precision: str = "full"
) -> Float[Tensor, "1 z h w"]:
    """Return an image's latents, with which any number of calls of `image_to_image` may begin."""
    with sampling_mode(model, precision):
        return encode(model, to_tensor(image).to(model.device))


@torch.no_grad()
def image_to_image(
    model: LatentDiffusion,
    image: Image.Image | Float[Tensor, "1 z h w"],
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    negative_prompt: str = "",
    precision: str = "full",
    verbose: bool = False,
) -> list[Image.Image]:
    """Return a picture for each prompt that is as the image in its layout.

    Args:
        image: of the recipe's size, or what `encoded` made of it in this precision.
        recipe: its `strength` is the share of the steps that are taken: 1 ignores the image.

    Raises:
        UserError: a size, sampler, strength or number of steps that the model cannot do.
    """
    from ldm.models.diffusion.inpainting import all_hidden

    # Refuse a size that the UNet cannot halve, before anything is computed.
    check_size(model, recipe.height, recipe.width)
    known = image if isinstance(image, Tensor) else encoded(model, image, precision)
    with sampling_mode(model, precision):
        # The image is the beginning of each picture.
        x0 = known.expand(len(prompts), -1, -1, -1)
        # A model that inpaints reads that all of the image may change.
        hidden = all_hidden(model, len(prompts), recipe.height, recipe.width)
        latents = redraw(model, x0, prompts, seeds, recipe, negative_prompt, hidden, verbose)
        return pictures_of(model, latents)


def redraw(
    model: LatentDiffusion,
    x0: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    negative_prompt: str = "",
    beside: Beside | None = None,
    verbose: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """Return latents that begin as x0 with noise, and are drawn to the end.

    Args:
        beside: what the UNet reads beside the noisy latent and the text.
        known: where it is 1, the result follows x0.
    """
    from ldm.models.diffusion.sampler_names import make_sampler

    check_draws(model)
    # Refuse what this model cannot do before anything is computed.
    sampler = make_sampler(model, recipe.sampler, recipe.schedule, recipe.thresholding)
    strength = 1.0 if recipe.strength is None else recipe.strength
    steps = steps_of(strength, recipe.steps)
    sampler.make_schedule(recipe.steps, ddim_eta=recipe.eta, verbose=False)

    # Read the texts. Guidance also needs what it leads away from, and may need another model.
    guide = guide_of(model, recipe)
    texts = read_prompts(model, prompts, negative_prompt, recipe, guide).beside(beside)

    # Noise hides the details. The first step that is taken decides how much: with all of the steps
    # there is nothing but noise.
    random = SampleRandom(seeds, model.device)
    noise = random.randn(x0.shape)
    first = torch.full((len(x0),), steps - 1, device=model.device)
    x = noise if strength == 1.0 else sampler.stochastic_encode(x0, first, noise=noise)

    # The rest of the steps draws new details, which fit the text.
    return sampler.decode(
        x,
        texts.cond,
        steps,
        unconditional_guidance_scale=recipe.scale,
        unconditional_conditioning=texts.uncond,
        random=random,
        verbose=verbose,
        guidance=texts.guidance,
        mask=known,
        x0=None if known is None else x0,
    )


def pictures_of(model: LatentDiffusion, latents: Tensor) -> list[Image.Image]:
    """Return decoded pictures; raise a `UserError` instead of drawing what is no number."""
    images = decode(model, latents)
    # Such values would be drawn as black, which looks like a result.
    if not torch.isfinite(images).all():
        raise UserError(
            "the model made values that are no numbers instead of a picture: sample in full "
            "precision, or with other weights"
        )
    return to_pil(images)
