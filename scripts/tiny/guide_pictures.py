"""Draw the pictures of docs/guide.md: what under- and overfitting look like.

    python scripts/tiny/guide_pictures.py --outdir outputs/guide

Three trainings of the miniature on one toy dog: too short, as the config is, and too fast without
the prior. Each is drawn on a sheet, from the same noise. The same command again goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.commands import exit_status
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.files import write_atomically
from ldm.sampling.contact_sheet import Entry, contact_sheet
from ldm.studies.training import LAST, trained
from ldm.tiny.miniature import CONFIG, WEIGHTS, PromptSampler, class_word_of, photos_of

SUBJECT, SEED, PICTURES = "dog", 23, 4
QUIET = ("image_logger", "run_page", "fixed_loss")  # callbacks that change nothing


@dataclass(frozen=True)
class Fit:
    """A training, by what it changes, and what its sheet is called."""

    title: str
    changes: tuple[str, ...] = ()


FITS = {
    "underfit": Fit("underfit: 40 steps", ("--max_steps", "40")),
    "good": Fit("good: 400 steps at 1e-4, with class images"),
    "overfit": Fit(
        "overfit: 200 steps at 5e-4, without the prior",
        (
            *("model.params.reg_weight=0", "data.params.num_class_images=0"),
            *("model.base_learning_rate=5.0e-4", "--max_steps", "200"),
        ),
    ),
}


def checkpoint(name: str, outdir: Path) -> Path:
    """Return what a training has learned; it is made if it is not there."""
    photos, folder = photos_of(SUBJECT), outdir / "runs"
    words = ["--base", str(CONFIG), "--actual_resume", str(WEIGHTS), "--data_root", str(photos)]
    words += ["--class_word", class_word_of(photos), "--seed", str(SEED)]
    words += [f"lightning.callbacks.{callback}=null" for callback in QUIET]
    words += FITS[name].changes
    if "data.params.num_class_images=0" not in words:
        words += ["--reg_data_root", str(outdir.resolve() / "class_images")]
    return trained(name, folder, words, folder / f"{name}.run") / LAST


def sheet_of(name: str, outdir: Path) -> Image.Image:
    """Draw the subject, the subject in prompts, and other things of its class."""
    photos = find_images(photos_of(SUBJECT))[:PICTURES]
    noun = class_word_of(photos_of(SUBJECT))
    subject = f"photo of a sks {noun}"
    asked = {
        "in the snow": f"{subject} in the snow",
        "on the beach": f"{subject} on the beach",
        "at night": f"{subject} at night",
        f"a red sks {noun}": f"photo of a red sks {noun}",
    }
    other = f"photo of a {noun}"
    # One list of prompts, so that each picture's noise is that of its place on the sheet.
    draw = PromptSampler(checkpoint(name, outdir), SEED)
    drawn = draw([subject] * PICTURES + list(asked.values()) + [other] * PICTURES)
    rows: list[tuple[str, Sequence[Entry]]] = [
        ("photos", [load_image(path) for path in photos]),
        (subject, drawn[:PICTURES]),
        (f"{subject} ...", list(zip(asked, drawn[PICTURES:-PICTURES]))),
        (other, drawn[-PICTURES:]),
    ]
    return contact_sheet(rows, title=FITS[name].title)


def run(args: argparse.Namespace) -> None:
    """Draw every sheet."""
    for name in FITS:
        sheet = sheet_of(name, args.outdir)
        path = args.outdir / f"guide-{name}.jpg"
        write_atomically(path, functools.partial(sheet.save, format="JPEG", quality=85))
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outdir", type=Path, default=Path("outputs/guide"), metavar="DIR")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
