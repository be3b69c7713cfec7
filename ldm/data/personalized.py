"""The subject's images, or those of its class (`reg=True`), with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.captions import read_captions
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.notices import warn_once
from ldm.data.prompts import captions_from_templates, class_words, without_identifier
from ldm.errors import ParameterError


class PersonalizedBase(ImageFolderDataset):
    """Images with captions: `{"image": (h, w, c) float32 in [-1, 1], "caption": str}`.

    The set "train" holds every image `repeats` times, "val" once. A caption file beside an image
    wins over the templates (see `ldm.data.prompts`) unless `captions` is false. The subject's
    examples also have a "class_caption", which lacks the identifier. `resize=None`
    squashes the image to `size` x `size`, or crops its centre with `center_crop`. With `masks`, of
    images beside the photos (01.mask.png for 01.jpg), an example has a "mask", too: (h, w) float32
    in [0, 1], how much of the loss counts where. With `num_images` only the first so many count, in
    the order of their names.

    Raises:
        UserError: no images, an unusable template or caption file, or a parameter out of its range.
    """

    def __init__(
        self,
        data_root: str | Path | None = None,
        size: int | None = None,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "dog",
        center_crop: bool = False,
        coarse_class_text: str | None = None,
        reg: bool = False,
        identifier: str = "sks",
        templates: str | Sequence[str] | None = None,
        resize: str | None = None,
        captions: bool = True,
        cache_images: int = 256,
        masks: bool = False,
        num_images: int | None = None,
    ):
        if not data_root:
            flag = "--reg_data_root" if reg else "--data_root"
            raise ParameterError(
                "data_root", f"no folder of {'class ' if reg else ''}images; give {flag} FOLDER"
            )
        if set not in ("train", "val"):
            raise ParameterError("set", f"expected train or val, got {set!r}")
        if repeats < 1:
            raise ParameterError("repeats", f"expected at least 1, got {repeats!r}")
        mode = _resize_mode(resize, center_crop)
        super().__init__(data_root, size, mode, interpolation, flip_p, cache_images, masks)
        self.repeats = repeats if set == "train" else 1
        self.templated = captions_from_templates(
            placeholder_token, identifier, templates, coarse_class_text, reg
        )
        # An empty caption is for the prior: it keeps the unconditional model, too.
        self.captioned = beside = read_captions(self.paths, may_be_empty=reg) if captions else {}
        self.class_word, self.templates = str(placeholder_token), templates
        self.identifier, self.reg = identifier, reg
        self.class_words = class_words(placeholder_token, coarse_class_text)
        self._take_first(num_images)
        self.captions = {
            path: [beside[path]] if path in beside else self.templated for path in self.paths
        }
        if not reg:
            _warn_of_subfolders(self.root, self.paths)

    def _take_first(self, count: int | None) -> None:
        if count is None:
            return
        if not 1 <= count <= len(self.paths):
            there = f"expected 1 to {len(self.paths)}, which {self.root} holds"
            raise ParameterError("num_images", f"{there}, got {count!r}")
        self.paths = self.paths[:count]

    @property
    def prompts(self) -> list[str]:
        """Return the distinct captions, in order of appearance."""
        return list(
            dict.fromkeys(caption for captions in self.captions.values() for caption in captions)
        )

    def __len__(self) -> int:
        return self.n_images * self.repeats

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        path = self.paths[index % self.n_images]
        entries = self.augmented(path, generator)
        caption = self._caption(path, generator)
        if self.reg:
            return {**entries, "caption": caption}
        return {**entries, "caption": caption, "class_caption": self._as_class(caption)}

    @property
    def unnamed(self) -> list[str]:
        """Return the captions without the identifier."""
        return [prompt for prompt in self.prompts if self._as_class(prompt) == prompt]

    def _as_class(self, caption: str) -> str:
        return without_identifier(caption, self.identifier, self.class_words)

    def _caption(self, path: Path, generator: torch.Generator | None) -> str:
        captions = self.captions[path]
        if len(captions) == 1:
            return captions[0]
        return captions[int(torch.randint(len(captions), (1,), generator=generator))]


def _warn_of_subfolders(root: Path, paths: Sequence[Path]) -> None:
    """Say that images in subfolders count, where others lie beside those: it may not be meant."""
    deeper = [path for path in paths if path.parent != root]
    if deeper and len(deeper) < len(paths):
        folders = sorted({str(path.parent.relative_to(root)) for path in deeper})
        warn_once(
            f"{root}: {len(deeper)} of its {len(paths)} images are in subfolders "
            f"({', '.join(folders[:3])}): "
            "all are taken for the subject"
        )


def _resize_mode(resize: str | None, center_crop: bool) -> str:
    if center_crop and resize not in (None, "center_crop"):
        raise ParameterError(
            "resize", f"{resize!r} contradicts center_crop: true; give one of the two"
        )
    return resize or ("center_crop" if center_crop else "squash")
