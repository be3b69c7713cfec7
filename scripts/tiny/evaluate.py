"""Measure the miniature and write `docs/results.md`.

The base model is measured first, then DreamBooth for every subject and seed.

    pip install -e '.[world]'
    python scripts/tiny/fetch_sprites.py       # the classifiers learn from renderings
    python scripts/tiny/evaluate.py --seeds 23 24 25

What was measured before, with the same weights and config, is in `--outdir` and is not measured
again. So several processes can share the work, each with some of the `--subjects`. The last one
writes the whole report.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.reading import read_checkpoint
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.metrics import (
    CLIPImages,
    EfficientNetLite0,
    EfficientNetMaps,
    Recognizer,
    to_tensor,
)
from ldm.files import save_checkpoint, write_atomically
from ldm.sampling.text_to_image import load_model
from ldm.tiny import miniature
from ldm.tiny.applications import known_classes
from ldm.tiny.attributes import (
    fit_attribute_judge,
    make_attribute_judge,
    measure_applications,
    measure_attributes,
)
from ldm.tiny.measure import (
    SIZE,
    Judges,
    Reconstruct,
    fit_recognizer,
    make_recognizer,
    measure_base,
    measure_decoder,
    measure_pictures,
    measure_subject,
)
from ldm.tiny.miniature import (
    CLIP_CONFIG,
    CLIP_IMAGES,
    CONFIG,
    ROOT,
    WEIGHTS,
    PromptSampler,
    class_word_of,
    dreambooth,
    photos_of,
    subject_names,
)
from ldm.tiny.report import WITH, WITHOUT, Results, report_of
from ldm.tiny.world import SPRITES, World


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(subject_names())
    parser.add_argument(
        "--subjects",
        nargs="*",
        help=f"toys that ship, or folders of photos named after a class (default: {names})",
    )
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[23, 24, 25], help="default: 23 24 25"
    )
    parser.add_argument(
        "--without_prior", nargs="*", default=["dog"], metavar="SUBJECT", help="default: dog"
    )
    parser.add_argument("--sprites", type=Path, default=SPRITES, help="default: %(default)s")
    parser.add_argument(
        "--outdir", type=Path, default=Path("outputs/evaluation"), help="default: %(default)s"
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="the miniature (default: %(default)s)"
    )
    parser.add_argument(
        "--clip_images",
        type=Path,
        default=CLIP_IMAGES,
        help="the image tower of its CLIP (default: %(default)s)",
    )
    parser.add_argument(
        "--base_only", action="store_true", help="measure the base model alone; write no report"
    )
    parser.add_argument(
        "--report", type=Path, default=ROOT / "docs/results.md", help="default: %(default)s"
    )
    return parser


def worlds(sprites: Path, plain: bool = True) -> tuple[World, World]:
    """Return the world that the miniature was trained on, and the designs that its CLIP never saw.

    Plain worlds have no style, no material, no accessory and no view, as "a photo of a dog" asks.
    """
    common = {"classes": known_classes(), "labels": True, "held_out": 0.1, "plain": plain}
    return World(sprites, split="train", **common), World(sprites, split="test", **common)


def make_judges(clip_images: Path, train: World, path: Path, reconstruct: Reconstruct) -> Judges:
    """Make the two encoders, and the classifiers of class and scene."""
    clip = CLIPImages(clip_images, to_plain(load_config([CLIP_CONFIG]))["model"])
    encoders = {"CLIP-I": clip, "EfficientNet-Lite0": EfficientNetLite0()}
    recognizer = make_recognizer(EfficientNetMaps(), train.classes)
    fitted(recognizer, path, lambda: fit_recognizer(recognizer, train, reconstruct))
    return Judges(encoders, recognizer)


def fitted(recognizer: Recognizer, path: Path, fit: Callable[[], None]) -> Recognizer:
    """Fit a recognizer and keep it in `path`, or read it from there if it was fitted before."""
    if path.is_file():
        state = read_checkpoint(path)
        recognizer.add_heads(len(state["mean"]))
        recognizer.load_state_dict(state)
    else:
        fit()
        save_checkpoint(recognizer.state_dict(), path)
    return recognizer


@functools.cache
def base_sampler(weights: Path, seed: int) -> Callable[[Sequence[str]], list[Any]]:
    """Make what draws with the base model: the same prompts are drawn once for all subjects."""
    draw = functools.cache(PromptSampler(weights, seed))
    return lambda prompts: draw(tuple(prompts))


def results_folder(outdir: Path, *files: Path) -> Path:
    """Return the folder of `outdir` for what is measured of these files, drawn by today's recipe.

    Results of other weights, another config or another recipe stay in a folder of their own.
    """
    digest = hashlib.sha256(repr(miniature.RECIPE).encode())
    for file in files:
        digest.update(file.read_bytes())
    return outdir / digest.hexdigest()[:8]


def remembered(path: Path, measure: Callable[[], Results]) -> Results:
    """Return the results in a file. If it is not there, measure them and write it."""
    if not path.is_file():
        text = json.dumps(measure(), indent=1)
        write_atomically(path, lambda temporary: temporary.write_text(text))
    return json.loads(path.read_text())


def check_subjects(subjects: Sequence[str]) -> None:
    """Refuse what is neither a subject that ships nor a folder of photos named after a class."""
    for subject in subjects:
        if subject in subject_names():
            continue
        if not Path(subject).is_dir():
            there = ", ".join(subject_names())
            raise UserError(f"--subjects: unknown {subject}, and no folder; there are {there}")
        if class_word_of(Path(subject)) not in known_classes():
            raise UserError(
                f"--subjects {subject}: name the folder after one of the classes that the "
                f"miniature knows: {', '.join(known_classes())}"
            )
    labels = [label_of(subject) for subject in dict.fromkeys(subjects)]
    if len(set(labels)) < len(labels):
        raise UserError("--subjects: two folders of one name; measure them with two --outdir")


def label_of(subject: str) -> str:
    """Return what a subject is called in tables. A folder never takes a toy's name."""
    return subject if subject in subject_names() else f"{Path(subject).resolve().name} (photos)"


