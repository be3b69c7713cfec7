"""Images from a folder: found, decoded to RGB, cut to a square size, scaled to [-1, 1]."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ldm.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
UNREADABLE = {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raw", ".svg"}
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZE_MODES = ("squash", "center_crop", "random_crop")


def list_images(root: str | Path) -> list[Path]:
    """The image files under `root`, told by their endings, sorted; none if there is no such folder."""
    return [path for path in _files(Path(root).expanduser()) if path.suffix.lower() in SUFFIXES]


def find_images(root: str | Path) -> list[Path]:
    """The image files under `root`, sorted; hidden files and folders are skipped.

    Raises:
        UserError: `root` is missing, is no folder or has no image in it.
    """
    root = Path(root).expanduser()
    wanted = f"expected a folder with images ({' '.join(SUFFIXES)})"
    if not root.exists():
        raise UserError(f"{root}: no such folder; {wanted}")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; {wanted}")
    suffixes = {path.suffix.lower() for path in _files(root)}
    paths = list_images(root)
    if not paths:
        found = f", found only {' '.join(sorted(suffixes - {''})) or 'other files'}" if suffixes else ""
        raise UserError(f"{root}: no image in it{found}; {wanted}")
    if skipped := suffixes & UNREADABLE:
        log.warning("%s: files ending in %s are skipped; save them as .png or .jpg", root, " ".join(sorted(skipped)))
    return paths


def _files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def load_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, turned as its EXIF data says, transparency on white.

    Raises:
        UserError: the file does not decode.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise whatever their parsers do
        reason = "no image format that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: cannot read this image ({reason}); replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        values = values >> 8 if image.mode.startswith("I;16") or values.max() > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_resize(size: int | None, mode: str, interpolation: str) -> None:
    """Raise a `UserError` for what `resize` cannot do."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"size: expected a positive number of pixels, got {size!r}")
    if mode not in RESIZE_MODES:
        raise UserError(f"resize: expected one of {', '.join(RESIZE_MODES)}, got {mode!r}")
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")


def resize(
    image: Image.Image,
    size: int | None,
    mode: str = "squash",
    interpolation: str = "bicubic",
    generator: torch.Generator | None = None,
) -> Image.Image:
    """`image` at `size` x `size`: all of it whatever its aspect ratio, or its central or a random square.

    `size=None` crops without resizing. A random crop draws from `generator` only if there is a choice.
    """
    check_resize(size, mode, interpolation)
    if mode != "squash":
        image = _crop_square(image, mode == "random_crop", generator)
    return image if size is None else image.resize((size, size), INTERPOLATIONS[interpolation])


def _crop_square(image: Image.Image, random: bool, generator: torch.Generator | None) -> Image.Image:
    side, longer = sorted(image.size)
    room = longer - side
    if random and room:
        offset = int(torch.randint(room + 1, (1,), generator=generator))
    else:
        offset = room // 2
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    return image.crop((left, top, left + side, top + side))


def to_array(image: Image.Image | np.ndarray) -> Float[np.ndarray, "h w c"]:
    """8-bit pixels as float32 in [-1, 1]."""
    return (np.asarray(image) / 127.5 - 1).astype(np.float32)


class ImageFolderDataset(Dataset):
    """The images under `data_root`, for training an autoencoder: `{"image": (h, w, c) float32 in [-1, 1]}`.

    Up to `cache_images` images are kept decoded and resized in memory, unless they are cropped anew each time.

    Raises:
        UserError: `data_root` has no images, or a parameter is out of its range.
    """

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        resize: str = "center_crop",
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        cache_images: int = 256,
    ):
        check_resize(size, resize, interpolation)
        if not 0 <= flip_p <= 1:
            raise UserError(f"flip_p: expected a probability from 0 to 1, got {flip_p!r}")
        self.paths = find_images(data_root)
        self.size, self.resize, self.interpolation, self.flip_p = size, resize, interpolation, flip_p
        # Without a size the images keep their own, which may be that of a camera: too much to keep.
        self.cache_images = 0 if size is None or resize == "random_crop" else cache_images
        self._cache: dict[Path, np.ndarray] = {}

    @property
    def n_images(self) -> int:
        """How many image files there are."""
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Whether the cache holds all images."""
        return self.n_images <= self.cache_images

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(range(len(self))[index])

    def without_augmentation(self) -> ImageFolderDataset:
        """The same images as they are: not mirrored, and cropped in the middle where they were cropped anywhere."""
        plain = copy.copy(self)
        plain.flip_p = 0.0
        plain.resize = "center_crop" if self.resize == "random_crop" else self.resize
        return plain

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Item `index`, augmented with numbers from `generator` (None: torch's global one)."""
        return {"image": self.augmented(self.paths[index % self.n_images], generator)}

    def augmented(self, path: Path, generator: torch.Generator | None = None) -> Float[np.ndarray, "h w c"]:
        """The image at `path`, resized and perhaps mirrored."""
        pixels = self._pixels(path, generator)
        if torch.rand(1, generator=generator) < self.flip_p:
            pixels = pixels[:, ::-1]
        return to_array(pixels)

    def _pixels(self, path: Path, generator: torch.Generator | None) -> UInt8[np.ndarray, "h w c"]:
        if path in self._cache:
            return self._cache[path]
        pixels = np.asarray(resize(load_image(path), self.size, self.resize, self.interpolation, generator))
        if len(self._cache) < self.cache_images:
            self._cache[path] = pixels
        return pixels

    def check(self) -> None:
        """Decode every image once.

        Raises:
            UserError: an image does not decode.
        """
        for path in self.paths:
            if self.cache_images:
                self._pixels(path, None)
            else:
                load_image(path)
