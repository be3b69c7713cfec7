"""Draw pictures of a text by a cascade: a base model draws small ones, a second one enlarges them.

    python scripts/cascade_txt2img.py --base_ckpt BASE/last.ckpt --sr_ckpt SR/last.ckpt \\
        --prompt "photo of a sks dog on the beach"
    python scripts/cascade_txt2img.py --sr_ckpt x4-upscaler-ema.ckpt --init-img small.png \\
        --prompt "photo of a dog"

Pictures go to {outdir}/samples, as those of txt2img.py do; with --save_base the small ones go to
{outdir}/base. --sampler, --steps, --scale, --H and --W are of the small pictures, --sr_sampler,
--sr_steps and --sr_scale of the large ones. --augmentation says how far the second model trusts
the small picture. A picture of --init-img keeps its size: its sides times the model's factor.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.evaluation.prompt_suites import asked_prompts
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.models.diffusion.super_resolution import LatentUpscaleDiffusion, sampled_level
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
from ldm.sampling.metadata import picture_texts
from ldm.sampling.photos import read_photo
from ldm.sampling.pictures import save_numbered
from ldm.sampling.read_ahead import read_ahead
from ldm.sampling.series import Batch, Draw, Picture, series_of
from ldm.sampling.super_resolution import check_upscales, enlarge
from ldm.sampling.text_to_image import Recipe, check_draws

log = logging.getLogger(__name__)

OF_SR = ("sr_steps", "sr_scale", "sr_sampler", "augmentation", "sr_ckpt", "init_img")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("cascade").add_argument
    add("--base_ckpt", dest="ckpt", help="the base model, which draws the small pictures")
    add("--sr_ckpt", help="the super-resolution model, which enlarges them")
    add("--init-img", help="enlarge this picture instead of drawing small ones")
    add("--sr_config", help="its YAML (default: the checkpoint's own, or its family's)")
    add("--sr_steps", type=int, default=50, help="default: %(default)s")
    add("--sr_sampler", default="ddim", help="default: %(default)s")
    add("--sr_scale", type=float, default=1.0, help="guidance (default: %(default)s, none)")
    add(
        "--augmentation",
        type=float,
        metavar="VARIANCE",
        help="of the noise on the small picture (default: as in training, else 1e-3)",
    )
    add("--save_base", action="store_true", help="write the small pictures, too")
    add_prompt_flags(parser)
    add_model_flags(parser, ckpt=False)
    add_recipe_flags(parser)
    add_series_flags(parser, outdir="outputs/cascade-samples")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a `UserError` for what can be refused before the minutes that large models take."""
    # A picture that --init-img made names its one model as both.
    if args.init_img and args.ckpt == args.sr_ckpt:
        args.ckpt = None
    if not args.sr_ckpt:
        raise UserError("--sr_ckpt: which super-resolution model? give --sr_ckpt FILE")
    if bool(args.ckpt) == bool(args.init_img):
        raise UserError("give --base_ckpt FILE, which draws small pictures, or --init-img PICTURE")
    for flag in ("ckpt", "sr_ckpt", "init_img"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            name = {"ckpt": "base_ckpt", "init_img": "init-img"}.get(flag, flag)
            raise UserError(f"--{name} {path}: no such file")
    if args.sr_steps < 1 or not math.isfinite(args.sr_scale):
        raise UserError("--sr_steps must be at least 1, --sr_scale a number")
    if args.augmentation is not None and not args.augmentation > 0:
        raise UserError(f"--augmentation {args.augmentation}: expected a positive variance")
    find_sampler(args.sr_sampler)
    check_flags(args)
    check_folder(Path(args.outdir))


def sample(args: argparse.Namespace) -> None:
    """Read the prompts, load both models, draw, and show all pictures on one sheet."""
    check(args)
    prompts = asked_prompts(args)
    photo = given_picture(args) if args.init_img else None
    large = check_upscales(model_of(_of_sr(args)))
    # What this raises would else come behind the first small pictures.
    sampled_level(large, large.low_scale_model, large.small, args.augmentation)
    base = model_of(args, prompts) if photo is None else None
    if base is None:
        assert photo is not None
        args.W, args.H = (large.small.factor * side for side in photo.size)
        recipe = of_large(args, recipe_of(args, large))
        draw_small: Draw = lambda batch: [photo] * len(batch)  # noqa: E731
    else:
        check_draws(base)
        recipe, draw_small = recipe_of(args, base), drawing(base, args)
        warn_of_size(large, recipe)
    pictures = series_of(args, prompts, recipe)
    how = {name: getattr(args, name) for name in OF_SR if getattr(args, name) is not None}
    draw = enlarging(large, draw_small, args)

    def ahead(batches: Sequence[Batch]) -> None:
        if base is not None:
            read_ahead(base, batches, args.precision)
        read_ahead(large, [batch_of_large(args, batch) for batch in batches], args.precision)

    draw_pictures(_of_sr(args) if base is None else args, pictures, draw, print, ahead, **how)


def given_picture(args: argparse.Namespace) -> Image.Image:
    """Return the picture of --init-img; raise a `UserError` where it is not of the size given."""
    photo = read_photo(Path(args.init_img))
    for flag, side in zip(("W", "H"), photo.size):
        # A picture of --like says the size of the large one.
        if flag in args.given and getattr(args, flag) != side:
            raise UserError(
                f"--{flag} {getattr(args, flag)}: {args.init_img} is {photo.width}x{photo.height} "
                "pixels, and is enlarged as it is: leave --H and --W out, or give a picture of "
                "that size"
            )
    return photo


def warn_of_size(large: LatentUpscaleDiffusion, recipe: Recipe) -> None:
    """Warn of small pictures of another size than the second model was taught to enlarge."""
    side = large.image_size * large.downsampling // large.small.factor
    if (recipe.width, recipe.height) != (side, side):
        log.warning(
            "the small pictures are %d x %d pixels, and --sr_ckpt was taught %d x %d: "
            "is --base_ckpt the right one?",
            *(recipe.width, recipe.height, side, side),
        )


def of_large(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """Return a recipe as the flags of the super-resolution model have it."""
    sampler, schedule = find_sampler(args.sr_sampler)
    return Recipe(
        steps=args.sr_steps,
        scale=args.sr_scale,
        sampler=sampler,
        schedule=schedule,
        height=recipe.height,
        width=recipe.width,
        seed=recipe.seed,
        thresholding=recipe.thresholding,
    )


def batch_of_large(args: argparse.Namespace, batch: Batch) -> Batch:
    """Return a batch with the recipe of the super-resolution model."""
    pictures = [replace(one, recipe=of_large(args, one.recipe)) for one in batch.pictures]
    return replace(batch, pictures=tuple(pictures))


def _of_sr(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags as the super-resolution model's: its file, its config, no embeddings."""
    changed = {"ckpt": args.sr_ckpt, "config": args.sr_config, "C": None, "f": None}
    return argparse.Namespace(**{**vars(args), **changed, "embedding_path": None})


def drawing(model: LatentDiffusion, args: argparse.Namespace) -> Draw:
    """Return what draws a batch of small pictures, and writes them if the flags say so."""
    draw_texts = text_drawing(model, args.precision)
    if not args.save_base:
        return draw_texts
    how: dict[str, Any] = how_made(args)

    def draw(batch: Sequence[Picture]) -> list[Image.Image]:
        images = draw_texts(batch)
        for picture, image in zip(batch, images):
            texts = picture_texts(
                picture.prompt,
                picture.recipe,
                picture.negative_prompt,
                index=picture.index,
                noise_seed=picture.noise_seed,
                **how,
            )
            folder = Path(args.outdir) / "base"
            folder.mkdir(parents=True, exist_ok=True)
            save_numbered(image, folder, texts)
        return images

    return draw


def enlarging(model: LatentUpscaleDiffusion, draw_small: Draw, args: argparse.Namespace) -> Draw:
    """Return what draws a batch of pictures: small ones, enlarged."""

    def draw(batch: Sequence[Picture]) -> list[Image.Image]:
        small = draw_small(batch)
        width, height = (model.small.factor * side for side in small[0].size)
        recipe = replace(of_large(args, batch[0].recipe), height=height, width=width)
        return enlarge(
            model,
            small,
            [picture.prompt for picture in batch],
            [picture.noise_seed for picture in batch],
            recipe,
            args.augmentation,
            batch[0].negative_prompt,
            args.precision,
            verbose=True,
        )

    return draw


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: sample(parse(build_parser(), argv)), less_memory=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