def file_name_of(subject: str) -> str:
    """Return what its results are called: of a folder, with a digest of the photos in it."""
    if subject in subject_names():
        return subject
    digest = hashlib.sha256()
    for path in find_images(Path(subject)):
        digest.update(path.read_bytes())
    return f"{Path(subject).resolve().name}-photos-{digest.hexdigest()[:8]}"


def evaluate(args: argparse.Namespace) -> None:
    """Measure what is missing, then write the report."""
    subjects = args.subjects or subject_names()
    check_subjects([*subjects, *args.without_prior])
    outdir = results_folder(args.outdir, args.weights, CONFIG)
    begin = time.monotonic()

    def measured(name: str, measure: Callable[[], Results]) -> Results:
        results = remembered(outdir / f"{name}.json", measure)
        print(f"{(time.monotonic() - begin) / 60:5.1f} min  {name}", flush=True)
        return results

    # The base model: classes and scenes, then what the wider world has.
    judges = make_all_judges(args, outdir)
    base: Results = {}
    for part, measure in base_parts(args, judges).items():
        base |= measured(part, measure)
    if args.base_only:
        return

    # DreamBooth: every subject and seed.
    runs: dict[tuple[str, str, int], Results] = {}
    for seed in args.seeds:
        for subject in subjects:
            kinds = [WITH, WITHOUT] if subject in args.without_prior else [WITH]
            for kind in kinds:
                name = f"{file_name_of(subject)}-{seed}" + ("-without" if kind == WITHOUT else "")
                run = functools.partial(measure_run, args, subject, seed, kind, outdir, judges)
                runs[kind, label_of(subject), seed] = measured(name, run)

    # The report, of all that was measured.
    only = ["--subjects", *args.subjects] if args.subjects else []
    seeds = ["--seeds", *map(str, args.seeds)]
    command = shlex.join(["python", "scripts/tiny/evaluate.py", *only, *seeds])
    report = report_of(command, base, runs)
    write_atomically(args.report, lambda temporary: temporary.write_text(report))
    print(args.report)


