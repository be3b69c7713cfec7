"""Inpainting models: their UNet reads a mask and a masked image beside the noisy latent.

Its input has 9 channels for latents of 4: the noisy latent, the mask (1 where it paints), and the
latent of the image whose painted part is grey (Rombach et al., 2112.10752, section 4.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.errors import ParameterError, UserError
from ldm.models.diffusion.conditioning import Beside
from ldm.models.diffusion.interface import CompVisInterface, Images
from ldm.modules.losses.batch import Batch
from ldm.rng import SampleRandom, derive_seed, generator

Masks = Float[Tensor, "b 1 height width"]
Box = tuple[int, int, int, int]
MOST_SHAPES = 3


def inpaints(model: CompVisInterface) -> bool:
    """Return whether a model reads a mask and a masked image beside the noisy latent."""
    return model.model.conditioning_key == "hybrid"


def masked_channels(
    model: CompVisInterface, images: Images, masks: Masks, noise: Tensor | None = None
) -> Float[Tensor, "b _ h w"]:
    """Return what an inpainting model reads beside the noisy latent: mask, then masked latent.

    Args:
        images: in [-1, 1].
        masks: 1 where the model paints, 0 where it keeps the image.
        noise: of the posterior's sample; without it the posterior's mode is taken.

    Raises:
        UserError: the UNet has another number of input channels.
    """
    # A wrong number of channels would fail deep inside the UNet, without a word on the cause.
    expected = 2 * model.latent_channels + 1
    found = model.model.diffusion_model.in_channels
    if found != expected:
        raise UserError(
            f"this model reads {found} channels, and one that inpaints {expected}: the latent, "
            "the mask and the masked image's latent"
        )
    # What is painted is hidden from the model: in [-1, 1], 0 is grey.
    posterior = model.encode_first_stage(images * (masks < 0.5))
    z = posterior.mode() if noise is None else posterior
    latents = model.get_first_stage_encoding(z, noise)
    # The nearest pixel, as in the published training: a place is painted or it is not.
    small = F.interpolate(masks.to(latents), latents.shape[2:])
    return torch.cat([small, latents], dim=1)


def all_hidden(model: CompVisInterface, count: int, height: int, width: int) -> Beside | None:
    """Return `masked_channels` of pictures (pixels) of which all is painted: text to image.

    None if the model reads text alone.
    """
    if not inpaints(model):
        return None
    # One row is encoded, and stands for all pictures: they hide the same.
    grey = torch.zeros(1, 3, height, width, device=model.device)
    channels = masked_channels(model, grey, torch.ones_like(grey[:, :1]))
    return {"c_concat": channels.expand(count, -1, -1, -1)}


@dataclass(frozen=True)
class RandomMasks:
    """The masks of a training step: rectangles, ellipses and strokes, or all of the image.

    Args:
        everything: share of the masks that cover all of the image, so that the model can also draw
            from a text alone (0.25 in the training of Stable Diffusion's inpainting model).
    """

    everything: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.everything <= 1:
            problem = f"expected a share from 0 to 1, got {self.everything}"
            raise ParameterError("mask_everything", problem)

    def draw(
        self, seeds: Sequence[int] | Tensor | None, count: int, height: int, width: int
    ) -> Masks:
        """Return a mask for each example, as a function of its seed.

        Without seeds, torch's global generator draws.
        """
        masks = []
        for number in range(count):
            own = None if seeds is None else generator("mask", int(seeds[number]))
            masks.append(self._one(height, width, own))
        return torch.stack(masks)

    def _one(
        self, height: int, width: int, draws: torch.Generator | None
    ) -> Float[Tensor, "1 h w"]:
        # The first draw decides on the kind of mask.
        if float(torch.rand(1, generator=draws)) < self.everything:
            return torch.ones(1, height, width)
        mask = Image.new("L", (width, height))
        canvas = ImageDraw.Draw(mask)
        # Users paint a few spots of any form, so the masks are such spots.
        for _ in range(1 + _integer(MOST_SHAPES, draws)):
            shape = SHAPES[_integer(len(SHAPES), draws)]
            shape(canvas, _box(width, height, draws), draws)
        # Pillow's bytes, one a pixel: 255 is painted.
        pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8)
        return (pixels.view(1, height, width) > 0).float()


def training_channels(model: CompVisInterface, masks: RandomMasks, batch: Batch) -> Beside | None:
    """Return `masked_channels` of a batch under random masks; None if the model reads text alone.

    Raises:
        UserError: the batch has cached latents, of which no part of an image can be masked.
    """
    if not inpaints(model):
        return None
    images = batch.images
    if images is None:
        raise UserError(
            "an inpainting model encodes each image under its own mask: it trains on images, not "
            "on cached latents; leave latent_cache out"
        )
    height, width = images.shape[2:]
    # Subject and prior each have seeds of their own, or none.
    drawn = [masks.draw(part.seeds, len(part), height, width) for part in batch.parts]
    hidden = torch.cat(drawn).to(images)
    noise = [_posterior_noise(model, part.seeds, len(part), images) for part in batch.parts]
    return {"c_concat": masked_channels(model, images, hidden, torch.cat(noise))}


def _posterior_noise(
    model: CompVisInterface, seeds: Sequence[int] | Tensor | None, count: int, images: Tensor
) -> Tensor:
    """Draw the noise of the masked images' posteriors, as a function of the examples' seeds."""
    # Another stream than that of the whole image's noise: the two must not be the same.
    own = None if seeds is None else [derive_seed("masked image", int(seed)) for seed in seeds]
    height, width = (side // model.downsampling for side in images.shape[2:])
    return SampleRandom(own, images.device).randn((count, model.latent_channels, height, width))


# The shapes of masks


def _integer(below: int, draws: torch.Generator | None) -> int:
    return int(torch.randint(below, (1,), generator=draws))


def _box(width: int, height: int, draws: torch.Generator | None) -> Box:
    """Return a part of an image, an eighth to three quarters of each side: left, top, right, lower.

    Right and lower are the last pixels, as Pillow counts.
    """
    sides = []
    for side in (width, height):
        # Large enough to matter in the latent, small enough to leave a surrounding to fit to.
        least = max(1, side // 8)
        sides.append(least + _integer(max(1, side * 3 // 4 - least + 1), draws))
    left = _integer(width - sides[0] + 1, draws)
    top = _integer(height - sides[1] + 1, draws)
    return left, top, left + sides[0] - 1, top + sides[1] - 1


def _rectangle(canvas: ImageDraw.ImageDraw, box: Box, draws: torch.Generator | None) -> None:
    canvas.rectangle(box, fill=255)


def _ellipse(canvas: ImageDraw.ImageDraw, box: Box, draws: torch.Generator | None) -> None:
    canvas.ellipse(box, fill=255)


def _stroke(canvas: ImageDraw.ImageDraw, box: Box, draws: torch.Generator | None) -> None:
    """Draw a line through a few points of a box, as of a brush."""
    left, top, right, lower = box
    points = [
        (left + _integer(right - left + 1, draws), top + _integer(lower - top + 1, draws))
        for _ in range(3 + _integer(4, draws))
    ]
    least = max(1, min(canvas.im.size) // 16)
    thickness = least + _integer(3 * least, draws)
    canvas.line(points, fill=255, width=thickness, joint="curve")


SHAPES: tuple[Callable[[ImageDraw.ImageDraw, Box, torch.Generator | None], None], ...] = (
    _rectangle,
    _ellipse,
    _stroke,
)
