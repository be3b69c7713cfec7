"""Pictures of the tiny world that were drawn before the training, which reads them.

To read them is faster than to draw them. `scripts/tiny/render_world.py` writes them in shards, and
may still be writing while a training reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.resizing import check_resize, fit
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.rng import generator
from ldm.tiny.world import LABELS, World

SHARD = 500  # pictures in a file


def shard_path(folder: Path, number: int) -> Path:
    """Return where shard `number` of a folder is."""
    return folder / f"{number:04}.safetensors"


def write_shard(world: World, folder: Path, number: int) -> None:
    """Draw the examples of one shard and write it. Example i of the folder is `world[i]`."""
    examples = [world.example(0, generator("world", number * SHARD + i)) for i in range(SHARD)]
    pictures = torch.stack([torch.as_tensor(example["image"]) for example in examples])
    pixels = ((pictures + 1) * 127.5).round().to(torch.uint8)
    kept = ("caption", *LABELS)
    texts = []
    for example in examples:
        texts.append({key: example[key] for key in kept})
    header = {"examples": json.dumps(texts)}
    path = shard_path(folder, number)
    write_atomically(
        path, lambda temporary: save_file({"pixels": pixels}, temporary, metadata=header)
    )


class RenderedWorld(Dataset):
    """The pictures of a folder of shards, as `World` gives them.

    Args:
        folder: where the shards are.
        length: how many pictures an epoch has; None for as many as there are at the start. If the
            shards hold fewer, the pictures repeat. Shards that come later are read, too.
        labels: whether an example says what is pictured.
        size: side of a picture, pixels; by default that of the pictures in the files.

    Raises:
        UserError: there is no shard.
    """

    def __init__(
        self,
        folder: str | Path,
        length: int | None = None,
        labels: bool = False,
        size: int | None = None,
    ):
        check_resize(size, "squash", "bicubic")
        self.folder, self.labels, self.size = Path(folder).expanduser(), labels, size
        self._shards: list[tuple[Tensor, list[dict[str, str]]]] = []
        self._read_more()
        if not self._shards:
            raise UserError(
                f"{folder}: no pictures; draw them with: python scripts/tiny/render_world.py"
            )
        self.length = length or self.available

    @property
    def available(self) -> int:
        """Return how many pictures have been read."""
        return len(self._shards) * SHARD

    @property
    def n_images(self) -> int:
        """Return how many examples an epoch has."""
        return self.length

    def __len__(self) -> int:
        return self.length

    def _read_more(self) -> None:
        """Read the shards that are there and were not read yet."""
        path = shard_path(self.folder, len(self._shards))
        while path.is_file():
            with safe_open(path, "pt") as file:
                texts = json.loads(file.metadata()["examples"])
                self._shards.append((file.get_tensor("pixels"), texts))
            path = shard_path(self.folder, len(self._shards))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.length)[index]
        if index >= self.available:
            self._read_more()
        number, row = divmod(index % self.available, SHARD)
        pixels, texts = self._shards[number]
        picture = pixels[row].numpy()
        if self.size is not None:
            picture = np.asarray(fit(Image.fromarray(picture), None, self.size))
        image = picture.astype("float32") / 127.5 - 1
        example = {"image": image, "caption": texts[row]["caption"]}
        if self.labels:
            example |= {key: texts[row][key] for key in LABELS}
        return example

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return picture number `index`; nothing about it is random."""
        return self[index]
