"""The images of a folder as a dataset, for training an autoencoder."""

from __future__ import annotations

import copy
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.checked import CheckedImages, hash_of
from ldm.data.finding import find_images
from ldm.data.masks import check_mask, find_masks, load_mask
from ldm.data.reading import load_image
from ldm.data.resizing import Box, check_resize, choose_box, fit, to_array
from ldm.errors import ParameterError, UserError

log = logging.getLogger(__name__)

LONG_CHECK = 200  # images whose check shows a progress bar, and is remembered
MOST_THREADS = 16  # that decode images


class ImageFolderDataset(Dataset):
    """The images under `data_root`: `{"image": (h, w, c) float32 in [-1, 1]}`.

    With `masks` (see `find_masks`) an example has a `mask`, too: (h, w) float32 in [0, 1], cut and
    mirrored with its image, all ones for an image without one. Up to `cache_images` images are kept
    decoded and resized in memory, unless they are cropped anew each time.

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
        self.root = Path(data_root).expanduser()
        self.paths = find_images(data_root)
        self.masks = find_masks(data_root) if masks else None
        if self.masks:
            log.info("%s: masks for %d of %d images", data_root, len(self.masks), len(self.paths))
        self.size, self.resize, self.interpolation, self.flip_p = (
            size,
            resize,
            interpolation,
            flip_p,
        )
        # Without a size the images keep their own, which may be that of a camera: too much to keep.
        self.cache_images = 0 if size is None or resize == "random_crop" else cache_images
        self._cache: dict[Path, np.ndarray] = {}
        self._checked: dict[Path, str] = {}
        # Of each variant, once they are encoded: "moments" and, where masks are used, its "mask".
        self.latents: Mapping[tuple[Path, bool], Mapping[str, Any]] | None = None

    @property
    def n_images(self) -> int:
        """Count the image files."""
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Tell whether the cache holds all images."""
        return self.latents is not None or self.n_images <= self.cache_images

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(range(len(self))[index])

    def without_augmentation(self) -> ImageFolderDataset:
        """Return the same images without mirroring, cropped in the middle instead of anywhere."""
        plain = copy.copy(self)
        plain.flip_p, plain.latents = 0.0, None
        plain.resize = "center_crop" if self.resize == "random_crop" else self.resize
        return plain

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return item `index`, augmented with numbers from `generator` (None: torch's global one).

        With `latents` it has "moments" (2 z, h, w) instead of an "image".
        """
        return self.augmented(self.paths[index % self.n_images], generator)

    def augmented(self, path: Path, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return the `image` at `path`, and its `mask` where masks are used, resized and perhaps
        mirrored.
        """
        # The crop draws before the mirror: the order of draws is part of what a seed means.
        pixels = None if self.latents else self._pixels(path, generator)
        mirrored = bool(torch.rand(1, generator=generator) < self.flip_p)
        if pixels is None:
            assert self.latents is not None
            return {**self.latents[path, mirrored]}
        return self._entries(pixels, mirrored)

    def variants(self) -> Iterator[tuple[tuple[Path, bool], dict[str, np.ndarray]]]:
        """Yield all that `augmented` can give without a random crop, by path and whether it is
        mirrored.
        """
        assert self.resize != "random_crop", "random crops are too many"
        for path in self.paths:
            for mirrored in (False, True):
                occurs = self.flip_p > 0 if mirrored else self.flip_p < 1
                if occurs:
                    yield (path, mirrored), self._entries(self._pixels(path, None), mirrored)

    def _entries(self, pixels: UInt8[np.ndarray, "h w c"], mirrored: bool) -> dict[str, np.ndarray]:
        pixels = pixels[:, ::-1] if mirrored else pixels
        entries = {"image": to_array(pixels[..., :3])}
        if self.masks is not None:
            entries["mask"] = (pixels[..., 3] / 255).astype(np.float32)
        return entries

    def _pixels(
        self,
        path: Path,
        generator: torch.Generator | None,
        decoded: Image.Image | None = None,
    ) -> UInt8[np.ndarray, "h w c"]:
        """Return an image's three channels, resized, and its mask as a fourth."""
        if path in self._cache:
            return self._cache[path]
        image = decoded or load_image(path)
        box = choose_box(image.size, self.resize, generator)
        pixels = np.asarray(fit(image, box, self.size, self.interpolation))
        if self.masks is not None:
            pixels = np.dstack([pixels, self._mask(path, image.size, box)])
        if len(self._cache) < self.cache_images:
            self._cache[path] = pixels
        return pixels

    def _mask(self, path: Path, size: tuple[int, int], box: Box | None) -> UInt8[np.ndarray, "h w"]:
        """Return the mask of the image at `path`, resized as the image is."""
        assert self.masks is not None
        if path not in self.masks:
            return np.asarray(fit(Image.new("L", size, "white"), box, self.size, "bilinear"))
        mask = fit(load_mask(self.masks[path], path, size), box, self.size, "bilinear")
        if self.resize != "random_crop":  # of which some may miss what counts: they have no weight
            check_mask(mask, self.masks[path], " after cropping and resizing")
        return np.asarray(mask)

    def check(self) -> dict[Path, str]:
        """Decode every image, and return a hash of the pixels of each; once is enough for an image.

        Of a folder of many, it is remembered which ones have been decoded before.

        Raises:
            UserError: an image does not decode, or its mask cannot be used.
        """
        new = [path for path in self.paths if path not in self._checked]
        remembered = CheckedImages(self.root) if len(new) >= LONG_CHECK else None
        check_one = functools.partial(self._check_one, remembered=remembered)
        threads = min(MOST_THREADS, os.cpu_count() or 1)
        # Threads help because Pillow decodes without holding Python's lock. Each of them changes
        # the filters of warnings; the outer block puts back those from before all of them.
        with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
            found = tqdm(
                pool.map(check_one, new),
                "checking images",
                len(new),
                disable=remembered is None,
            )
            try:
                self._checked.update(zip(new, found))
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                if remembered:
                    remembered.save()
        return self._checked

    def _check_one(self, path: Path, remembered: CheckedImages | None) -> str:
        # What a mask may be depends on the crop, too: it is looked at each time.
        if remembered is None or self.masks is not None:
            return self._decode_one(path)
        try:
            content = hash_of(path.read_bytes())
        except OSError:  # which decoding explains
            return self._decode_one(path)
        known = remembered.pixels(content)
        if known is not None:
            return known
        pixels = self._decode_one(path)
        remembered.add(content, pixels)
        return pixels

    def _decode_one(self, path: Path) -> str:
        image = load_image(path)
        if self.cache_images and (self.masks is not None or len(self._cache) < self.cache_images):
            self._pixels(path, None, image)
        elif self.masks and path in self.masks:
            load_mask(self.masks[path], path, image.size)
        return hash_of(np.asarray(image).data)
