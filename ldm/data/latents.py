"""A dataset's examples as latents that the first stage encoded once, so that epochs cost the UNet
alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.errors import ParameterError, UserError
from ldm.files import write_atomically
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from ldm.data.image_folder import ImageFolderDataset

log = logging.getLogger(__name__)

BATCH = 32  # images that are encoded at once


@dataclass(frozen=True)
class Encoder:
    """What makes latents of images.

    Args:
        encode: from images, (b, 3, h, w) in [-1, 1], to the moments of their posteriors, (b, 2 z,
            h', w').
        name: of what it computes; where latents are kept in files, those of another name are made
            anew.
    """

    encode: Callable[[Tensor], Tensor]
    name: str = ""


class CachedLatents(Dataset):
    """Another dataset's examples, `{"moments": (2 z, h, w), "caption": str}`, encoded once into a
    file.

    The moments are those of the first stage's posterior, in float16, so training still samples it
    anew. The file says what it was made from: another dataset or first stage makes it anew.

    Args:
        path: the file, `.safetensors`.
        dataset: the config of what to encode; with the parameter `labels` its examples need a
            "class_word".
        classes: of an epoch, only the examples of these classes.

    Raises:
        UserError: a file that is not a cache, or none when there is no model to make it.
    """

    def __init__(
        self, path: str | Path, dataset: Mapping[str, object], classes: Sequence[str] | None = None
    ):
        self.path, self.config, self.classes = Path(path).expanduser(), dataset, classes
        self.source: Any = instantiate_from_config(dataset, "dataset")
        if getattr(self.source, "masks", None) is not None:
            raise ParameterError("dataset", "masks are not cached with latents; leave masks out")
        self.moments: Tensor | None = None
        self.captions: list[str] = []

    @property
    def n_images(self) -> int:
        """Return how many examples an epoch has."""
        return len(self.source) if self.moments is None else len(self.moments)

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.moments is not None, "open() comes first"
        return {"moments": self.moments[index], "caption": self.captions[index]}

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return item `index`: nothing about it is random."""
        return self[index]

    def fill(self, encoder: Encoder | None) -> None:
        """Make the file if it is not there or was made from something else; without an `encoder` it
        has to be there.
        """
        if encoder is None:
            if not self.path.is_file():
                raise UserError(
                    f"{self.path}: the latent cache of this run is gone, and only a new run "
                    "makes it"
                )
            return
        made_from = {"dataset": _plain(self.config), "first_stage": encoder.name}
        if self.path.is_file() and self._header().get("made_from") == json.dumps(
            made_from, sort_keys=True
        ):
            return
        log.info("encoding %d examples into %s", len(self.source), self.path)
        moments, texts, classes = self._encode(encoder)
        tensors = {"moments": moments, "captions": _bytes(texts), "classes": _bytes(classes)}
        header = {"made_from": json.dumps(made_from, sort_keys=True)}
        size = moments.numel() * moments.element_size()
        write_atomically(
            self.path, lambda temporary: save_file(tensors, temporary, metadata=header), size
        )

    @torch.no_grad()
    def _encode(self, encoder: Encoder) -> tuple[Tensor, list[str], list[str]]:
        moments, captions, classes = [], [], []
        workers = (
            1 if len(self.source) > 10 * BATCH else 0
        )  # one draws while the first stage encodes
        loader = DataLoader(self.source, BATCH, num_workers=workers, collate_fn=list)
        for examples in tqdm(loader, desc="latents"):
            images = torch.stack([torch.as_tensor(example["image"]) for example in examples])
            images = rearrange(images, "b h w c -> b c h w").contiguous()
            moments.append(encoder.encode(images).half().cpu())
            captions += [example["caption"] for example in examples]
            classes += [example.get("class_word", "") for example in examples]
        return torch.cat(moments), captions, classes

    def open(self) -> None:
        """Read the file into memory."""
        if self.moments is not None:
            return
        self._header()
        with safe_open(self.path, "pt") as file:
            moments, self.captions, classes = (
                file.get_tensor("moments"),
                _texts(file.get_tensor("captions")),
                _texts(file.get_tensor("classes")),
            )
        if self.classes is not None:
            kept = [i for i, class_word in enumerate(classes) if class_word in set(self.classes)]
            if not kept:
                raise UserError(f"{self.path}: no examples of {', '.join(self.classes)}")
            moments, self.captions = moments[kept], [self.captions[i] for i in kept]
        self.moments = moments

    def _header(self) -> dict[str, str]:
        try:
            with safe_open(self.path, "pt") as file:
                header, keys = file.metadata() or {}, set(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path}: not a latent cache ({error}); remove it to make it anew"
            ) from error
        if keys != {"moments", "captions", "classes"}:
            raise UserError(f"{self.path}: not a latent cache; name another file for it")
        return header


