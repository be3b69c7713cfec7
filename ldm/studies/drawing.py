"""Pictures of many prompts from one checkpoint, of which a kill costs the last batch alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ldm.sampling.metadata import recipe_in, weights_names
from ldm.sampling.pictures import save_png
from ldm.sampling.read_ahead import read_ahead
from ldm.sampling.series import Picture, in_batches
from ldm.sampling.text_to_image import Recipe, load_model, pick_device, text_to_image

log = logging.getLogger(__name__)

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

    One that is there of another prompt or by another recipe is drawn anew. A picture that is drawn
    later is the same as if nothing had come between: it is drawn in the batch that it always had,
    for kernels may round differently in another one. The model is loaded only for a picture that is
    missing.
    """
    there = [picture for picture in wanted if picture.path.exists()]
    kept = {picture.path for picture in there if _is_of(picture, recipe)}
    others = [picture.path for picture in there if picture.path not in kept]
    if others:
        folder = others[0].parent
        log.warning("%s: %d pictures were asked for otherwise: drawn anew", folder, len(others))
    missing = len(wanted) - len(kept)
    if not missing:
        return 0
    model = load_model(checkpoint, device=pick_device(device))
    how = {**weights_names(checkpoint), "ckpt": str(checkpoint), "precision": PRECISION}
    pictures = [Picture(picture.prompt, recipe, picture.index) for picture in wanted]
    batches = [
        batch
        for batch in in_batches(pictures, batch_size)
        if not all(wanted[position].path in kept for position in batch.positions)
    ]
    read_ahead(model, batches, PRECISION)
    for batch in batches:
        paths = [wanted[position].path for position in batch.positions]
        prompts = [picture.prompt for picture in batch.pictures]
        seeds = [picture.noise_seed for picture in batch.pictures]
        images = text_to_image(model, prompts, seeds, recipe, precision=PRECISION)
        for place, (path, image) in enumerate(zip(paths, images)):
            if path not in kept:
                # An older one stays until there is one to take its place.
                path.unlink(missing_ok=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, path, batch.texts(place, how))
    return missing


def _is_of(wanted: Wanted, recipe: Recipe) -> bool:
    """Return whether a file is the picture that is wanted, as far as it says what it is."""
    try:
        # Our texts come before the pixels, which are not decoded.
        with Image.open(wanted.path) as opened:
            found = recipe_in(opened.info) or {}
    except Exception:  # a damaged file is refused by who reads its pixels
        return True
    asked = {"prompt": wanted.prompt, "index": wanted.index, **asdict(recipe)}
    asked = json.loads(json.dumps(asked))  # tuples are lists
    return all(found[key] == value for key, value in asked.items() if key in found)


def series(prompts: Sequence[str], images: int, folder: Path) -> list[Wanted]:
    """Return `images` pictures of each prompt: `00-0.png` is the first prompt's first."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Wanted(prompt, number * images + repeat, folder / f"{number:0{digits}}-{repeat}.png")
        for number, prompt in enumerate(prompts)
        for repeat in range(images)
    ]
