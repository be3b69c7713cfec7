"""DreamBooth on the miniature cascade beside the latent miniature, and how its super-resolution
is best tuned.

    python scripts/tiny/cascade_tables.py --subjects dog backpack teapot --seeds 23 24 25

Five rows of the paper's scores. The rows of super-resolution enlarge the same small pictures.
{outdir} has table.md, and sheet.jpg with the enlarged pictures of the first seed. The same command
again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ldm.commands import exit_status
from ldm.config import IDENTIFIER, load_yaml, to_plain
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import check_once
from ldm.evaluation.dreambench import Subject, read_dataset
from ldm.evaluation.scores import REAL, Group, Scored, score_group, score_real
from ldm.evaluation.tables import score_table
from ldm.files import write_atomically
from ldm.models.diffusion.super_resolution import LatentUpscaleDiffusion
from ldm.sampling.contact_sheet import Entry, contact_sheet
from ldm.sampling.super_resolution import check_upscales, enlarge
from ldm.sampling.text_to_image import image_seed, load_model
from ldm.studies.drawing import Wanted, draw, series
from ldm.studies.scoring import Scoring
from ldm.studies.training import LAST, settle_flags, trained
from ldm.tiny.miniature import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    CONFIG,
    LARGE,
    ROOT,
    SMALL,
    SR_CONFIG,
    SR_WEIGHTS,
    SUBJECTS,
    WEIGHTS,
    check_cascade,
    subject_names,
)

QUIET = ("image_logger", "run_page", "fixed_loss")  # callbacks that change nothing
SHOWN = 6  # prompts on the sheet
CLASS = "class"  # the folder of its pictures


@dataclass(frozen=True)
class Training:
    """A training of a subject: its config, the weights that it starts from, and what it changes."""

    config: Path
    weights: Path
    prior: bool = True
    changes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """A row of the table, by the names of trainings.

    Args:
        draws: what draws the pictures, or the small ones.
        enlarges: what enlarges them; "" for the untuned model, None where nothing does.
        of_class: whether the class is drawn, too.
    """

    draws: str
    enlarges: str | None = None
    of_class: bool = True


NO_PRIOR, NOISY = "model.params.reg_weight=0", "model.params.noise_augmentation=1.0e-3"
TRAININGS = {
    "latent": Training(CONFIG, WEIGHTS),
    "base": Training(BASE_CONFIG, BASE_WEIGHTS),
    "base-no-prior": Training(BASE_CONFIG, BASE_WEIGHTS, changes=[NO_PRIOR]),
    "sr": Training(SR_CONFIG, SR_WEIGHTS, prior=False),
    "sr-noisy": Training(SR_CONFIG, SR_WEIGHTS, prior=False, changes=[NOISY]),
}
ROWS = {
    "latent miniature": Row("latent"),
    "cascade": Row("base", "sr"),
    "cascade without the prior": Row("base-no-prior", "sr"),
    "super-resolution untuned": Row("base", "", of_class=False),
    "super-resolution tuned with noise of 1e-3": Row("base", "sr-noisy", of_class=False),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, three = parser.add_argument, ["dog", "backpack", "teapot"]
    known = subject_names()
    add("--subjects", nargs="+", choices=known, default=three, metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[23], help="of the trainings (default: 23)")
    add("--steps", type=int, help="of each training (default: the configs')")
    score = ROOT / "models/tiny/score.yaml"
    add("--score", type=Path, default=score, metavar="FILE", help="how pictures are drawn, scored")
    add("--outdir", type=Path, default=Path("outputs/cascade-tables"), help="default: %(default)s")
    return parser


class Study:
    """The trainings, pictures and scores of a folder, each made if it is not there."""

    def __init__(self, args: argparse.Namespace):
        self.outdir, self.steps, self.seeds = args.outdir.resolve(), args.steps, args.seeds
        self.scoring = Scoring.of(to_plain(load_yaml(args.score)), str(args.score))
        self.subjects = read_dataset(SUBJECTS, args.subjects)
        flags = {name: self.flags(training) for name, training in TRAININGS.items()}
        settle_flags(self.outdir, flags)

    def flags(self, training: Training) -> list[str]:
        """Return all that makes a training what it is, beside the subject and the seed."""
        words = ["--base", str(training.config), "--actual_resume", str(training.weights)]
        words += [*training.changes, *(f"lightning.callbacks.{name}=null" for name in QUIET)]
        return [*words, "--max_steps", str(self.steps)] if self.steps else words

    def checkpoint(self, name: str, subject: Subject, seed: int) -> Path:
        """Return what a training has learned of a subject."""
        training, folder = TRAININGS[name], self.outdir / "runs"
        words = self.flags(training)
        words += ["--data_root", str(subject.photos), "--class_word", subject.class_word]
        if training.prior:
            kind = "class_images" if name == "latent" else "class_images_cascade"
            words += ["--reg_data_root", str(self.outdir / kind / subject.class_word)]
        words += ["--seed", str(seed)]
        name = f"{name}-{subject.name}-{seed}"
        return trained(name, folder, words, folder / f"{name}.run") / LAST

    def pictures(self, row: Row, subject: Subject, seed: int) -> tuple[list[Path], list[Path]]:
        """Draw a row's pictures of a subject's prompts, and of its class; return where they are."""
        prompts, of_class = subject.prompts(IDENTIFIER), f"a photo of a {subject.class_word}"
        many = self.scoring.images or 1
        place = self.outdir / row.draws / f"{subject.name}-{seed}"
        drawn = series(prompts, many, place / "subject")
        drawn += series([of_class], self.scoring.class_images, place / CLASS)
        recipe = self.scoring.recipe
        if row.enlarges is not None:
            recipe = replace(recipe, height=SMALL.height, width=SMALL.width, sampler=SMALL.sampler)
        checkpoint = self.checkpoint(row.draws, subject, seed)
        draw(checkpoint, drawn, recipe, self.scoring.batch_size, self.scoring.device)

        paths = [picture.path for picture in drawn]
        if row.enlarges is not None:
            paths = self.enlarged(row, drawn, subject, seed)
        count = len(prompts) * many
        return paths[:count], paths[count:] if row.of_class else []

    def enlarged(
        self, row: Row, drawn: Sequence[Wanted], subject: Subject, seed: int
    ) -> list[Path]:
        """Enlarge small pictures, as far as they are not; return where the large ones are."""
        name = row.enlarges or "untuned"
        place = self.outdir / f"{row.draws}-{name}" / f"{subject.name}-{seed}"
        paths = [place / picture.path.parent.name / picture.path.name for picture in drawn]
        pairs = [pair for pair in zip(drawn, paths) if row.of_class or pair[1].parent.name != CLASS]
        if all(path.exists() for _, path in pairs):
            return paths
        model = upscaler(self.checkpoint(name, subject, seed) if row.enlarges else SR_WEIGHTS)
        for start in range(0, len(pairs), self.scoring.batch_size):
            part = pairs[start : start + self.scoring.batch_size]
            if all(path.exists() for _, path in part):
                continue
            images = enlarge(
                model,
                [load_image(picture.path) for picture, _ in part],
                [picture.prompt for picture, _ in part],
                [image_seed(self.scoring.seed, picture.index) for picture, _ in part],
                replace(self.scoring.recipe, scale=LARGE.scale, sampler=LARGE.sampler),
            )
            for (_, path), image in zip(part, images):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, functools.partial(image.save, format="PNG"))
        return paths

    def scores(self, row: Row, subject: Subject, seed: int) -> dict[str, float]:
        """Return what the pictures of a row score for a subject."""
        shown, of_class = self.pictures(row, subject, seed)
        texts = subject.prompts(IDENTIFIER)
        many = len(shown) // len(texts)
        group = Group(
            subject.name,
            [load_image(path) for path in shown],
            [text for text in texts for _ in range(many)],
            photos_of(subject),
            [load_image(path) for path in of_class],
        )
        return score_group(group, self.scoring.load(), self.scoring.rules(), IDENTIFIER)

    def table(self) -> dict[str, Scored]:
        """Return the rows of the table."""
        encoders, protocol = self.scoring.load(), self.scoring.rules().name
        rows = {name: Scored(protocol, encoders.hashes) for name in [REAL, *ROWS]}
        for subject in self.subjects:
            real = score_real(photos_of(subject), encoders)
            rows[REAL].rows.append({"subject": subject.name, "seed": "", **real})
        for name, row in ROWS.items():
            for seed in self.seeds:
                for subject in self.subjects:
                    found = self.scores(row, subject, seed)
                    logging.info("%s, %s, seed %d: %s", name, subject.name, seed, found)
                    rows[name].rows.append({"subject": subject.name, "seed": str(seed), **found})
        return rows

    def sheet_rows(self) -> Iterator[tuple[str, list[Entry]]]:
        """Yield the sheet's rows: a photo, then the same small pictures, enlarged in each way."""
        seed = self.seeds[0]
        for subject in self.subjects:
            photo = photos_of(subject)[0]
            for name, row in ROWS.items():
                if row.draws != "base":
                    continue
                paths = self.pictures(row, subject, seed)[0]
                firsts = paths[:: self.scoring.images or 1][:SHOWN]
                yield f"{subject.name}: {name}", [photo, *map(load_image, firsts)]


def photos_of(subject: Subject) -> list[Image.Image]:
    """Read a subject's photos."""
    return [load_image(path) for path in find_images(subject.photos)]


@functools.lru_cache(maxsize=1)
def upscaler(weights: Path) -> LatentUpscaleDiffusion:
    """Load a model that enlarges."""
    return check_upscales(load_model(weights))


def compare(args: argparse.Namespace) -> None:
    """Do what is missing, then write the table and the sheet."""
    check_cascade()
    check_once("--seeds", args.seeds)
    study = Study(args)
    table = score_table(study.table(), study.scoring.rules())
    sheet = contact_sheet(list(study.sheet_rows()), cell=128)
    path = args.outdir / "sheet.jpg"
    write_atomically(path, lambda temporary: sheet.save(temporary, "JPEG", quality=88))
    path = args.outdir / "table.md"
    write_atomically(path, lambda temporary: temporary.write_text(table, encoding="utf-8"))
    print(table)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
