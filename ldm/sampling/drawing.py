"""Draw a series of pictures as a command's flags say, and write it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ldm.distributed import is_first
from ldm.sampling.flags import how_made
from ldm.sampling.pictures import grid, save_numbered
from ldm.sampling.series import Ahead, Draw, Picture, as_in_batch, draw_series, draw_shares
from ldm.sampling.text_to_image import text_to_image

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

# What a user can do where memory is too small.
LESS_MEMORY = "--n_samples 1, a smaller --H and --W, --precision half, or --vae_tiling"


def text_drawing(model: LatentDiffusion, precision: str) -> Draw:
    """Return what draws a batch of pictures of texts with a model."""
    return drawing_with(partial(text_to_image, model, precision=precision, verbose=True))


def drawing_with(draw: Callable[..., list[Image.Image]]) -> Draw:
    """Return what draws a batch of pictures with `draw`.

    Args:
        draw: a function of prompts, seeds, a recipe and a negative prompt, in this order.
    """

    def draw_batch(batch: Sequence[Picture]) -> list[Image.Image]:
        prompts = [picture.prompt for picture in batch]
        seeds = [picture.noise_seed for picture in batch]
        return draw(prompts, seeds, batch[0].recipe, batch[0].negative_prompt)

    return draw_batch


def draw_pictures(
    args: argparse.Namespace,
    pictures: Sequence[Picture],
    draw: Draw,
    say: Callable[[object], object],
    ahead: Ahead | None = None,
    **how: object,
) -> None:
    """Draw a series as the flags say, write it, and show all of it on one sheet.

    Args:
        say: gets a line for what is written.
        ahead: gets the batches before the first is drawn.
        how: what else the metadata of all pictures says.
    """
    outdir = Path(args.outdir)
    folder = None if args.skip_save else outdir / "samples"
    how = {} if args.skip_save else {**how_made(args), **how}
    # Each picture is written as soon as it is there, whole or not at all, so a command that is
    # stopped keeps those that it has finished.
    if args.like_batch is not None and len(pictures) == 1:
        if not is_first():
            return  # one picture has no shares
        batches = as_in_batch(pictures[0], *args.like_batch)
        made = list(draw_series(batches, draw, folder, how, say=say, ahead=ahead).values())
    else:
        size = 1 if args.exact else args.n_samples
        made = draw_shares(pictures, draw, size, folder, how, say, ahead)
    # The first process has all pictures, so it makes the sheet.
    if not args.skip_grid and is_first():
        say(save_numbered(grid(made, args.n_rows or args.n_samples), outdir, prefix="grid-"))
