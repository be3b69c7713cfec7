"""Class images for prior preservation, made by the model that is about to be trained.

Ruiz et al., DreamBooth, section 3.2.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ldm.data.prompts import class_word_of
from ldm.errors import UserError
from ldm.sampling.metadata import picture_texts, read_recipe
from ldm.sampling.pictures import next_number, save_png
from ldm.sampling.text_to_image import Recipe, image_seed, text_to_image

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
) -> None:
    """Write `count` pictures of the prompts, in turn, as numbered PNG files into `folder`.

    What is there stays; a run that is cut short goes on with the next number.

    Args:
        size: side of a picture, pixels.
        device: where to run the model; it goes back afterwards.
        unconditional: share of pictures of the empty prompt, each with an empty caption file.
            Guidance leads away from the unconditional model: where fine-tuning moves that towards
            the subject, it moves the class away from it.
    """
    # These pictures show what the model knows of the class before it is trained, which is what the
    # prior's loss preserves. So they have to come before the first step.
    first = next_number(folder)
    log.info("making %d class images in %s: %s", count, folder, ", ".join(prompts))

    # A picture's number decides on its prompt and its noise, so a series that was cut short goes on
    # as it would have. The empty prompt comes up evenly.
    texts = {}
    for number in range(first, first + count):
        is_empty = int((number + 1) * unconditional) > int(number * unconditional)
        texts[number] = "" if is_empty else prompts[number % len(prompts)]

    # A batch has one recipe: pictures of the empty prompt have no guidance.
    of_class = [number for number, text in texts.items() if text]
    of_nothing = [number for number, text in texts.items() if not text]
    batches = [*_in_batches(of_class, batch_size), *_in_batches(of_nothing, batch_size)]
    recipe = Recipe(steps, scale, height=size, width=size, seed=seed)

    # The model is borrowed: it gets its device and mode back, also after an error.
    home, was_training = model.device, model.training
    model.to(device).eval()
    try:
        for batch in tqdm(batches, desc="class images"):
            # Guidance leads from the empty prompt to the given one. Here both would be the same.
            how = recipe if texts[batch[0]] else replace(recipe, scale=1.0)
            seeds = [image_seed(seed, number) for number in batch]
            images = text_to_image(model, [texts[number] for number in batch], seeds, how)
            # Only now: a run that is stopped before the first picture leaves no empty folder.
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in zip(batch, images):
                # The empty caption comes first: without it, a picture would have the class's.
                if not texts[number]:
                    (folder / f"{number:05}.txt").touch()
                how_made = picture_texts(texts[number], how, index=number)
                save_png(image, folder / f"{number:05}.png", how_made)
    finally:
        model.to(home).train(was_training)


def _in_batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


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
    try:
        recipe = read_recipe(image) if image.suffix.lower() == ".png" else None
    except Exception:  # damaged or very large metadata, which the pixels do not need
        return None
    return None if recipe is None else str(recipe["prompt"])


def _names(prompt: str, class_word: str) -> bool:
    """Tell whether a prompt names a class, in the singular or the plural."""
    # Whole words only: "cat" is not named by "catalog".
    return (
        re.search(rf"\b{re.escape(class_word.strip())}(e?s)?\b", prompt, re.IGNORECASE) is not None
    )
