"""Draw a part of a photo anew, after a text; the rest stays as it is, to the bit: inpainting.

    python scripts/inpaint.py --ckpt logs/.../checkpoints/last.ckpt --init-img photo.jpg \\
        --mask mask.png --prompt "photo of a sks dog"
    python scripts/inpaint.py --ckpt sd-v1-5-inpainting.ckpt --init-img photo.jpg \\
        --box 200,150,256,256 --prompt "a photo of a red ball"

White in the mask is drawn anew. A mask is as large as its photo. Models that were made for
inpainting (9 input channels) and all others work. Of a large photo, the part around the mask is
drawn at the model's size and put back; --padding says how much of the photo around the mask the
model sees at least. The results are PNG files as large as the photo, in {outdir}/samples.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.evaluation.prompt_suites import asked_prompts
from ldm.sampling.drawing import LESS_MEMORY, draw_pictures, drawing_with
from ldm.sampling.flags import (
    add_model_flags,
    add_prompt_flags,
    add_recipe_flags,
    add_series_flags,
    check_flags,
    check_folder,
    model_of,
    parse,
    recipe_of,
)
from ldm.sampling.inpainting import inpaint
from ldm.sampling.photo_flags import add_mask_flags, add_photo_flags
from ldm.sampling.photos import mask_of_box, read_mask, read_photo
from ldm.sampling.read_ahead import reading_ahead
from ldm.sampling.series import series_of


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_photo_flags(parser, strength=1.0)
    add_mask_flags(parser)
    add_prompt_flags(parser)
    add_model_flags(parser)
    add_recipe_flags(parser)
    add_series_flags(parser, outdir="outputs/inpainting-samples")
    parser.set_defaults(n_iter=1, n_samples=2)
    return parser


def sample(args: argparse.Namespace) -> None:
    """Read photo, mask and prompts, load the model, and draw."""
    # Refuse what can be refused before the minutes that a large model takes.
    check(args)
    check_flags(args)
    check_folder(Path(args.outdir))
    prompts = asked_prompts(args)
    photo = read_photo(Path(args.init_img))
    mask = mask_for(args, photo.size)

    model = model_of(args, prompts)
    recipe = recipe_of(args, model)

    draw = partial(
        inpaint, model, photo, mask, padding=args.padding, precision=args.precision, verbose=True
    )
    places = {"mask": args.mask, "box": args.box, "padding": args.padding}
    how = {name: value for name, value in places.items() if value is not None}
    pictures = series_of(args, prompts, recipe)
    ahead = reading_ahead(model, args.precision, photos=True)
    how["init_img"] = str(args.init_img)
    draw_pictures(args, pictures, drawing_with(draw), print, ahead, **how)


def check(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags that do not say what to draw, and where."""
    if not args.init_img:
        raise UserError("--init-img: which photo? give --init-img PHOTO")
    if (args.mask is None) == (args.box is None):
        raise UserError("--mask, --box: give one of the two: what of the photo is drawn anew")
    for name in ("mask_blur", "padding"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected 0 or more pixels")


def mask_for(args: argparse.Namespace, size: tuple[int, int]) -> Image.Image:
    """Return the mask that is given, of a photo of this size."""
    if args.box is not None:
        return mask_of_box(args.box, size)
    return read_mask(Path(args.mask), Path(args.init_img), size)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: sample(parse(build_parser(), argv)), less_memory=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
