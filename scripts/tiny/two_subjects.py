"""Teach the miniature two subjects: each alone, both with a word each, both with one word.

    python scripts/tiny/two_subjects.py --subjects dog backpack --seeds 23
    python scripts/tiny/two_subjects.py --subjects dog dog2 --seeds 23 24 25
    python scripts/tiny/two_subjects.py --steps 100 \\
        --base configs/tiny/dreambooth.yaml configs/tiny/profiles/bench.yaml

Both together get twice the steps, so that each subject is seen as often as alone. What is measured
is how much of the way from the base model's pictures of the class to the photos' own likeness the
pictures of "photo of a sks dog" have gone, in the middle of the pictures. The same command again
goes on where it was stopped. {outdir} has the table and a sheet of pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import check_once
from ldm.evaluation.intervals import estimate
from ldm.evaluation.metrics import (
    CLIPImages,
    EfficientNetLite0,
    Encoder,
    features_of,
    gap_closed,
    middle,
    similarity,
    similarity_within,
    to_tensor,
)
from ldm.files import write_atomically
from ldm.sampling.contact_sheet import contact_sheet
from ldm.studies.training import LAST, settle_flags, trained
from ldm.tiny import miniature
from ldm.tiny.measure import CLASS_IMAGES, SIZE, SUBJECT_IMAGES
from ldm.tiny.miniature import (
    CLIP_CONFIG,
    CLIP_IMAGES,
    CONFIG,
    WEIGHTS,
    PromptSampler,
    class_word_of,
    photos_of,
    subject_names,
)

STEPS = 400  # of a subject alone
WORDS = ("sks", "shs")
ALONE, APART, SAME = "alone", "a word each", "one word for both"
SHOWN = 6  # pictures in a row of the sheet

Values = dict[str, list[float]]  # of each encoder, how far each picture has gone


@dataclass(frozen=True)
class Case:
    """A training, and the word by which it names each of its subjects.

    Args:
        kind: `alone`, `a word each` or `one word for both`.
        words: by subject.
    """

    kind: str
    words: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{'-'.join(self.words)}"

    def arguments(self, class_images: Path, steps: int) -> list[str]:
        """Return the words of the training command."""
        entries = []
        for place, (subject, word) in enumerate(self.words.items()):
            class_word = class_word_of(photos_of(subject))
            entry = {
                "data_root": str(photos_of(subject)),
                "class_word": class_word,
                "reg_data_root": str(class_images / class_word),
                # Two subjects of one identifier are refused: the captions say it all the same.
                "identifier": WORDS[place],
                "templates": [f"photo of a {word} {{class_word}}"],
            }
            entries.append(entry)
        last = steps * len(entries)
        return [f"data.params.concepts={json.dumps(entries)}", "--max_steps", str(last)]


def cases(subjects: Sequence[str]) -> list[Case]:
    """Return the trainings that are compared."""
    alone = [Case(ALONE, {subject: WORDS[0]}) for subject in subjects]
    apart = Case(APART, dict(zip(subjects, WORDS)))
    return [*alone, apart, Case(SAME, dict.fromkeys(subjects, WORDS[0]))]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = subject_names()
    add("--subjects", nargs=2, choices=known, default=["dog", "backpack"], metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[23], help="of the trainings (default: 23)")
    add("--base", nargs="+", type=Path, default=[CONFIG], metavar="YAML", help="of the trainings")
    add("--steps", type=int, default=STEPS, help="of each subject (default: %(default)s)")
    add("--outdir", type=Path, default=Path("outputs/two-subjects"), help="default: %(default)s")
    return parser


def flags(args: argparse.Namespace) -> list[str]:
    """Return all that makes the trainings what they are, beside the subjects and the seed."""
    quiet = ["image_logger", "run_page", "fixed_loss"]  # they change nothing
    words = ["--base", *map(str, args.base), "--actual_resume", str(WEIGHTS)]
    return [*words, *(f"lightning.callbacks.{name}=null" for name in quiet)]


def tuned(case: Case, seed: int, args: argparse.Namespace) -> Path:
    """Return the checkpoint of a training, which is made if it is not there."""
    folder, name = args.outdir / "runs", f"{case.name}-{args.steps}-{seed}"
    words = [*flags(args), "--seed", str(seed)]
    words += case.arguments(args.outdir.resolve() / f"class_images-{seed}", args.steps)
    return trained(name, folder, words, folder / f"{name}.run") / LAST


@functools.cache
def encoders() -> Mapping[str, Encoder]:
    """Load what compares pictures."""
    clip = CLIPImages(CLIP_IMAGES, to_plain(load_config([CLIP_CONFIG]))["model"])
    return {"EfficientNet-Lite0": EfficientNetLite0(), "CLIP-I": clip}


@functools.cache
def pictures_of_class(class_word: str, seed: int) -> Tensor:
    """Draw the class with the base model."""
    return to_tensor(
        PromptSampler(WEIGHTS, seed)([f"photo of a {class_word}"] * CLASS_IMAGES), SIZE
    )


def gone(pictures: Sequence[Image.Image], subject: str, seed: int) -> Values:
    """Return how much of the gap to a subject's photos each picture has closed."""
    real = to_tensor([load_image(path) for path in find_images(photos_of(subject))], SIZE)
    before = pictures_of_class(class_word_of(photos_of(subject)), seed)
    found = {}
    for name, encode in encoders().items():
        of_real, of_before, shown = (
            features_of(encode, middle(images))
            for images in (real, before, to_tensor(pictures, SIZE))
        )
        start, ceiling = similarity(of_before, of_real), similarity_within(of_real)
        found[name] = [gap_closed(similarity(row[None], of_real), start, ceiling) for row in shown]
    return found


