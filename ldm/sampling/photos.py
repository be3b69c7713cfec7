"""A user's photo and its mask: cut and resized to what a model draws, and put back together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldm.data.masks import load_mask
from ldm.data.reading import load_image
from ldm.data.resizing import Box, fit, to_array
from ldm.errors import UserError

log = logging.getLogger(__name__)

PAINTED = 128  # a mask's grey from which on a pixel is painted


# Reading


LONGEST = 8  # the most that a photo's longer side may be of its shorter one


def read_photo(path: Path) -> Image.Image:
    """Return a photo as RGB, turned as its EXIF data says, what is transparent on white.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    photo = load_image(path)
    with Image.open(path) as file:
        if file.has_transparency_data:
            log.info("%s: its transparent parts are taken as white", path)
    return photo


def read_mask(path: Path, photo: Path, size: tuple[int, int]) -> Image.Image:
    """Return a mask in black and white (white is painted), of a photo of this size.

    Raises:
        UserError: it cannot be read, has another size, or nothing in it is white.
    """
    mask = load_mask(path, photo, size).point(lambda grey: 255 if grey >= PAINTED else 0)
    if mask.getbbox() is None:
        raise UserError(f"{path}: nothing in this mask is white; paint white what is to change")
    return mask


def mask_of_box(box: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Return the mask of a rectangle: left, top, width, height, in a photo of this size.

    Raises:
        UserError: it is not inside.
    """
    # Outside of the photo there is nothing to paint: a box that leaves it is a mistake.
    left, top, width, height = box
    right, lower = left + width, top + height
    if min(left, top) < 0 or min(width, height) < 1 or right > size[0] or lower > size[1]:
        text = ",".join(str(number) for number in box)
        raise UserError(f"--box {text}: is not inside the photo of {size[0]}x{size[1]} pixels")
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, right, lower))
    return mask


# Cutting


def central_box(size: tuple[int, int], wanted: tuple[int, int]) -> Box | None:
    """Return the largest part in the middle of a photo that has the proportions of `wanted`."""
    # As large as fits in; the rest is cut off evenly on both sides.
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    width, height = (min(side, round(want * scale)) for side, want in zip(size, wanted))
    if (width, height) == size:
        return None
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def drawn_size(size: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """Return the size to draw a photo in: its shorter side as the model's, in multiples of `step`.

    Raises:
        UserError: its longer side would be more than a model can draw at once.
    """
    if max(size) > LONGEST * min(size):
        raise UserError(
            f"a photo of {size[0]}x{size[1]} pixels is too long to be drawn with its shorter side "
            f"at {side}: cut it, or give --H and --W"
        )
    scale = side / min(size)
    width, height = (max(step, round(length * scale / step) * step) for length in size)
    return width, height


def region_of(
    mask: Image.Image, padding: int, wanted: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the part of a photo to draw: the mask and its surroundings.

    It has the proportions of `wanted` and at least its size, as far as the photo is that large.

    Args:
        padding: pixels around the mask that the model sees at least.
        wanted: width and height that the model draws.
    """
    # What is painted and its surroundings, from which the model learns what has to fit.
    box = mask.getbbox()
    assert box is not None, "an empty mask"
    around = [box[2] - box[0] + 2 * padding, box[3] - box[1] + 2 * padding]
    # Never smaller than what the model draws: enlarging a part would invent its details.
    scale = max(1.0, around[0] / wanted[0], around[1] / wanted[1])
    sides = [min(full, round(want * scale)) for full, want in zip(mask.size, wanted)]
    # The mask is in the middle, unless a border of the photo is near.
    starts = []
    for axis in (0, 1):
        middle = (box[axis] + box[axis + 2] - sides[axis]) // 2
        starts.append(min(max(0, middle), mask.size[axis] - sides[axis]))
    return starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1]


def region_size(region: Box, wanted: tuple[int, int], step: int) -> tuple[int, int]:
    """Return the size to draw a region in: `wanted`, or as much of it as its proportions allow."""
    sides = region[2] - region[0], region[3] - region[1]
    scale = min(wanted[0] / sides[0], wanted[1] / sides[1])
    width, height = (max(step, round(side * scale / step) * step) for side in sides)
    return width, height


def to_tensor(image: Image.Image) -> Float[Tensor, "1 3 h w"]:
    """Return a picture in [-1, 1]."""
    return torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].contiguous()


def mask_tensor(mask: Image.Image, size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """Return a mask at another size: 1 where any pixel of it is painted."""
    grey = np.array(mask, dtype=np.float32) / 255
    # Shrinking must not lose a thin stroke; growing keeps the borders.
    return F.adaptive_max_pool2d(torch.from_numpy(grey)[None, None], (size[1], size[0]))


# Pasting


def inward_weights(mask: np.ndarray, blur: int) -> np.ndarray:
    """Return how much of what is painted shows, (h, w) in [0, 1]: 0 outside the mask.

    From the mask's border inwards it rises to 1 within `blur` pixels, and in a mask that is thinner
    within as many as there are. At the photo's own border it does not fall.
    """
    # The depth of a pixel inside the mask: how many erosions it outlasts.
    inside = torch.from_numpy(mask > 0).float()[None, None]
    depth, eroded = inside.clone(), inside
    steps = 0
    for _ in range(blur):
        # A pixel stays if all of its neighbours are inside.
        before, eroded = eroded, -F.max_pool2d(-eroded, 3, stride=1, padding=1)
        # At an end: nothing is left, or, in a mask of the whole photo, all is.
        if not eroded.any() or torch.equal(eroded, before):
            break
        depth, steps = depth + eroded, steps + 1
    return (depth / (steps + 1))[0, 0].numpy()


def paste(
    photo: Image.Image, painted: Image.Image, mask: Image.Image, region: Box, blur: int
) -> Image.Image:
    """Return the photo with what was painted of a region; outside the mask not a bit changes.

    Args:
        painted: the region as the model drew it, of any size.
        mask: of the whole photo.
        blur: pixels inside the mask's border over which photo and painting are mixed.
    """
    # Bring the painting to the region's size in the photo.
    size = region[2] - region[0], region[3] - region[1]
    new = np.asarray(fit(painted, None, size), dtype=np.float32)
    # Of the mask in the whole photo, because the region's border may cut it.
    weights = inward_weights(np.asarray(mask), blur)
    weights = weights[region[1] : region[3], region[0] : region[2], None]
    # Mix in the region alone. Where the weight is 0, the photo's own bytes stay.
    pixels = np.array(photo)
    old = pixels[region[1] : region[3], region[0] : region[2]]
    mixed = np.rint(old + weights * (new - old)).astype(np.uint8)
    pixels[region[1] : region[3], region[0] : region[2]] = np.where(weights > 0, mixed, old)
    return Image.fromarray(pixels)
