"""The flags that the sampling commands share: one place for their names, defaults and checks.

A command adds the groups that it wants, parses with `parse`, and asks for what the flags say:

    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    add_recipe_flags(parser)
    add_series_flags(parser, outdir="outputs/txt2img-samples")
    args = parse(parser, argv)
    check_flags(args)
    model = model_of(args)
    recipe = recipe_of(args, model)

A new knob of a picture is a field of `Recipe` and a flag with the same name. Then it is in the
picture's metadata, and `--like` reads it back from there.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.ema import WEIGHTS
from ldm.commands import check_writable
from ldm.distributed import share
from ldm.errors import UserError
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.models.diffusion.thresholding import threshold_of
from ldm.modules.encoders.weighting import WEIGHTINGS
from ldm.sampling.first_stage import save_memory
from ldm.sampling.image_to_image import steps_of
from ldm.sampling.like import FLAG_OF, digests_of, flags_of_picture
from ldm.sampling.metadata import weights_names
from ldm.sampling.precision import PRECISIONS, dtype_of_weights, halve
from ldm.sampling.prompting import guidance_of
from ldm.sampling.seeds import check_seed, chosen_seed
from ldm.sampling.text_to_image import Recipe, check_size, load_model, pick_device

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

DEFAULT_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
SWITCHES = ("compile", "vae_tiling", "vae_slicing")  # kernels of another rounding
_MISSING: Any = object()  # the value of a flag that is not given
# A text that is empty means something in these; in others it is a shell variable that is not set.
_MAY_BE_EMPTY = ("prompt", "negative_prompt")


# The flags


def add_model_flags(parser: argparse.ArgumentParser, ckpt: bool = True) -> None:
    """Add the flags that choose a model, and how it computes.

    Args:
        ckpt: whether there is a `--ckpt`; a command may name its model in another way.
    """
    add = parser.add_argument_group("model").add_argument
    if ckpt:
        add("--ckpt", default=DEFAULT_CKPT, help=".ckpt, .safetensors or a diffusers folder")
    add("--config", help="the model's YAML (default: the checkpoint's own, or its family's)")
    add(
        "--weights",
        choices=WEIGHTS,
        help="which of the checkpoint's (default: the EMA weights, if it has them)",
    )
    add("--embedding_path", help="textual-inversion embeddings to add")
    add("--C", type=int, help="latent channels, only to check the model against")
    add("--f", type=int, help="downsampling factor, only to check the model against")
    add(
        "--precision",
        choices=PRECISIONS,
        default="autocast",
        help="float32; half precision for matrices on a GPU; half precision all through, which is "
        "bfloat16 on a CPU (default: %(default)s)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let torch.compile make the UNet's pass: minutes at first, then faster",
    )
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add(
        "--vae_tiling",
        action="store_true",
        help="decode large pictures in tiles: bounded memory, other pixels",
    )
    add("--vae_slicing", action="store_true", help="decode the pictures of a batch one by one")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to draw."""
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="what to draw")
    add(
        "--from-file",
        metavar="FILE",
        help="a prompt a line, instead of --prompt; empty lines and those that begin with # "
        "are left out",
    )
    add(
        "--suite",
        metavar="NAME",
        help="the prompts of configs/prompts/NAME.yaml, such as art, or of a file like those",
    )
    add("--subject", metavar="'sks dog'", help="identifier and class word, for --suite")
    add("--negative_prompt", default="", help="what guidance leads away from")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a picture is drawn."""
    add = parser.add_argument_group("recipe").add_argument
    add("--steps", "--ddim_steps", dest="ddim_steps", type=int, default=50, help="default: 50")
    add("--sampler", help="ddim (default), plms, euler, dpmpp_2m, 'DPM++ 2M Karras', ...")
    add("--schedule", help="of noise levels: normal, karras, sgm_uniform, ... (not for ddim, plms)")
    add("--plms", action="store_true", help="the PLMS sampler instead of DDIM")
    add("--ddim_eta", type=float, default=0.0, help="0 is deterministic (default: %(default)s)")
    add("--scale", type=float, default=7.5, help="guidance (default: %(default)s)")
    add_guidance_flags(parser)
    add(
        "--thresholding",
        metavar="NAME",
        help="of predicted images: none, static, dynamic, dynamic:0.99 (default: the model's)",
    )
    add("--H", type=int, help="height, pixels (default: the model's)")
    add("--W", type=int, help="width, pixels (default: the model's)")
    add(
        "--seed",
        type=int,
        default=42,
        help="-1 chooses one at random and says which (default: %(default)s)",
    )


def add_guidance_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change guidance, and how a prompt is read; by default nothing does."""
    add = parser.add_argument_group("guidance and prompt").add_argument
    add(
        "--weighting",
        choices=WEIGHTINGS,
        help="read (w:1.3), [w], BREAK and long prompts as AUTOMATIC1111's web UI does",
    )
    add(
        "--rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="give a guided output the spread of the prompt's own: 0 not, 0.7 as in 2305.08891",
    )
    add(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels above LOW and up to HIGH, such as 0.3 5 (2404.07724)",
    )
    add(
        "--apg",
        type=float,
        nargs="*",
        metavar="NUMBER",
        help="projected guidance (2410.02416), by default with ETA 0, NORM 7.5, MOMENTUM -0.75",
    )
    add(
        "--guide_ckpt",
        metavar="BASE",
        help="the model that this one was tuned from, in place of the empty prompt (2508.00319)",
    )
    add(
        "--guide_mix",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="how much of the tuned weights is mixed into those of --guide_ckpt (default: 0)",
    )


