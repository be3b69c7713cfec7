"""Draw a photo anew, after a text: image to image.

    python scripts/img2img.py --ckpt logs/.../checkpoints/last.ckpt --init-img photo.jpg \\
        --strength 0.6 --prompt "photo of a sks dog on the beach"

The photo gets noise, and the rest of the steps draws what the text says: the more --strength, the
less of the photo is left. It is resized so that its shorter side is the model's, and its longer
side is cropped to what the model can draw; --H and --W choose another size. Pictures go to
{outdir}/samples, as those of txt2img.py do.
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
from ldm.data.resizing import fit
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
from ldm.sampling.image_to_image import encoded, image_to_image
from ldm.sampling.photo_flags import add_photo_flags
from ldm.sampling.photos import central_box, drawn_size, read_photo
from ldm.sampling.read_ahead import reading_ahead
from ldm.sampling.series import series_of
from ldm.sampling.text_to_image import Recipe, size_step

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_photo_flags(parser, strength=0.75)
    add_prompt_flags(parser)
    add_model_flags(parser)
    add_recipe_flags(parser)
    add_series_flags(parser, outdir="outputs/img2img-samples")
    # As in CompVis's script.
    parser.set_defaults(scale=5.0, n_iter=1, n_samples=2)
    return parser


def sample(args: argparse.Namespace) -> None:
    """Read the photo and the prompts, load the model, and draw."""
    # Refuse what can be refused before the minutes that a large model takes.
    if not args.init_img:
        raise UserError("--init-img: which photo? give --init-img PHOTO")
    check_flags(args)
    check_folder(Path(args.outdir))
    prompts = asked_prompts(args)
    photo = read_photo(Path(args.init_img))

    # The size to draw in follows from the photo, unless it is given.
    model = model_of(args, prompts)
    if args.H is None and args.W is None:
        side = model.image_size * model.downsampling
        args.W, args.H = drawn_size(photo.size, side, size_step(model))
    recipe = recipe_of(args, model)
    image = fitted(photo, recipe, args.init_img)

    # Encoded once for all batches; then the autoencoder's encoder has no more to do.
    latents = encoded(model, image, args.precision)
    draw = partial(image_to_image, model, latents, precision=args.precision, verbose=True)
    pictures = series_of(args, prompts, recipe)
    ahead = reading_ahead(model, args.precision)
    draw_pictures(args, pictures, drawing_with(draw), print, ahead, init_img=str(args.init_img))


def fitted(photo: Image.Image, recipe: Recipe, path: str) -> Image.Image:
    """Return the photo at the recipe's size, and say what became of it."""
    size = recipe.width, recipe.height
    box = central_box(photo.size, size)
    cut = "" if box is None else f", its middle {box[2] - box[0]}x{box[3] - box[1]}"
    log.info("%s: %dx%d pixels%s, drawn at %dx%d", path, *photo.size, cut, *size)
    return fit(photo, box, size)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: sample(parse(build_parser(), argv)), less_memory=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
