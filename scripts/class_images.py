"""Fill a folder up to N class images: what an untrained model draws of a class.

    python scripts/class_images.py --ckpt sd-v1-4.ckpt --class_word dog --num 200 \\
        --outdir class_images/dog

By default they are drawn with the ancestral (DDPM) sampler of the paper, over all time steps of the
model. `--sampler ddim --steps 50` takes a twentieth of that time. What is in the folder stays and
counts. The command may be stopped at any time and started again. Several processes, started by
torchrun or srun, take a share each, and draw the pictures that one would. A sheet of the folder's
pictures goes to outputs/sheets, away from what is trained on.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.commands import exit_status
from ldm.data.finding import list_images
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.prompts import captions_from_templates
from ldm.data.reading import load_image
from ldm.distributed import agreed, is_first
from ldm.errors import UserError
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.sampling.class_images import check_class, make_class_images
from ldm.sampling.contact_sheet import contact_sheet
from ldm.sampling.flags import (
    add_model_flags,
    check_folder,
    how_made,
    model_of,
)
from ldm.sampling.pictures import save_numbered
from ldm.sampling.read_ahead import reading_ahead
from ldm.sampling.seeds import check_seed, chosen_seed

COLUMNS, SHOWN = 10, 200  # of the sheet: pictures in a row, and in all


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--class_word", help="the class: 'dog' draws 'photo of a dog', as the training reads it")
    add("--prompt", action="append", help="instead; may be given several times, drawn in turn")
    add("--num", type=int, default=200, help="class images in the folder (default: %(default)s)")
    add("--outdir", required=True, help="the folder; --reg_data_root of the training")
    add("--size", type=int, help="side of a picture, pixels (default: the model's)")
    add("--sampler", default="ddpm", help="default: %(default)s, the ancestral one")
    add("--schedule", help="of noise levels, for samplers that have a choice")
    add("--steps", type=int, help="default: all of the model's for ddpm, else 50")
    add("--eta", type=float, default=0.0, help="of ddim (default: %(default)s)")
    add("--scale", type=float, default=7.5, help="guidance (default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=23,
        help="-1 chooses one at random and says which (default: %(default)s)",
    )
    add("--batch_size", type=int, default=8, help="default: %(default)s")
    add("--exact", action="store_true", help="one picture at a time")
    add(
        "--unconditional",
        type=float,
        default=0.0,
        help="share of pictures of the empty prompt (default: %(default)s)",
    )
    add("--sheets", default="outputs/sheets", help="where the sheet goes (default: %(default)s)")
    add_model_flags(parser)
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Return the prompts; raise a `UserError` for what can be refused before a model is read."""
    if bool(args.class_word) == bool(args.prompt):
        raise UserError("--class_word, --prompt: give one of them")
    for name in ("num", "batch_size", "size", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    if not math.isfinite(args.scale):
        raise UserError(f"--scale {args.scale}: expected a number")
    check_seed(args.seed)
    if not 0 <= args.unconditional < 1:
        raise UserError(f"--unconditional {args.unconditional}: expected a share below 1")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta {args.eta}: expected a number from 0 to 1")
    find_sampler(args.sampler, args.schedule)
    check_folder(Path(args.outdir))
    check_folder(Path(args.sheets))
    # A sheet among the class images would be trained on.
    if Path(args.sheets).resolve().is_relative_to(Path(args.outdir).resolve()):
        raise UserError(f"--sheets {args.sheets}: is in --outdir; choose another folder")
    return args.prompt or captions_from_templates(args.class_word, reg=True)


def fill(args: argparse.Namespace) -> None:
    """Draw what the folder lacks, and leave a sheet of what is in it."""
    prompts, folder = check(args), Path(args.outdir)
    if args.class_word and folder.is_dir():
        check_class(list_images(folder), args.class_word)
    missing = int(agreed(lambda: str(args.num - readable(folder))))
    if missing <= 0:
        print(f"{folder} has {args.num - missing} class images: nothing to draw")
        return

    model = model_of(args)
    sampler, _ = find_sampler(args.sampler, args.schedule)
    make_class_images(
        model,
        folder,
        prompts,
        missing,
        size=args.size or model.image_size * model.downsampling,
        seed=chosen_seed(args.seed),
        device=model.device,
        batch_size=1 if args.exact else args.batch_size,
        steps=args.steps or (len(model.schedule) if sampler == "ddpm" else 50),
        scale=args.scale,
        unconditional=args.unconditional,
        sampler=args.sampler,
        schedule=args.schedule,
        eta=args.eta,
        precision=args.precision,
        shared=True,
        how=how_made(args),
        ahead=reading_ahead(model, args.precision),
    )
    if is_first():
        print(sheet_of(folder, Path(args.sheets)))


def readable(folder: Path) -> int:
    """Count the images of a folder, which may not be there yet.

    Raises:
        UserError: an image does not decode: a training would stop at it.
    """
    if not list_images(folder):
        return 0
    return len(ImageFolderDataset(folder, cache_images=0).check())


def sheet_of(folder: Path, sheets: Path) -> Path:
    """Write a sheet of a folder's first pictures; return its path."""
    paths = list_images(folder)[:SHOWN]
    rows = []
    for start in range(0, len(paths), COLUMNS):
        row = []
        for path in paths[start : start + COLUMNS]:
            row.append((path.stem, load_image(path)))
        rows.append(("", row))
    sheet = contact_sheet(rows, cell=96, title=str(folder))
    return save_numbered(sheet, sheets, prefix=f"{folder.resolve().name}-")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(
        lambda: fill(args), less_memory="a smaller --batch_size or --size, or --precision half"
    )


if __name__ == "__main__":
    sys.exit(main())
