"""Pictures of many prompts from one checkpoint, of which a kill costs the last batch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.sampling.metadata import picture_texts
from ldm.sampling.pictures import save_png
from ldm.sampling.text_to_image import (
    Recipe,
    image_seed,
    load_model,
    pick_device,
    text_to_image,
)


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: its prompt, its number in the series of its seed, and its file."""

    prompt: str
    index: int
    path: Path


def draw(
    checkpoint: Path,
    wanted: Sequence[Wanted],
    recipe: Recipe,
    batch_size: int = 4,
    device: str | None = None,
) -> int:
    """Draw the pictures that are not there yet; return how many that were.

    A picture is a function of its prompt, its number and the recipe alone, so that those that are
    drawn later are the same as if nothing had come between. The model is loaded only for a picture
    that is missing.
    """
    missing = [picture for picture in wanted if not picture.path.exists()]
    if not missing:
        return 0
    model = load_model(checkpoint, device=pick_device(device))
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        seeds = [image_seed(recipe.seed, picture.index) for picture in part]
        images = text_to_image(model, [picture.prompt for picture in part], seeds, recipe)
        for picture, image in zip(part, images):
            picture.path.parent.mkdir(parents=True, exist_ok=True)
            texts = picture_texts(picture.prompt, recipe, index=picture.index)
            save_png(image, picture.path, texts)
    return len(missing)


def series(prompts: Sequence[str], images: int, folder: Path) -> list[Wanted]:
    """Return `images` pictures of each prompt: `00-0.png` is the first prompt's first."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Wanted(prompt, number * images + repeat, folder / f"{number:0{digits}}-{repeat}.png")
        for number, prompt in enumerate(prompts)
        for repeat in range(images)
    ]
