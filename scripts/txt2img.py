"""Draw pictures of a text.

    python scripts/txt2img.py --ckpt logs/.../checkpoints/last.ckpt --sampler "DPM++ 2M Karras" \\
        --steps 25 --prompt "photo of a sks dog on the beach"
    python scripts/txt2img.py --ckpt my-dog.ckpt --suite art --subject "sks dog"
    python scripts/txt2img.py --ckpt my-dog.ckpt --x scale=4,7.5,12 --y sampler=ddim,dpmpp_2m
    python scripts/txt2img.py --like outputs/txt2img-samples/samples/00003.png

Pictures go to {outdir}/samples/00000.png, 00001.png, ...; numbers go on from what is there. Each
holds its recipe as PNG metadata. Picture i of seed s is picture 0 of seed s + i, whatever the batch
size and the number of processes (started by torchrun or srun), but for rounding: --exact excludes
that, too.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.commands import exit_status
from ldm.distributed import is_first
from ldm.errors import UserError
from ldm.evaluation.prompt_suites import asked_prompts
from ldm.sampling.drawing import LESS_MEMORY, draw_pictures, text_drawing
from ldm.sampling.flags import (
    add_model_flags,
    add_prompt_flags,
    add_recipe_flags,
    add_series_flags,
    check_flags,
    check_folder,
    how_made,
    model_of,
    parse,
    recipe_of,
)
from ldm.sampling.pictures import save_numbered
from ldm.sampling.read_ahead import reading_ahead
from ldm.sampling.series import Picture, draw_shares, series_of
from ldm.sampling.xy_grid import add_grid_flags, by_checkpoint, cells, grid_axes, labelled_grid


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_prompt_flags(parser)
    add_model_flags(parser)
    add_recipe_flags(parser)
    add_series_flags(parser, outdir="outputs/txt2img-samples")
    add_grid_flags(parser)
    parser.add_argument(
        "--laion400m",
        action="store_true",
        help="not supported: that model's text encoder is not part of this project",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a `UserError` for what can be refused before the minutes that a large model takes."""
    if args.laion400m:
        raise UserError(
            "--laion400m: not supported: that model's BERT text encoder is not part of this project"
        )
    check_flags(args)
    check_folder(Path(args.outdir))


def sample(args: argparse.Namespace) -> None:
    """Read the prompts, load the model, draw, and show all pictures on one sheet."""
    check(args)
    if args.x or args.y:
        sample_grid(args)
        return
    prompts = asked_prompts(args)
    model = model_of(args, prompts)
    pictures = series_of(args, prompts, recipe_of(args, model))
    draw = text_drawing(model, args.precision)
    draw_pictures(args, pictures, draw, print, reading_ahead(model, args.precision))


def sample_grid(args: argparse.Namespace) -> None:
    """Draw one picture for each pair of values of two flags, and show them on a labelled sheet."""
    across, down = grid_axes(build_parser(), args)
    found = cells(across, down, args)
    outdir = Path(args.outdir)
    folder = None if args.skip_save else outdir / "samples"
    index = args.only[0] if args.only else 0

    # One checkpoint after the other is loaded, so that there is never more than one in memory.
    made: dict[tuple[Any, Any], Image.Image] = {}
    for places in by_checkpoint(found).values():
        cell = found[places[0]]
        model = model_of(cell)
        pictures = [
            Picture(
                found[place].prompt,
                recipe_of(found[place], model),
                index,
                found[place].negative_prompt,
            )
            for place in places
        ]
        draw, how = text_drawing(model, cell.precision), {} if args.skip_save else how_made(cell)
        ahead = reading_ahead(model, cell.precision)
        size = 1 if args.exact else args.n_samples
        images = draw_shares(pictures, draw, size, folder, how, print, ahead)
        made.update(zip(places, images))
        del model, draw, ahead
    if not args.skip_grid and is_first():
        title = args.prompt if "prompt" not in (across.name, down.name) else ""
        print(save_numbered(labelled_grid(across, down, made, title), outdir, prefix="xy-"))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: sample(parse(build_parser(), argv)), less_memory=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
