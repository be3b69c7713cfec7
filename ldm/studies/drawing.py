"""Pictures of many prompts from one checkpoint, of which a kill costs the last batch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.sampling.metadata import weights_names
from ldm.sampling.pictures import save_png
from ldm.sampling.read_ahead import read_ahead
from ldm.sampling.series import Picture, in_batches
from ldm.sampling.text_to_image import Recipe, load_model, pick_device, text_to_image

PRECISION = "full"  # scores of one checkpoint are the same on every device, up to rounding


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

    A picture that is drawn later is the same as if nothing had come between: it is drawn in the
    batch that it always had, for kernels may round differently in another one. The model is loaded
    only for a picture that is missing.
    """
    missing = sum(not picture.path.exists() for picture in wanted)
    if not missing:
        return 0
    model = load_model(checkpoint, device=pick_device(device))
    how = {**weights_names(checkpoint), "ckpt": str(checkpoint), "precision": PRECISION}
    pictures = [Picture(picture.prompt, recipe, picture.index) for picture in wanted]
    batches = [
        batch
        for batch in in_batches(pictures, batch_size)
        if not all(wanted[position].path.exists() for position in batch.positions)
    ]
    read_ahead(model, batches, PRECISION)
    for batch in batches:
        paths = [wanted[position].path for position in batch.positions]
        prompts = [picture.prompt for picture in batch.pictures]
        seeds = [picture.noise_seed for picture in batch.pictures]
        images = text_to_image(model, prompts, seeds, recipe, precision=PRECISION)
        for place, (path, image) in enumerate(zip(paths, images)):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, path, batch.texts(place, how))
    return missing


def series(prompts: Sequence[str], images: int, folder: Path) -> list[Wanted]:
    """Return `images` pictures of each prompt: `00-0.png` is the first prompt's first."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Wanted(prompt, number * images + repeat, folder / f"{number:0{digits}}-{repeat}.png")
        for number, prompt in enumerate(prompts)
        for repeat in range(images)
    ]
