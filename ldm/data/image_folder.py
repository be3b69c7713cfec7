"""Images from a folder: found, decoded to RGB, cut to a square size, scaled to [-1, 1]."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ldm.errors import ParameterError, UserError

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
MASK = ".mask"  # a mask is named after its image: 01.mask.png beside 01.jpg

Box = tuple[int, int, int, int]  # left, top, right, lower


def list_images(root: str | Path) -> list[Path]:
    """The image files under `root`, told by their endings, sorted, without masks; none if there is no such folder."""
    return [path for path in _image_files(root) if not is_mask(path)]


def is_mask(path: Path) -> bool:
    """Whether an image file is named as a mask: never taken for an image, whether masks are used or not."""
    return Path(path.stem).suffix.lower() == MASK


def find_masks(root: str | Path) -> dict[Path, Path]:
    """The mask of each image under `root` that has one beside it.

    Raises:
        UserError: there is none, or one without an image, or two for one image.
    """
    images: dict[Path, list[Path]] = {}
    for image in list_images(root):
        images.setdefault(image.with_suffix(""), []).append(image)
    masks: dict[Path, Path] = {}
    for mask in filter(is_mask, _image_files(root)):
        if (name := mask.with_suffix("").with_suffix("")) not in images:
            raise UserError(f"{mask}: a mask without its image, {name.name}.jpg or the like, beside it")
        for image in images[name]:
            if image in masks:
                raise UserError(f"{mask}: {image.name} has another mask, {masks[image].name}: remove one")
            masks[image] = mask
    if not masks:
        raise UserError(f"{root}: masks: true, but no mask in it; that of 01.jpg is 01{MASK}.png beside it")
    return masks


def _image_files(root: str | Path) -> list[Path]:
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


def load_image(path: str | Path, background: str = "white") -> Image.Image:
    """An image file as 8-bit RGB, turned as its EXIF data says, transparency on `background`.

    Raises:
        UserError: the file does not decode.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except Exception as error:  # Pillow's readers raise whatever their parsers do
        reason = "no image format that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: cannot read this image ({reason}); replace or remove it") from error


def load_mask(path: Path, image: Path, size: tuple[int, int]) -> Image.Image:
    """The mask of `image`, which has this size: 8-bit grey, 255 where it counts; transparency counts nothing.

    Raises:
        UserError: the file does not decode, has another size, or nothing in it counts.
    """
    mask = load_image(path, background="black").convert("L")
    if mask.size != size:
        raise UserError(f"{path}: is {mask.width}x{mask.height}, its image {image.name} {size[0]}x{size[1]} pixels")
    check_mask(mask, path)
    return mask