@dataclass(frozen=True)
class AllJudges:
    """The judges of classes and scenes, that of attributes, and what they learned from."""

    judges: Judges
    attributes: Recognizer
    plain: tuple[World, World]  # to learn from and to be tried on, both without attributes
    whole: tuple[World, World]  # the same with attributes
    reconstruct: Reconstruct


def make_all_judges(args: argparse.Namespace, outdir: Path) -> AllJudges:
    """Make the judges; fit those that `outdir` does not have from before."""
    plain, whole = worlds(args.sprites), worlds(args.sprites, plain=False)
    first_stage = load_model(args.weights).first_stage_model

    def reconstruct(images: Tensor) -> Tensor:
        return first_stage(images, sample_posterior=False)[0]

    judges = make_judges(args.clip_images, plain[0], outdir / "recognizer.ckpt", reconstruct)
    attributes = make_attribute_judge(EfficientNetMaps())
    path = outdir / "attributes.ckpt"
    fitted(attributes, path, lambda: fit_attribute_judge(attributes, whole[0], reconstruct))
    return AllJudges(judges, attributes, plain, whole, reconstruct)


def base_parts(args: argparse.Namespace, all_judges: AllJudges) -> dict[str, Callable[[], Results]]:
    """Return file name -> what measures this part of the base model."""
    judges, reconstruct = all_judges.judges, all_judges.reconstruct
    (train, test), (whole_train, whole_test) = all_judges.plain, all_judges.whole
    draw = PromptSampler(args.weights)
    encoder = judges.encoders["EfficientNet-Lite0"]
    return {
        "base": lambda: measure_base(draw, judges, train, test),
        "pictures": lambda: measure_pictures(draw, encoder, test, train),
        "attributes": lambda: measure_attributes(
            draw, all_judges.attributes, whole_train, whole_test
        ),
        "decoder": lambda: {
            "decoder, plain": measure_decoder(reconstruct, test),
            "decoder": measure_decoder(reconstruct, whole_test),
        },
    }


def measure_run(
    args: argparse.Namespace,
    subject: str,
    seed: int,
    kind: str,
    outdir: Path,
    all_judges: AllJudges,
) -> Results:
    """Run DreamBooth once and measure what came of it."""
    photos = photos_of(subject)
    class_word = class_word_of(photos)
    quiet = "lightning.callbacks.image_logger=null"  # its pictures change nothing
    more = ["--seed", str(seed), quiet]
    if kind == WITHOUT:
        more.append("model.params.reg_weight=0")

    # Train in a folder of its own: other processes may train at the same time.
    start = time.monotonic()
    logdir = outdir / f"logs-{file_name_of(subject)}-{seed}"
    class_images = outdir / f"class_images-{seed}" / class_word
    checkpoint = dreambooth(photos, class_word, class_images, logdir, more, weights=args.weights)
    seconds = time.monotonic() - start

    # Measure, then throw the weights away: a run's checkpoint is large.
    pictures = [load_image(path) for path in find_images(photos)]
    base, tuned = base_sampler(args.weights, seed), PromptSampler(checkpoint, seed)
    judges = all_judges.judges
    measured = measure_subject(base, tuned, pictures, class_word, judges)
    if kind == WITH:
        measured["applications"] = measure_applications(
            base,
            tuned,
            to_tensor(pictures, SIZE),
            class_word,
            all_judges.attributes,
            judges.encoders,
        )
    checkpoint.unlink()
    return {**measured, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
