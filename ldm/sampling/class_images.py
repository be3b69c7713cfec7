"""Class images for prior preservation, made by the model that is about to be trained (Ruiz et al., 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ldm.sampling.metadata import picture_texts
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
        unconditional: share of pictures of the empty prompt, each with an empty caption file. Guidance leads away from
            the unconditional model: where fine-tuning moves that towards the subject, it moves the class away from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next_number(folder, "*.png")
    log.info("making %d class images in %s: %s", count, folder, ", ".join(prompts))
    recipe = Recipe(steps, scale, height=size, width=size, seed=seed)
    home, was_training = model.device, model.training
    model.to(device).eval()
    try:
        numbers = range(first, first + count)
        of_nothing = [number for number in numbers if int((number + 1) * unconditional) > int(number * unconditional)]
        of_class = [number for number in numbers if number not in of_nothing]
        texts = {number: prompts[number % len(prompts)] for number in of_class} | dict.fromkeys(of_nothing, "")
        batches = [part[n : n + batch_size] for part in (of_class, of_nothing) for n in range(0, len(part), batch_size)]
        for batch in tqdm(batches, desc="class images"):
            how = recipe if texts[batch[0]] else replace(recipe, scale=1.0)
            seeds = [image_seed(seed, number) for number in batch]
            images = text_to_image(model, [texts[number] for number in batch], seeds, how)
            for number, image in zip(batch, images):
                if not texts[number]:
                    (folder / f"{number:05}.txt").touch()
                save_png(image, folder / f"{number:05}.png", picture_texts(texts[number], how, index=number))
    finally:
        model.to(home).train(was_training)