def measure(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Values]:
    """Train a case, draw its subjects, and compare; return it by subject.

    What was measured before is read: the table of many seeds may be made in parts.
    """
    path = args.outdir / "values" / f"{case.name}-{args.steps}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    drawn = draw(case, seed, SUBJECT_IMAGES, args)
    values = {subject: gone(pictures, subject, seed) for subject, pictures in drawn.items()}
    text = json.dumps(values)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    logging.info("seed %d, %s, %s: measured", seed, case.kind, ", ".join(case.words))
    return values


def draw(
    case: Case, seed: int, count: int, args: argparse.Namespace
) -> dict[str, list[Image.Image]]:
    """Draw each subject of a case."""
    sampler = PromptSampler(tuned(case, seed, args), seed)
    drawn = {}
    for subject, word in case.words.items():
        prompt = f"photo of a {word} {class_word_of(photos_of(subject))}"
        drawn[subject] = sampler([prompt] * count)
    return drawn


def compare(args: argparse.Namespace) -> None:
    """Measure all cases; write the table after each seed, and the sheet of the first one."""
    check_once("--subjects", args.subjects)
    check_once("--seeds", args.seeds)
    drawn_by = [str(miniature.RECIPE)]
    settle_flags(args.outdir, {"trainings": flags(args), "pictures": drawn_by})
    name = "-".join(args.subjects)
    found: dict[tuple[str, str, str], Values] = {}  # by kind, subject and encoder: of each seed
    for seed in args.seeds:
        for case in cases(args.subjects):
            for subject, of_encoders in measure(case, seed, args).items():
                for encoder, numbers in of_encoders.items():
                    found.setdefault((case.kind, subject, encoder), {})[str(seed)] = numbers
        table = table_of(found, args.subjects)
        path = args.outdir / f"{name}.md"
        write_atomically(path, lambda temporary: temporary.write_text(table, encoding="utf-8"))  # noqa: B023 - called now
    print(table)
    sheet = contact_sheet(list(sheet_rows(args)), cell=96)
    path = args.outdir / f"{name}.jpg"
    write_atomically(path, lambda temporary: sheet.save(temporary, "JPEG", quality=85))


def sheet_rows(args: argparse.Namespace) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yield the sheet's rows: a photo, then the first pictures of the first seed."""
    for case in cases(args.subjects):
        for subject, pictures in draw(case, args.seeds[0], SHOWN, args).items():
            photo = load_image(find_images(photos_of(subject))[0])
            yield f'{subject}: {case.kind}, "{case.words[subject]}"', [photo, *pictures]


def table_of(found: Mapping[tuple[str, str, str], Values], subjects: Sequence[str]) -> str:
    """Return the table in Markdown. A difference is of pictures from the same noise."""
    names = list(encoders())
    heads = [f"{name}: gap closed | less alone" for name in names]
    lines = [f"| subject | words | {' | '.join(heads)} |", f"|---|---|{'---|' * 2 * len(names)}"]
    for subject in subjects:
        for kind in (ALONE, APART, SAME):
            cells = []
            for encoder in names:
                values, alone = found[kind, subject, encoder], found[ALONE, subject, encoder]
                cells.append(str(estimate(values)))
                differences = {
                    seed: [a - b for a, b in zip(values[seed], alone[seed])] for seed in values
                }
                cells.append("" if kind == ALONE else str(estimate(differences)))
            lines.append(f"| {subject} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
