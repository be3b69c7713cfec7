"""Sample pictures from a checkpoint.

    python scripts/stable_txt2img.py --ddim_eta 0.0 --n_samples 8 --scale 10 --ddim_steps 100 \\
        --ckpt logs/.../checkpoints/last.ckpt --prompt "photo of a sks dog on the beach"

Pictures go to {outdir}/samples/00000.png, 00001.png, ...; numbers go on from what is there. Each
holds its recipe as PNG metadata. Picture i of a seed is the same whatever the batch size.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm import tqdm

from ldm.checkpoints.ema import WEIGHTS
from ldm.checkpoints.embeddings import read_embeddings
from ldm.checkpoints.export import sha256
from ldm.commands import exit_status
from ldm.data.captions import read_text
from ldm.errors import UserError
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.sampling.metadata import picture_texts
from ldm.sampling.pictures import grid, next_number, save_png
from ldm.sampling.text_to_image import (
    Recipe,
    check_size,
    image_seed,
    load_model,
    pick_device,
    text_to_image,
)

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="what to draw")
    add(
        "--from-file",
        metavar="FILE",
        help="a prompt a line, instead of --prompt; empty lines and those that begin with # "
        "are left out",
    )
    add("--negative_prompt", default="", help="what guidance leads away from")
    add("--ckpt", default="models/ldm/stable-diffusion-v1/model.ckpt", help=".ckpt or .safetensors")
    add(
        "--config", help="the model's YAML (default: the checkpoint's own, else that of its family)"
    )
    add(
        "--weights",
        choices=WEIGHTS,
        help="which of the checkpoint's (default: the EMA weights, if it has them)",
    )
    add("--embedding_path", help="textual-inversion embeddings to add")
    add("--outdir", default="outputs/txt2img-samples", help="default: %(default)s")
    add("--steps", "--ddim_steps", dest="ddim_steps", type=int, default=50, help="default: 50")
    add("--sampler", help="ddim (default), plms, euler, dpmpp_2m, 'DPM++ 2M Karras', ...")
    add("--schedule", help="of noise levels: normal, karras, sgm_uniform, ... (not for ddim, plms)")
    add("--plms", action="store_true", help="the PLMS sampler instead of DDIM")
    add("--ddim_eta", type=float, default=0.0, help="0 is deterministic (default: %(default)s)")
    add("--scale", type=float, default=7.5, help="guidance (default: %(default)s)")
    add("--n_iter", type=int, default=2, help="batches for each prompt (default: %(default)s)")
    add("--n_samples", type=int, default=3, help="pictures in a batch (default: %(default)s)")
    add("--n_rows", type=int, default=0, help="pictures in a row of the grid (default: n_samples)")
    add("--H", type=int, help="height, pixels (default: the model's)")
    add("--W", type=int, help="width, pixels (default: the model's)")
    add("--C", type=int, help="latent channels, only to check the model against")
    add("--f", type=int, help="downsampling factor, only to check the model against")
    add(
        "--seed",
        type=int,
        default=42,
        help="-1 chooses one at random and says which (default: %(default)s)",
    )
    add("--fixed_code", action="store_true", help="the same starting noise in every batch")
    add(
        "--precision", choices=["full", "autocast"], default="autocast", help="default: %(default)s"
    )
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--skip_grid", action="store_true", help="no grid")
    add("--skip_save", action="store_true", help="no single pictures")
    add(
        "--laion400m",
        action="store_true",
        help="not supported: that model's text encoder is not part of this project",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a `UserError` for what no model can do."""
    if args.laion400m:
        raise UserError(
            "--laion400m: not supported: that model's BERT text encoder is not part of this project"
        )
    if args.n_samples < 1 or args.n_iter < 1 or args.n_rows < 0:
        raise UserError("--n_samples and --n_iter must be at least 1, --n_rows at least 0")
    if not math.isfinite(args.scale) or not math.isfinite(args.ddim_eta):
        raise UserError(f"--scale {args.scale} and --ddim_eta {args.ddim_eta} must be numbers")
    if not 0 <= args.ddim_eta <= 1:
        raise UserError(f"--ddim_eta {args.ddim_eta}: expected a number from 0 to 1")
    for flag, value in (("ddim_steps", args.ddim_steps), ("H", args.H), ("W", args.W)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: expected at least 1")
    sampler, _ = chosen_sampler(args)
    if args.ddim_eta and sampler != "ddim":
        raise UserError(f"--ddim_eta {args.ddim_eta}: is for the DDIM sampler, not for {sampler}")


def chosen_sampler(args: argparse.Namespace) -> tuple[str, str | None]:
    """Return the names of the sampler and its schedule; raise as `find_sampler` does."""
    if args.plms and args.sampler:
        raise UserError("--plms: is a sampler itself: leave --sampler out")
    return find_sampler("plms" if args.plms else args.sampler or "ddim", args.schedule)


def check_folder(folder: Path) -> None:
    """Raise a `UserError` if a folder cannot be made, or nothing can be written into it.

    It is not made yet: a command that is refused leaves nothing behind.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place}: a file stands where a folder is needed; choose another --outdir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: cannot write there; choose another --outdir")


def choose_seed(given: int) -> int:
    """Return the seed, or a random one where -1 asks for it, as in AUTOMATIC1111's web UI."""
    if given != -1:
        return given
    seed = secrets.randbelow(2**32)
    log.info("--seed -1: the seed is %d", seed)
    return seed


def read_prompts(args: argparse.Namespace) -> list[list[str]]:
    """Return the batches of prompts: one repeated, or the lines of a file in turn."""
    if not args.from_file:
        return [[args.prompt] * args.n_samples]
    path = Path(args.from_file)
    if not path.is_file():
        raise UserError(f"--from-file {path}: no such file")
    lines = [line.strip() for line in read_text(path, "file of prompts").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--from-file {path}: no prompts in it")

    # Say what becomes of the file: of a single --prompt, --n_samples pictures are drawn.
    size = args.n_samples
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    comments = sum(line.startswith("#") for line in lines)
    left_out = f" ({comments} comments left out)" if comments else ""
    last = f", the last of {len(batches[-1])}" if len(batches[-1]) != size else ""
    log.info("%s: %d prompts%s in batches of %d%s", path, len(prompts), left_out, size, last)
    log.info("each prompt is drawn %d times, as --n_iter says", args.n_iter)
    return batches


def numbered_batches(
    batches: list[list[str]], n_iter: int, fixed_code: bool
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield each batch with the numbers that choose its pictures' noise.

    The numbers begin anew in each batch with `fixed_code`.
    """
    number = 0
    for _ in range(n_iter):
        for batch in batches:
            first = 0 if fixed_code else number
            yield batch, list(range(first, first + len(batch)))
            number += len(batch)


def weights_names(checkpoint: Path) -> dict[str, str]:
    """Return the name and, of a single file, the digest by which other programs know a
    checkpoint.
    """
    is_one_file = checkpoint.is_file() and checkpoint.suffix != ".json"
    digest = {"model_sha256": sha256(checkpoint)} if is_one_file else {}
    return {"model": checkpoint.stem if is_one_file else checkpoint.name, **digest}


def sample(args: argparse.Namespace) -> None:
    """Load, sample, save."""
    # Refuse what can be refused before the minutes that a large model takes to load.
    check_arguments(args)
    batches = read_prompts(args)
    outdir = Path(args.outdir)
    folder = outdir / "samples"
    check_folder(folder)
    if args.skip_save and args.skip_grid:
        log.warning("--skip_save and --skip_grid: no picture will be kept")

    # Load the model, and compare it with what the flags say of it.
    model = load(args)
    side = model.image_size * model.downsampling
    height = side if args.H is None else args.H
    width = side if args.W is None else args.W
    check_size(model, height, width)
    seed = choose_seed(args.seed)
    sampler, schedule = chosen_sampler(args)
    recipe = Recipe(
        args.ddim_steps, args.scale, args.ddim_eta, sampler, height, width, seed, schedule
    )
    weights = {} if args.skip_save else weights_names(Path(args.ckpt))

    # Sample batch by batch. Each picture is written as soon as it is there, whole or not at all, so
    # a command that is stopped keeps those that it has finished.
    made: list[Image.Image] = []
    work = list(numbered_batches(batches, args.n_iter, args.fixed_code))
    try:
        for prompts, numbers in tqdm(work, desc="batches", disable=len(work) == 1):
            seeds = [image_seed(seed, number) for number in numbers]
            images = text_to_image(
                model, prompts, seeds, recipe, args.negative_prompt, args.precision, verbose=True
            )
            folder.mkdir(parents=True, exist_ok=True)
            for prompt, number, image in zip(prompts, numbers, images):
                if not args.skip_save:
                    how = {**weights, "index": number, "ckpt": str(args.ckpt)}
                    texts = picture_texts(prompt, recipe, args.negative_prompt, **how)
                    save_png(image, folder / f"{next_number(folder):05}.png", texts)
                made.append(image)
    finally:
        if made and not args.skip_save:
            print(f"{len(made)} pictures in {folder}")

    # Show them all on one sheet.
    if not args.skip_grid:
        path = outdir / f"grid-{next_number(outdir, 'grid-'):04}.png"
        save_png(grid(made, args.n_rows or args.n_samples), path)
        print(path)


def load(args: argparse.Namespace) -> LatentDiffusion:
    """Return the model that the flags name, with the embeddings that they add."""
    device = pick_device(args.device)
    # Under autocast a GPU would make half-precision copies of the weights anyway.
    halved = args.precision == "autocast" and device.type != "cpu"
    dtype = torch.float16 if halved else None
    model = load_model(args.ckpt, args.config, device, args.weights, dtype)
    for flag, given, actual in (
        ("C", args.C, model.latent_channels),
        ("f", args.f, model.downsampling),
    ):
        if given not in (None, actual):
            raise UserError(f"--{flag} {given}: this model has {actual}")
    if args.embedding_path:
        EmbeddingManager(model.cond_stage_model).load(read_embeddings(args.embedding_path))
    return model


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: sample(args))


if __name__ == "__main__":
    sys.exit(main())
