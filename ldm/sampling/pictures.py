"""Pictures and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.errors import UserError
from ldm.files import write_atomically


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """8-bit pictures of images in [-1, 1]; values are cut, then truncated as the reference's are."""
    pixels = (255 * ((images.float() + 1) / 2).clamp(0, 1)).to(torch.uint8)
    return [Image.fromarray(array) for array in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with texts as its metadata, by key; never over another file."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)  # iTXt, unless Latin-1 has all its letters
    if path.exists():
        raise UserError(f"{path}: is there already, and is not overwritten")
    write_atomically(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))


def next_number(folder: Path, pattern: str = "*") -> int:
    """The number after the highest that a file of the folder has in its name."""
    numbers = [int(digits) for p in folder.glob(pattern) if (digits := "".join(filter(str.isdigit, p.stem)))]
    return max(numbers, default=-1) + 1


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The pictures in rows, with small gaps."""
    gap, (width, height) = 2, images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