@runtime_checkable
class HasVariants(Protocol):
    """A dataset whose examples are among finitely many pictures."""

    resize: str

    def variants(self) -> Iterator[tuple[tuple[Path, bool], dict[str, np.ndarray]]]:
        """Yield each picture by its file and whether it is mirrored."""


def check_encodable(dataset: object, where: str) -> None:
    """Raise a `UserError` if a dataset's examples are not among finitely many pictures."""
    if not isinstance(dataset, HasVariants):
        raise ParameterError("latent_cache", f"{where} is no folder of images; leave it out")
    if dataset.resize == "random_crop":
        raise ParameterError(
            "latent_cache",
            f"{where}.params.resize: random_crop shows another picture each time; "
            "set center_crop, or leave the cache out",
        )


@torch.no_grad()
def encode_variants(
    dataset: ImageFolderDataset, encoder: Encoder, batch_size: int, folder: Path | None = None
) -> dict[tuple[Path, bool], dict[str, Any]]:
    """Return a dataset's variants with the posterior's "moments" in place of the image.

    Moments are (2 z, h, w), float32, on the CPU. They are what a step would compute from the image.

    Args:
        batch_size: images that are encoded at once.
        folder: where moments are kept, in files named after what they were computed from, and found
            again.
    """
    found: dict[tuple[Path, bool], dict[str, Any]] = {}
    variants = dataset.variants()
    total = 2 * dataset.n_images
    with tqdm(desc="latents", total=total, disable=total < 2 * BATCH, leave=False) as bar:
        while part := dict(itertools.islice(variants, batch_size)):
            pixels = {key: entries.pop("image") for key, entries in part.items()}
            files: dict[tuple[Path, bool], Path] = {}
            if folder:
                for key, image in pixels.items():
                    files[key] = _latent_file(folder, encoder.name, image)
            cached = {key: _moments_in(file) for key, file in files.items()}
            kept = {key: moments for key, moments in cached.items() if moments is not None}
            missing = {key: image for key, image in pixels.items() if key not in kept}
            made = _encode(missing, encoder)
            for key in files.keys() & made.keys():
                write_atomically(files[key], functools.partial(save_file, {"moments": made[key]}))
            for key, moments in (kept | made).items():
                found[key] = {**part[key], "moments": moments}
            bar.update(len(part))
    return found


def _encode(pixels: Mapping[Any, np.ndarray], encoder: Encoder) -> dict[Any, Tensor]:
    """Return the moments of images (h, w, c), all at once if they have one size."""
    if len({image.shape for image in pixels.values()}) > 1:
        return {key: _encode({key: image}, encoder)[key] for key, image in pixels.items()}
    if not pixels:
        return {}
    images = rearrange(
        torch.from_numpy(np.stack(list(pixels.values()))), "b h w c -> b c h w"
    ).contiguous()
    return {
        key: moments.clone() for key, moments in zip(pixels, encoder.encode(images).float().cpu())
    }


def _latent_file(folder: Path, made_by: str, pixels: np.ndarray) -> Path:
    """Return the file for an image's moments: its name is a hash of what they are computed from."""
    folder.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(f"{made_by} {pixels.shape}".encode() + pixels.tobytes())
    return folder / f"{content.hexdigest()[:32]}.safetensors"


def _moments_in(file: Path) -> Tensor | None:
    """Return what a cache's file holds.

    Returns None if the file is not there or cannot be read, and is to be made anew.
    """
    try:
        return load_file(file)["moments"]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("%s: not a cached latent (%s); made anew", file, error)
        return None


def digest(module: nn.Module) -> str:
    """Return a hash of a network's weights."""
    found = hashlib.sha256()
    for key, value in module.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _plain(config: object) -> Any:
    return json.loads(json.dumps(config, default=list))


def _bytes(texts: Sequence[str]) -> Tensor:
    return torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8)


def _texts(data: Tensor) -> list[str]:
    return bytes(data.tolist()).decode().split("\n")