def add_series_flags(parser: argparse.ArgumentParser, outdir: str) -> None:
    """Add the flags that say how many pictures there are, which of them, and where they go."""
    add = parser.add_argument_group("series").add_argument
    add("--n_samples", type=int, default=3, help="pictures in a batch (default: %(default)s)")
    add("--n_iter", type=int, default=2, help="batches for each prompt (default: %(default)s)")
    add("--only", type=whole_numbers, metavar="I,J", help="of the series, only these pictures")
    add("--fixed_code", action="store_true", help="the same starting noise in every batch")
    add(
        "--exact",
        action="store_true",
        help="one picture at a time, so that its pixels do not depend on a batch",
    )
    add(
        "--like",
        metavar="PNG",
        help="draw this picture again; flags that are given beside it change its recipe",
    )
    add("--outdir", default=outdir, help="default: %(default)s")
    add("--n_rows", type=int, default=0, help="pictures in a row of the grid (default: n_samples)")
    add("--skip_grid", action="store_true", help="no grid")
    add("--skip_save", action="store_true", help="no single pictures")


def whole_numbers(text: str) -> list[int]:
    """Read numbers from 0 that commas separate."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers from 0, got {text}")
    return numbers


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; with `--like`, those that are not given are as the picture has them.

    `given` of the result holds the names of those that were given.

    Raises:
        UserError: the picture says nothing of how it was made, or not enough; or a flag is empty.
    """
    # All flags with their defaults.
    args = parser.parse_args(argv)
    # Parse again, without the defaults: what has a value then was given.
    without = argparse.Namespace(**dict.fromkeys(vars(args), _MISSING))
    found = vars(parser.parse_args(argv, without))
    args.given = {name for name, value in found.items() if value is not _MISSING}
    for action in parser._actions:
        if found.get(action.dest) == "" and action.dest not in _MAY_BE_EMPTY:
            raise UserError(
                f"{action.option_strings[0]}: is empty; give it a value, or leave it out"
            )
    # A picture that is drawn again says the rest.
    args.like_batch, args.like_device = None, None
    if getattr(args, "like", None):
        for name, value in flags_of_picture(args.like, args).items():
            if name not in args.given:
                setattr(args, name, value)
    return args


# Checks


def check_flags(args: argparse.Namespace) -> None:
    """Raise a `UserError` for what no model can do."""
    if args.n_samples < 1 or args.n_iter < 1 or args.n_rows < 0:
        raise UserError("--n_samples and --n_iter must be at least 1, --n_rows at least 0")
    check_recipe_flags(args)
    if args.skip_save and args.skip_grid:
        log.warning("--skip_save and --skip_grid: no picture will be kept")
    # Each process draws a share, and the first makes the grid of the files of all.
    _, world = share()
    if world > 1 and args.skip_save and not args.skip_grid:
        raise UserError("--skip_save: several processes share the pictures by their files")


