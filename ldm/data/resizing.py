"""Cut and resize images, mostly to a square, and turn their pixels into numbers."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from ldm.errors import ParameterError

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZE_MODES = ("squash", "center_crop", "random_crop")

Box = tuple[int, int, int, int]  # left, top, right, lower


def check_resize(size: int | None, mode: str, interpolation: str) -> None:
    """Raise a `UserError` for what `resize` cannot do."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ParameterError("size", f"expected a positive number of pixels, got {size!r}")
    if mode not in RESIZE_MODES:
        raise ParameterError("resize", f"expected one of {', '.join(RESIZE_MODES)}, got {mode!r}")
    if interpolation not in INTERPOLATIONS:
        raise ParameterError(
            "interpolation", f"expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
        )


def resize(
    image: Image.Image,
    size: int | None,
    mode: str = "squash",
    interpolation: str = "bicubic",
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Return `image` at `size` x `size`: all of it whatever its aspect ratio, or its central or a
    random square.

    `size=None` crops without resizing. A random crop draws from `generator` only if there is a
    choice.
    """
    check_resize(size, mode, interpolation)
    return fit(image, choose_box(image.size, mode, generator), size, interpolation)


def choose_box(size: tuple[int, int], mode: str, generator: torch.Generator | None) -> Box | None:
    """Choose the part of an image of this size that is kept; None for all of it."""
    if mode == "squash":
        return None
    width, height = size
    side = min(size)
    room = max(size) - side
    offset = room // 2
    if mode == "random_crop" and room:
        offset = int(torch.randint(room + 1, (1,), generator=generator))
    left, top = (offset, 0) if width > height else (0, offset)
    return left, top, left + side, top + side


def fit(
    image: Image.Image,
    box: Box | None,
    size: int | tuple[int, int] | None,
    interpolation: str = "bicubic",
) -> Image.Image:
    """Cut `box` out of `image`, and resize it to `size`; None leaves out either.

    Args:
        size: width and height, or the side of a square.
    """
    image = image if box is None else image.crop(box)
    if size is None:
        return image
    sides = (size, size) if isinstance(size, int) else size
    # Resizing to the same size would leave the pixels as they are, and so is left out.
    return image if image.size == sides else image.resize(sides, INTERPOLATIONS[interpolation])


def to_array(image: Image.Image | np.ndarray) -> Float[np.ndarray, "h w c"]:
    """Return 8-bit pixels as float32 in [-1, 1]."""
    return (np.asarray(image) / 127.5 - 1).astype(np.float32)
