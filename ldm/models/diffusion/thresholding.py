"""Thresholding: keep predicted clean images in the range that images have (Imagen, 2205.11487).

Guidance pushes the predicted image out of [-1, 1], in every step a little further. The paper
(section 2.3) cuts it off (static), or shrinks it until all but a few pixels fit (dynamic).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.errors import UserError

NAMES = ("none", "static", "dynamic")
PERCENTILE = 0.995  # of dynamic thresholding, as in diffusers; the paper does not say which


@dataclass(frozen=True)
class Threshold:
    """Bring clean images into [-1, 1].

    Args:
        percentile: of the absolute pixel values of an image, from 0 to 1. An image whose percentile
            is above 1 is cut off there, then divided by it. None cuts off at 1.
    """

    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise UserError(
                f"thresholding: expected a percentile from 0 to 1, got {self.percentile}"
            )

    def __call__(self, start: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return clean images in [-1, 1], each a function of itself alone."""
        if self.percentile is None:
            return start.clamp(-1, 1)
        # One image at a time: torch limits how much it sorts at once.
        sizes = [image.float().abs().flatten().quantile(self.percentile) for image in start]
        size = torch.stack(sizes).clamp(min=1).to(start).view(-1, 1, 1, 1)
        # Cut off beyond that size, and shrink what is left. Images that fit stay as they are.
        return start.clamp(-size, size) / size


def threshold_of(name: str | None) -> Threshold | None:
    """Return what a name says: `static`, `dynamic`, `dynamic:0.99` with a percentile, or `none`.

    Raises:
        UserError: an unknown name, or a percentile that is none.
    """
    # A percentile stands behind a colon, and belongs to dynamic thresholding alone.
    kind, _, number = (name or "none").partition(":")
    try:
        percentile = float(number) if number else PERCENTILE
    except ValueError:
        kind = ""
    if kind not in NAMES or (number and kind != "dynamic"):
        accepted = f"{', '.join(NAMES)}, dynamic:0.99"
        raise UserError(f"thresholding: unknown '{name}'; accepted: {accepted}")
    if kind == "none":
        return None
    return Threshold(percentile if kind == "dynamic" else None)
