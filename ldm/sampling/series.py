"""A series of pictures: from a list of what is wanted to files, in batches, by one process or
several.

Picture i of a series with seed s is a function of the model, its prompt, its recipe and s + i. The
batch that it is drawn in, the order and the number of processes do not enter, but for the rounding
of kernels that compute a larger batch in another order.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.distributed import agreed, share, wait_for_all
from ldm.sampling.metadata import picture_texts
from ldm.sampling.pictures import next_number, save_numbered, save_png
from ldm.sampling.text_to_image import Recipe, image_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture that is wanted.

    Attributes:
        index: its number in the series, which chooses its noise together with the recipe's seed.
    """

    prompt: str
    recipe: Recipe
    index: int = 0
    negative_prompt: str = ""

    @property
    def noise_seed(self) -> int:
        """Return the seed of its noise."""
        return image_seed(self.recipe.seed, self.index)

    @property
    def common(self) -> tuple[Recipe, str]:
        """Return what the pictures of a batch have to share: all but the prompt and the noise."""
        return replace(self.recipe, seed=0), self.negative_prompt


def series_of(args: argparse.Namespace, prompts: Sequence[str], recipe: Recipe) -> list[Picture]:
    """Return the pictures that the flags ask for.

    Of one prompt there are `n_samples` for each of `n_iter`; of several, each has one.
    """
    one = not (args.from_file or args.suite)
    count = args.n_iter * (args.n_samples if one else len(prompts))
    wanted = range(count) if args.only is None else args.only
    found = []
    for number in wanted:
        line = number % len(prompts)
        # With --fixed_code the numbers that choose the noise begin anew in each batch.
        fixed = (number if one else line) % args.n_samples
        index = fixed if args.fixed_code else number
        found.append(Picture(prompts[line], recipe, index, args.negative_prompt))
    return found


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once, by recipes that differ in the seed at most.

    Attributes:
        positions: their places in the whole series.
        kept: the place in the batch of the only picture that is wanted; None if all are.
    """

    pictures: tuple[Picture, ...]
    positions: tuple[int, ...]
    kept: int | None = None

    def texts(self, place: int, how: Mapping[str, Any]) -> dict[str, str]:
        """Return the metadata of one of the pictures; `how` is what all of the series share."""
        picture = self.pictures[place]
        # Kernels may round differently in a batch of another size, so the size is said.
        batch: dict[str, Any] = {}
        if len(self.pictures) > 1:
            batch = {"batch": len(self.pictures), "place": place}
        return picture_texts(
            picture.prompt,
            picture.recipe,
            picture.negative_prompt,
            index=picture.index,
            noise_seed=picture.noise_seed,
            **how,
            **batch,
        )


# Draws the pictures of a batch.
Draw = Callable[[Sequence[Picture]], list[Image.Image]]
# Gets all batches before the first is drawn.
Ahead = Callable[[Sequence[Batch]], None]


def in_batches(
    pictures: Sequence[Picture], size: int, rank: int = 0, world: int = 1
) -> list[Batch]:
    """Return one process's share of the pictures, in batches of at most `size`."""
    # Each process takes every world-th picture, so that all have about the same to do.
    mine = list(enumerate(pictures))[rank::world]
    found = []
    # A batch has one recipe and one negative prompt. Neighbours that share them go together.
    for _, group in groupby(mine, key=lambda item: item[1].common):
        same = list(group)
        for start in range(0, len(same), size):
            positions, batch = zip(*same[start : start + size])
            found.append(Batch(batch, positions))
    return found


def as_in_batch(picture: Picture, size: int, place: int) -> list[Batch]:
    """Return a batch that draws one picture as it came out at a place in a batch of some size.

    What the other pictures of a batch show does not matter to it, so they are copies.
    """
    return [Batch((picture,) * size, (0,) * size, kept=place)]


def draw_series(
    batches: Sequence[Batch],
    draw: Draw,
    folder: Path | None,
    how: Mapping[str, object],
    first: int | None = None,
    say: Callable[[str], object] = log.info,
    desc: str = "batches",
    ahead: Ahead | None = None,
) -> dict[int, Image.Image]:
    """Draw batches, write each picture as soon as it is there, and return them by position.

    Args:
        folder: where they go; None writes nothing.
        how: what else the metadata of all of them says.
        first: the number of the file of position 0; by default each file has the next free number.
        say: gets a line about what was written, also after an error.
        ahead: gets the batches before the first is drawn, to read their texts.
    """
    made: dict[int, Image.Image] = {}
    if ahead is not None:
        ahead(batches)
    try:
        for batch in tqdm(batches, desc=desc, disable=len(batches) < 2):
            images = draw(batch.pictures)
            # Write at once: a series that is stopped keeps what it has drawn.
            for place, (position, image) in enumerate(zip(batch.positions, images)):
                # The others of this batch are there for its size alone.
                if batch.kept not in (None, place):
                    continue
                if folder is not None:
                    _save(image, folder, batch.texts(place, how), first, position)
                made[position] = image
    finally:
        # Also after an error: the user learns what is there already.
        if made and folder is not None:
            say(f"{len(made)} pictures in {folder}")
    return made


def _save(
    image: Image.Image, folder: Path, texts: Mapping[str, str], first: int | None, position: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if first is None:
        save_numbered(image, folder, texts)
    else:
        save_png(image, numbered(folder, first + position), texts)


def draw_shares(
    pictures: Sequence[Picture],
    draw: Draw,
    size: int,
    folder: Path | None,
    how: Mapping[str, object],
    say: Callable[[str], object] = log.info,
    ahead: Ahead | None = None,
) -> list[Image.Image]:
    """Draw a series as `draw_series` does, each of several processes a share of it.

    The first process returns all pictures, in order; the others return their own.

    Args:
        size: pictures in a batch.
    """
    # One process needs no agreement: its files take the next free numbers.
    rank, world = share()
    batches = in_batches(pictures, size, rank, world)
    if world == 1:
        made = draw_series(batches, draw, folder, how, say=say, ahead=ahead)
        return [made[position] for position in sorted(made)]

    # The processes agree on the number of the first file, from which each knows those of its own.
    first = int(agreed(lambda: str(next_number(folder) if folder else 0)))
    made = draw_series(batches, draw, folder, how, first, say, ahead=ahead)
    # All have written now. The first reads the others' pictures, for the sheet of all of them.
    wait_for_all()
    if rank == 0 and folder is not None:
        for position in range(len(pictures)):
            if position not in made:
                made[position] = read_picture(numbered(folder, first + position))
    return [made[position] for position in sorted(made)]


def numbered(folder: Path, number: int) -> Path:
    """Return the file of the picture with a number."""
    return folder / f"{number:05}.png"


def read_picture(path: Path) -> Image.Image:
    """Return a picture with its pixels read and its file closed."""
    with Image.open(path) as image:
        image.load()
        return image
