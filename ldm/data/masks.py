"""Masks beside images: where the loss counts, and how much."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ldm.data.finding import MASK, image_files, is_mask, list_images
from ldm.data.reading import load_image
from ldm.errors import UserError


def find_masks(root: str | Path) -> dict[Path, Path]:
    """Return the mask of each image under `root` that has one beside it.

    Raises:
        UserError: there is none, or one without an image, or two for one image.
    """
    images: dict[Path, list[Path]] = {}
    for image in list_images(root):
        images.setdefault(image.with_suffix(""), []).append(image)
    masks: dict[Path, Path] = {}
    for mask in filter(is_mask, image_files(root)):
        name = mask.with_suffix("").with_suffix("")
        if name not in images:
            raise UserError(
                f"{mask}: a mask without its image, {name.name}.jpg or the like, beside it"
            )
        for image in images[name]:
            if image in masks:
                raise UserError(
                    f"{mask}: {image.name} has another mask, {masks[image].name}: remove one"
                )
            masks[image] = mask
    if not masks:
        raise UserError(
            f"{root}: masks: true, but no mask in it; that of 01.jpg is 01{MASK}.png beside it"
        )
    return masks


def load_mask(path: Path, image: Path, size: tuple[int, int]) -> Image.Image:
    """Return the mask of `image`, which has this size: 8-bit grey, 255 where it counts;
    transparency counts nothing.

    Raises:
        UserError: the file does not decode, has another size, or nothing in it counts.
    """
    mask = load_image(path, background="black").convert("L")
    if mask.size != size:
        raise UserError(
            f"{path}: is {mask.width}x{mask.height}, its image {image.name} "
            f"{size[0]}x{size[1]} pixels"
        )
    check_mask(mask, path)
    return mask


def check_mask(mask: Image.Image, path: Path, part: str = "") -> None:
    """Raise a `UserError` if the mask, or what is left of it, is all black."""
    if mask.getbbox() is None:
        raise UserError(f"{path}: this mask is all black{part}; paint white what counts")
