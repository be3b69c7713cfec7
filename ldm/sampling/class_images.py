"""Class images for prior preservation, made by the model that is about to be trained.

Ruiz et al., DreamBooth, 2208.12242.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldm.data.prompts import class_word_of
from ldm.distributed import agreed, share, wait_for_all
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.sampling.metadata import recipe_in
from ldm.sampling.pictures import next_number, taken_numbers
from ldm.sampling.series import Ahead, Picture, draw_series, in_batches, numbered
from ldm.sampling.text_to_image import Recipe, text_to_image

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


def make_class_images(
    model: LatentDiffusion,
    folder: Path,
    prompts: Sequence[str],
    count: int,
    size: int,
    seed: int,
    device: torch.device,
    batch_size: int = 8,
    steps: int = 50,
    scale: float = 7.5,
    unconditional: float = 0.0,
    sampler: str = "ddim",
    schedule: str | None = None,
    eta: float = 0.0,
    precision: str = "full",
    shared: bool = False,
    how: Mapping[str, Any] | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Write `count` pictures of the prompts, in turn, as numbered PNG files into `folder`.

    What is there stays. A picture is a function of its number, so a run that was cut short goes on
    as it would have, and several processes draw what one would.

    Args:
        size: side of a picture, pixels.
        device: where to run the model; it goes back afterwards.
        unconditional: share of pictures of the empty prompt, each with an empty caption file.
            Guidance leads away from the unconditional model: where fine-tuning moves that towards
            the subject, it moves the class away from it.
        shared: whether all processes call this, each to draw its share.
        how: what else the pictures' metadata says.
        ahead: gets the batches before the first is drawn, from who owns the model.
    """
    # These pictures show what the model knows of the class before it is trained, which is what the
    # prior's loss preserves. So they have to come before the first step.
    names = find_sampler(sampler, schedule)
    recipe = Recipe(steps, scale, eta, names[0], size, size, seed, names[1])
    series = {"prompts": list(prompts), "unconditional": unconditional, **asdict(recipe)}
    # Decide which numbers are missing. One process decides for all, because files appear
    # while the others still look.
    rank, world = share() if shared else (0, 1)
    if shared:
        numbers = json.loads(agreed(lambda: json.dumps(numbers_to_make(folder, count, series))))
    else:
        numbers = numbers_to_make(folder, count, series)
    log.info("making %d class images in %s: %s", count, folder, ", ".join(prompts))

    # Pictures of the empty prompt have no guidance, which would lead from that prompt to itself.
    # They come after the others, for a batch has one recipe.
    pictures = [class_picture(number, prompts, recipe, unconditional) for number in numbers]
    pictures.sort(key=lambda picture: not picture.prompt)
    batches = [
        replace(batch, positions=tuple(picture.index for picture in batch.pictures))
        for batch in in_batches(pictures, batch_size, rank, world)
    ]

    def draw(batch: Sequence[Picture]) -> list[Image.Image]:
        texts, seeds = [p.prompt for p in batch], [p.noise_seed for p in batch]
        images = text_to_image(model, texts, seeds, batch[0].recipe, precision=precision)
        # Only now: a run that is stopped before the first picture leaves no empty folder.
        folder.mkdir(parents=True, exist_ok=True)
        note_plan(folder, numbers, series)
        # The empty caption comes first: without it, a picture would have the class's.
        for picture in batch:
            if not picture.prompt:
                numbered(folder, picture.index).with_suffix(".txt").touch()
        return images

    # The model is borrowed: it gets its device and mode back, also after an error.
    home, was_training = model.device, model.training
    model.to(device).eval()
    begin = time.monotonic()
    try:
        draw_series(batches, draw, folder, how or {}, first=0, desc="class images", ahead=ahead)
    finally:
        model.to(home).train(was_training)
    # The plan may go only when all processes have written their pictures.
    if shared:
        wait_for_all()
    if rank == 0:
        (folder / PLAN).unlink(missing_ok=True)
        seconds = time.monotonic() - begin
        speed = len(numbers) / max(seconds, 1e-9)
        log.info("%d class images in %.1f s: %.3g a second", len(numbers), seconds, speed)