def check_recipe_flags(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a recipe that no model can follow."""
    # Numbers that are none, or that mean nothing.
    if not math.isfinite(args.scale) or not math.isfinite(args.ddim_eta):
        raise UserError(f"--scale {args.scale} and --ddim_eta {args.ddim_eta} must be numbers")
    if not 0 <= args.ddim_eta <= 1:
        raise UserError(f"--ddim_eta {args.ddim_eta}: expected a number from 0 to 1")
    for flag, value in (("ddim_steps", args.ddim_steps), ("H", args.H), ("W", args.W)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: expected at least 1")
    # Names and numbers that belong together.
    check_guidance_flags(args)
    threshold_of(args.thresholding)
    check_seed(args.seed)
    # A photo's strength leaves only some of the steps, which may be none.
    strength = getattr(args, "strength", None)
    if strength is not None:
        steps_of(strength, args.ddim_steps)
    # Other samplers have noise of their own, or none.
    sampler, _ = chosen_sampler(args)
    if args.ddim_eta and sampler != "ddim":
        raise UserError(f"--ddim_eta {args.ddim_eta}: is for the DDIM sampler, not for {sampler}")


def check_guidance_flags(args: argparse.Namespace) -> None:
    """Raise a `UserError` for guidance that means nothing, or that would have no effect."""
    if args.apg is not None and len(args.apg) > 3:
        raise UserError(f"--apg: expected at most ETA NORM MOMENTUM, got {len(args.apg)} numbers")
    if args.interval is not None and len(args.interval) != 2:
        raise UserError(f"--interval: expected LOW HIGH, got {len(args.interval)} numbers")
    # At scale 1 the empty prompt is not even computed, so nothing could be changed.
    changed = guidance_of(args) != Guidance() or args.guide_ckpt is not None
    if changed and args.scale == 1.0:
        raise UserError(
            "--scale 1 is no guidance: leave --rescale, --interval, --apg and --guide_ckpt out"
        )
    if args.negative_prompt and args.scale == 1.0:
        log.warning("--negative_prompt: without effect at --scale 1, which is no guidance")
    # A share of 1 would be the tuned model itself.
    if not 0 <= args.guide_mix < 1:
        raise UserError(f"--guide_mix {args.guide_mix}: expected a number from 0 to below 1")
    if args.guide_mix and args.guide_ckpt is None:
        raise UserError(f"--guide_mix {args.guide_mix}: is of --guide_ckpt, which is not given")
    if args.guide_ckpt is not None and not Path(args.guide_ckpt).exists():
        raise UserError(f"--guide_ckpt {args.guide_ckpt}: no such checkpoint")


def check_folder(folder: Path) -> None:
    """Raise a `UserError` if a folder cannot be made, or nothing can be written into it."""
    check_writable(folder, "choose another --outdir")


# What the flags say


def chosen_sampler(args: argparse.Namespace) -> tuple[str, str | None]:
    """Return the names of the sampler and its schedule; raise as `find_sampler` does."""
    if args.plms and args.sampler:
        raise UserError("--plms: is a sampler itself: leave --sampler out")
    return find_sampler("plms" if args.plms else args.sampler or "ddim", args.schedule)


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that is named, or the best one; of several processes, each has its own."""
    return pick_device(args.device)


def model_of(args: argparse.Namespace, prompts: Sequence[str] = ()) -> LatentDiffusion:
    """Return the model that the flags name, with the embeddings that they add.

    Args:
        prompts: that it will draw. An embedding whose word is in none of them is warned of.
    """
    from ldm.checkpoints.embeddings import read_embeddings, warn_if_unused
    from ldm.modules.embedding_manager import EmbeddingManager

    device = device_of(args)
    before = getattr(args, "like_device", None)
    if before not in (None, device.type):
        log.warning("%s: was drawn on %s; on %s its pixels may differ", args.like, before, device)
    # Load it, and compare it with what the user believes it to be.
    dtype = dtype_of_weights(device, args.precision)
    model = load_model(args.ckpt, args.config, device, args.weights, dtype)
    for flag, given, actual in (
        ("C", args.C, model.latent_channels),
        ("f", args.f, model.downsampling),
    ):
        if given not in (None, actual):
            raise UserError(f"--{flag} {given}: this model has {actual}")
    # Add words, then choose how it computes: the words are read in the precision of the rest.
    if args.embedding_path:
        words = EmbeddingManager(model.cond_stage_model).load(read_embeddings(args.embedding_path))
        if prompts:
            warn_if_unused(args.embedding_path, words, [*prompts, args.negative_prompt])
    if args.precision == "half":
        halve(model)
    if args.compile:
        model.model.diffusion_model.compile_for_sampling()
    save_memory(model, args.vae_tiling, args.vae_slicing)
    return model


def recipe_of(args: argparse.Namespace, model: LatentDiffusion) -> Recipe:
    """Return the recipe that the flags give, with the model's size where they give none.

    Raises:
        UserError: a size that the model cannot have.
    """
    # Every field of the recipe that this command has a flag for.
    flags = {field.name: FLAG_OF.get(field.name, field.name) for field in fields(Recipe)}
    values = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}

    # Flags that may be left out, or may say the same in several ways.
    side = model.image_size * model.downsampling
    for name in ("height", "width"):
        if values[name] is None:
            values[name] = side
    check_size(model, values["height"], values["width"])
    values["sampler"], values["schedule"] = chosen_sampler(args)
    values["seed"] = chosen_seed(args.seed)
    return Recipe(**values)


def how_made(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the metadata of all pictures says besides prompt and recipe."""
    how = {name: getattr(args, name) for name in ("ckpt", "config", "weights", "embedding_path")}
    how = {name: str(value) for name, value in how.items() if value is not None}
    how |= {"precision": args.precision, "device": device_of(args).type}
    how |= {f"{name}_sha256": digest for name, digest in digests_of(args).items()}
    how |= {name: True for name in SWITCHES if getattr(args, name)}
    return {**weights_names(Path(args.ckpt)), **how}
