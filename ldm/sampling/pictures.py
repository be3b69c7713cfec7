"""Pictures and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.sampling.metadata import png_info


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Return 8-bit pictures of images in [-1, 1].

    Values are cut to that range, then truncated as the reference's are.
    """
    # In float32: half precision cannot hold all of the 256 values.
    pixels = (255 * ((images.float() + 1) / 2).clamp(0, 1)).to(torch.uint8)
    arrays = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with texts as its metadata, by key; never over another file."""
    try:
        _write_png(image, path, texts)
    except FileExistsError as error:
        raise UserError(f"{path}: is there already, and is not overwritten") from error


def save_numbered(
    image: Image.Image, folder: Path, texts: Mapping[str, str] | None = None, prefix: str = ""
) -> Path:
    """Write a PNG under the folder's next free number, as 00012.png, and return its path.

    With a prefix, such as `grid-`, the number has four digits.
    """
    digits = 4 if prefix else 5
    while True:
        path = folder / f"{prefix}{next_number(folder, prefix):0{digits}}.png"
        try:
            _write_png(image, path, texts)
        except FileExistsError:
            continue  # another command writes into the folder, too
        return path


def _write_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None) -> None:
    info = png_info(texts or {})
    # A picture may have cost much time: no other one replaces it. A run that is cut short leaves no
    # damaged picture under this name.
    write_atomically(
        path, lambda temporary: image.save(temporary, "PNG", pnginfo=info), may_replace=False
    )


def taken_numbers(folder: Path, prefix: str = "") -> set[int]:
    """Return the numbers that are names of files in the folder.

    A name ends at its first dot: the caption 00012.txt and the mask 00012.mask.png have the number
    12, too, so that no new picture comes beside them. It may begin with a prefix, as grid-0003.png.
    """
    if not folder.is_dir():
        return set()
    names = [path.name.partition(".")[0] for path in folder.iterdir()]
    numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return {int(number) for number in numbers if number.isdecimal()}


def next_number(folder: Path, prefix: str = "") -> int:
    """Return the number after the highest of `taken_numbers`."""
    return max(taken_numbers(folder, prefix), default=-1) + 1


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return the pictures in rows, with small gaps."""
    gap = 2
    width, height = images[0].size
    # Few pictures leave no empty columns; the last row may be shorter than the others.
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