def check_mask(mask: Image.Image, path: Path, part: str = "") -> None:
    """Raise a `UserError` if the mask, or what is left of it, is all black."""
    if mask.getbbox() is None:
        raise UserError(f"{path}: this mask is all black{part}; paint white what counts")


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        values = values >> 8 if image.mode.startswith("I;16") or values.max() > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def check_resize(size: int | None, mode: str, interpolation: str) -> None:
    """Raise a `UserError` for what `resize` cannot do."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ParameterError("size", f"expected a positive number of pixels, got {size!r}")
    if mode not in RESIZE_MODES:
        raise ParameterError("resize", f"expected one of {', '.join(RESIZE_MODES)}, got {mode!r}")
    if interpolation not in INTERPOLATIONS:
        raise ParameterError("interpolation", f"expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")


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
    return _fit(image, _square(image.size, mode, generator), size, interpolation)


def _square(size: tuple[int, int], mode: str, generator: torch.Generator | None) -> Box | None:
    """The part of an image of this size that is kept; None for all of it."""
    if mode == "squash":
        return None
    (width, height), (side, longer) = size, sorted(size)
    room = longer - side
    if mode == "random_crop" and room:
        offset = int(torch.randint(room + 1, (1,), generator=generator))
    else:
        offset = room // 2
    left, top = (offset, 0) if width > height else (0, offset)
    return left, top, left + side, top + side


def _fit(image: Image.Image, box: Box | None, size: int | None, interpolation: str) -> Image.Image:
    image = image if box is None else image.crop(box)
    return image if size is None else image.resize((size, size), INTERPOLATIONS[interpolation])


def to_array(image: Image.Image | np.ndarray) -> Float[np.ndarray, "h w c"]:
    """8-bit pixels as float32 in [-1, 1]."""
    return (np.asarray(image) / 127.5 - 1).astype(np.float32)


class ImageFolderDataset(Dataset):
    """The images under `data_root`, for training an autoencoder: `{"image": (h, w, c) float32 in [-1, 1]}`.

    With `masks` (see `find_masks`) an example has a `mask`, too: (h, w) float32 in [0, 1], cut and mirrored with its
    image, all ones for an image without one. Up to `cache_images` images are kept decoded and resized in memory, unless
    they are cropped anew each time.

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
        masks: bool = False,
    ):
        check_resize(size, resize, interpolation)
        if not 0 <= flip_p <= 1:
            raise ParameterError("flip_p", f"expected a probability from 0 to 1, got {flip_p!r}")
        self.paths = find_images(data_root)
        self.masks = find_masks(data_root) if masks else None
        if self.masks:
            log.info("%s: masks for %d of %d images", data_root, len(self.masks), len(self.paths))
        self.size, self.resize, self.interpolation, self.flip_p = size, resize, interpolation, flip_p
        # Without a size the images keep their own, which may be that of a camera: too much to keep.
        self.cache_images = 0 if size is None or resize == "random_crop" else cache_images
        self._cache: dict[Path, np.ndarray] = {}
        # Of each variant, once they are encoded: "moments" and, where masks are used, its "mask".
        self.latents: Mapping[tuple[Path, bool], Mapping[str, Any]] | None = None

    @property
    def n_images(self) -> int:
        """How many image files there are."""
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Whether the cache holds all images."""
        return self.latents is not None or self.n_images <= self.cache_images

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(range(len(self))[index])

    def without_augmentation(self) -> ImageFolderDataset:
        """The same images as they are: not mirrored, and cropped in the middle where they were cropped anywhere."""
        plain = copy.copy(self)
        plain.flip_p, plain.latents = 0.0, None
        plain.resize = "center_crop" if self.resize == "random_crop" else self.resize
        return plain

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Item `index`, augmented with numbers from `generator` (None: torch's global one).

        With `latents` it has "moments" (2 z, h, w) instead of an "image".
        """
        return self.augmented(self.paths[index % self.n_images], generator)

    def augmented(self, path: Path, generator: torch.Generator | None = None) -> dict[str, Any]:
        """The `image` at `path`, and its `mask` where masks are used, resized and perhaps mirrored."""
        pixels = None if self.latents else self._pixels(path, generator)
        mirrored = bool(torch.rand(1, generator=generator) < self.flip_p)
        if pixels is None:
            assert self.latents is not None
            return {**self.latents[path, mirrored]}
        return self._entries(pixels, mirrored)

    def variants(self) -> Iterator[tuple[tuple[Path, bool], dict[str, np.ndarray]]]:
        """All that `augmented` can give without a random crop, by path and whether it is mirrored."""
        assert self.resize != "random_crop", "random crops are too many"
        for path in self.paths:
            for mirrored in (False, True):
                if (self.flip_p > 0) if mirrored else (self.flip_p < 1):
                    yield (path, mirrored), self._entries(self._pixels(path, None), mirrored)

    def _entries(self, pixels: UInt8[np.ndarray, "h w c"], mirrored: bool) -> dict[str, np.ndarray]:
        pixels = pixels[:, ::-1] if mirrored else pixels
        entries = {"image": to_array(pixels[..., :3])}
        if self.masks is not None:
            entries["mask"] = (pixels[..., 3] / 255).astype(np.float32)
        return entries

    def _pixels(self, path: Path, generator: torch.Generator | None) -> UInt8[np.ndarray, "h w c"]:
        """An image's three channels, resized, and its mask as a fourth."""
        if path in self._cache:
            return self._cache[path]
        image = load_image(path)
        box = _square(image.size, self.resize, generator)
        pixels = np.asarray(_fit(image, box, self.size, self.interpolation))
        if self.masks is not None:
            pixels = np.dstack([pixels, self._mask(path, image.size, box)])
        if len(self._cache) < self.cache_images:
            self._cache[path] = pixels
        return pixels

    def _mask(self, path: Path, size: tuple[int, int], box: Box | None) -> UInt8[np.ndarray, "h w"]:
        """The mask of the image at `path`, resized as the image is."""
        assert self.masks is not None
        if path not in self.masks:
            return np.asarray(_fit(Image.new("L", size, "white"), box, self.size, "bilinear"))
        mask = _fit(load_mask(self.masks[path], path, size), box, self.size, "bilinear")
        if self.resize != "random_crop":  # of which some may miss what counts: they have no weight
            check_mask(mask, self.masks[path], " after cropping and resizing")
        return np.asarray(mask)

    def check(self) -> None:
        """Decode every image once.

        Raises:
            UserError: an image does not decode, or its mask cannot be used.
        """
        for path in self.paths:
            if self.cache_images:
                self._pixels(path, None)
                continue
            image = load_image(path)
            if self.masks and path in self.masks:
                load_mask(self.masks[path], path, image.size)