def class_picture(
    number: int, prompts: Sequence[str], recipe: Recipe, unconditional: float
) -> Picture:
    """Return the class image of a number, which decides on its prompt and its noise."""
    # The empty prompt comes up evenly.
    is_empty = int((number + 1) * unconditional) > int(number * unconditional)
    if is_empty:
        return Picture("", replace(recipe, scale=1.0), number)
    return Picture(prompts[number % len(prompts)], recipe, number)


# While a folder is filled, a hidden file says which numbers it is to have, so that a run that was
# cut short is not taken for a folder from which somebody has removed pictures.
PLAN = ".class_images.json"


def numbers_to_make(folder: Path, count: int, series: Mapping[str, object]) -> list[int]:
    """Return the numbers of `count` new pictures: what the same series lacks, then the next ones.

    Args:
        series: what the pictures are a function of, besides their numbers.
    """
    # New numbers come after all that are taken. A caption file that is left of a picture must not
    # become that of another one.
    behind = next_number(folder)
    lacking: list[int] = []
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        # A run was stopped here before its end. Draw the pictures that it lacks first.
        if plan["series"] == series:
            begin, end = int(plan["begin"]), int(plan["end"])
            lacking = sorted(set(range(begin, end)) - taken_numbers(folder))
            behind = max(behind, end)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is no plan, or it is of something else
    return [*lacking, *range(behind, behind + count)][:count]


def note_plan(folder: Path, numbers: Sequence[int], series: Mapping[str, object]) -> None:
    """Write down which numbers a folder is to have."""
    plan = {"begin": min(numbers), "end": max(numbers) + 1, "series": series}
    text, file = json.dumps(plan), folder / PLAN
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def check_class(
    images: Sequence[Path], class_word: str, templates: str | Sequence[str] | None = None
) -> None:
    """Compare the class of images that say in their metadata what they show with `class_word`.

    An image of a prompt without the class word is warned of: "a puppy" may be meant as a dog.

    Args:
        images: those without a caption of their own, which are taken for the class.
        templates: those of the class's captions.

    Raises:
        UserError: an image was made from the same template with another class word.
    """
    # A folder of class images may be left from another subject. Images of another class would teach
    # the class word a wrong meaning.
    others: dict[str, list[Path]] = {}
    for image in images:
        prompt = _prompt_of(image)
        if prompt and not _names(prompt, class_word):
            others.setdefault(prompt, []).append(image)
    for prompt, paths in others.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        made_as = f"{paths[0]}{more}: made as '{prompt}', and the class word is '{class_word}'"
        # The same template with another word is a mistake. Any other prompt may be meant, so it is
        # only warned of.
        other = class_word_of(prompt, templates)
        if other is not None:
            raise UserError(
                f"{made_as}: make '{other}' the class word, or give class images another folder"
            )
        log.warning("%s: the class learns from it all the same", made_as)


def _prompt_of(image: Path) -> str | None:
    """Return the prompt that a picture of ours was made of; None for other images."""
    if image.suffix.lower() != ".png":
        return None
    try:
        # Our texts come before the pixels. To look behind those, all of them would be decoded.
        with Image.open(image) as opened:
            recipe = recipe_in(opened.info)
    except Exception:  # damaged or very large metadata, which the pixels do not need
        return None
    return None if recipe is None else str(recipe["prompt"])


def _names(prompt: str, class_word: str) -> bool:
    """Tell whether a prompt names a class, in the singular or the plural."""
    # Whole words only: "cat" is not named by "catalog".
    return (
        re.search(rf"\b{re.escape(class_word.strip())}(e?s)?\b", prompt, re.IGNORECASE) is not None
    )
