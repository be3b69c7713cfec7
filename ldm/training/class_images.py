"""Class images for prior preservation, made by the model that is about to be trained (Ruiz et al., 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ldm.inference import Recipe, image_seed, next_number, recipe_text, save_png, text_to_image

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
) -> None:
    """Write `count` pictures of the prompts, in turn, as numbered PNG files into `folder`.

    What is there stays; a run that is cut short goes on with the next number.

    Args:
        size: side of a picture, pixels.
        device: where to run the model; it goes back afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next_number(folder, "*.png")
    log.info("making %d class images in %s: %s", count, folder, ", ".join(prompts))
    recipe = Recipe(steps, scale, height=size, width=size, seed=seed)
    home, was_training = model.device, model.training
    model.to(device).eval()
    try:
        numbers = range(first, first + count)
        for start in tqdm(range(0, count, batch_size), desc="class images"):
            batch = numbers[start : start + batch_size]
            texts = [prompts[number % len(prompts)] for number in batch]
            images = text_to_image(model, texts, [image_seed(seed, number) for number in batch], recipe)
            for number, text, image in zip(batch, texts, images):
                save_png(image, folder / f"{number:05}.png", recipe_text(text, recipe, index=number))
    finally:
        model.to(home).train(was_training)
