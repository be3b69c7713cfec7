"""Measure the miniature: the base model, and DreamBooth for every subject and seed. Writes
`docs/results.md`.

    pip install -e '.[world]' && python scripts/tiny/fetch_sprites.py      # the classifiers learn
    from renderings python scripts/tiny/evaluate.py --seeds 23 24 25

What was measured before, with the same weights and config, is in `--outdir` and is not measured
again. So several can share the work, each with some of the `--subjects`; the last one writes the
whole report.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ldm.checkpoints.reading import read_checkpoint
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.metrics import CLIPImages, EfficientNetLite0
from ldm.files import save_checkpoint, write_atomically
from ldm.sampling.text_to_image import load_model
from ldm.tiny.measure import (
    CLASS_IMAGES,
    PLACES,
    Judges,
    fit_recognizer,
    make_recognizer,
    measure_base,
    measure_subject,
)
from ldm.tiny.miniature import (
    CLIP_CONFIG,
    CLIP_IMAGES,
    CONFIG,
    ROOT,
    WEIGHTS,
    Painter,
    class_word_of,
    dreambooth,
    photos_of,
    subject_names,
)
from ldm.tiny.scenes import SCENES
from ldm.tiny.world import SPRITES, World

LDM_CONFIG = ROOT / "configs/tiny/ldm.yaml"
WITH, WITHOUT = "with prior preservation", "without"

Results = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="*", help=f"default: {', '.join(subject_names())}")
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
        "--report", type=Path, default=ROOT / "docs/results.md", help="default: %(default)s"
    )
    return parser


def worlds(sprites: Path) -> tuple[World, World]:
    """Return the world that the miniature was trained on, and the designs that its CLIP was not.

    Both are plain, as "a photo of a dog" is: no style, no material, nothing worn, no view that is
    said.
    """
    classes = to_plain(load_config([LDM_CONFIG]))["data"]["params"]["train"]["params"]["dataset"][
        "params"
    ]["classes"]
    common = {"classes": classes, "labels": True, "held_out": 0.1, "plain": True}
    return World(sprites, split="train", **common), World(sprites, split="test", **common)


def make_judges(train: World, path: Path) -> Judges:
    """The two encoders, and the classifiers that are fitted to renderings, unless `path` has them
    from before.
    """
    clip = CLIPImages(CLIP_IMAGES, to_plain(load_config([CLIP_CONFIG]))["model"])
    encoders = {"CLIP-I": clip, "EfficientNet-Lite0": EfficientNetLite0()}
    recognizer = make_recognizer(encoders, train.classes)
    if path.is_file():
        state = read_checkpoint(path)
        recognizer.add_heads(next(iter(state.values())).shape[-1])
        recognizer.heads.load_state_dict(state)
    else:
        model = load_model(WEIGHTS)
        fit_recognizer(
            recognizer, train, lambda x: model.first_stage_model(x, sample_posterior=False)[0]
        )
        save_checkpoint(recognizer.heads.state_dict(), path)
    return Judges(encoders, recognizer)


@functools.cache
def base_painter(seed: int) -> Callable[[Sequence[str]], list[Any]]:
    """Draws with the base model, the pictures of a class once for all of its subjects."""
    draw = functools.cache(Painter(WEIGHTS, seed))
    return lambda prompts: draw(tuple(prompts))


def remembered(path: Path, measure: Callable[[], Results]) -> Results:
    """What is in the file, or what `measure` gives, which goes into it."""
    if not path.is_file():
        text = json.dumps(measure(), indent=1)
        write_atomically(path, lambda temporary: temporary.write_text(text))
    return json.loads(path.read_text())


def evaluate(args: argparse.Namespace) -> None:
    """Measure what is missing, then write the report."""
    subjects = args.subjects or subject_names()
    unknown = sorted({*subjects, *args.without_prior} - set(subject_names()))
    if unknown:
        raise UserError(
            f"--subjects: unknown {', '.join(unknown)}; there are {', '.join(subject_names())}"
        )
    train, test = worlds(args.sprites)
    outdir = (
        args.outdir / hashlib.sha256(WEIGHTS.read_bytes() + CONFIG.read_bytes()).hexdigest()[:8]
    )
    judges = make_judges(train, outdir / "recognizer.ckpt")
    begin = time.monotonic()
    base = remembered(
        outdir / "base.json", lambda: measure_base(Painter(WEIGHTS), judges, train, test)
    )
    runs: dict[tuple[str, str, int], Results] = {}
    for seed in args.seeds:
        for subject in subjects:
            for kind in [WITH] + [WITHOUT] * (subject in args.without_prior):
                name = f"{subject}-{seed}" + ("-without" if kind == WITHOUT else "")
                runs[kind, subject, seed] = remembered(
                    outdir / f"{name}.json",
                    functools.partial(measure_run, subject, seed, kind, outdir, judges),
                )
                print(f"{(time.monotonic() - begin) / 60:5.1f} min  {name}", flush=True)
    only = ["--subjects", *args.subjects] if args.subjects else []
    command = shlex.join(
        ["python", "scripts/tiny/evaluate.py", *only, "--seeds", *map(str, args.seeds)]
    )
    report = "\n".join([HEAD, f"    {command}\n", *base_table(base), *run_tables(runs)]) + "\n"
    write_atomically(args.report, lambda temporary: temporary.write_text(report))
    print(args.report)


def measure_run(subject: str, seed: int, kind: str, outdir: Path, judges: Judges) -> Results:
    """One DreamBooth run and its measurements."""
    photos, class_word = photos_of(subject), class_word_of(photos_of(subject))
    quiet = "lightning.callbacks.image_logger=null"  # its pictures change nothing
    more = ["--seed", str(seed), quiet] + (["model.params.reg_weight=0"] if kind == WITHOUT else [])
    start = time.monotonic()
    # A folder of its own: others may train at the same time.
    logdir = outdir / f"logs-{subject}-{seed}"
    checkpoint = dreambooth(
        photos, class_word, outdir / f"class_images-{seed}" / class_word, logdir, more
    )
    seconds = time.monotonic() - start
    pictures = [load_image(path) for path in find_images(photos)]
    measured = measure_subject(
        base_painter(seed), Painter(checkpoint, seed), pictures, class_word, judges
    )
    checkpoint.unlink()
    return {**measured, "seconds": seconds}


# The report

HEAD = """# Results of the miniature

Measured by the command below, with the weights in `models/tiny` and `configs/tiny/dreambooth.yaml`.
Class and scene are read off by linear classifiers on the features of both encoders, fitted to
renderings of the tiny world (half of them reconstructed by the first stage), never to samples.
`CLIP-I` is the mean cosine of our small CLIP's image features, the other encoder is
EfficientNet-Lite0, pretrained on ImageNet.
"""

BASE = """
## The base model

4 samples for each of {classes} classes ("a photo of a dog") and of {scenes} scenes ("a photo of a
dog in the snow", classes in turn); diversity is the mean pairwise distance of the features of
{pictures} pictures of "a photo of a dog".

| | samples | renderings of seen designs | of unseen designs |
|---|---|---|---|"""

SUBJECTS = """
## DreamBooth, {kind}

Means over seeds {seeds}; likeness is that of the pictures' middles, 70 % of each side. *Gap
closed*: how much of the way from the base model's pictures of the class to the photos' own likeness
the pictures of "photo of a sks dog" have gone. *Scenes*: share of {places} scenes recognised with
the subject in them, and with the class by the base model.
*Class drift*: likeness of "photo of a dog" to the photos, both centred on the base model's
pictures: 0 for no change, and in brackets that of "photo of a sks dog".
*Diversity kept*: of "photo of a dog", after / before. *Nearest*: the sample most like a training
image or its mirror, in dB.

| subject | {columns} |
|---|---|---|---|---|---|---|---|---|---|---|"""

COLUMNS = (
    *("gap closed, CLIP-I", "EfficientNet", "scenes (base)", "class drift, CLIP-I", "EfficientNet"),
    *(
        "diversity kept, CLIP-I",
        "EfficientNet",
        "class recognised (base)",
        "nearest, dB",
        "minutes",
    ),
)


def base_table(base: Mapping[str, Any]) -> list[str]:
    """The base model's numbers."""
    lines = [BASE.format(classes=len(base["by_class"]), scenes=len(SCENES), pictures=CLASS_IMAGES)]
    for name in ("class", "scene"):
        seen, unseen = (base[f"{name}, {kind} designs"] for kind in ("seen", "unseen"))
        lines.append(f"| {name} recognised | {base[name]:.0%} | {seen:.0%} | {unseen:.0%} |")
    for encoder in ("CLIP-I", "EfficientNet-Lite0"):
        made, real = base[f"diversity, {encoder}"], base[f"diversity of renderings, {encoder}"]
        lines.append(
            f"| diversity, {encoder} | {made:.3f} ({made / real:.0%} of renderings) "
            f"| {real:.3f} | |"
        )
    by_class = ", ".join(
        f"{name} {share:.0%}"
        for name, share in sorted(base["by_class"].items(), key=lambda x: x[1])
    )
    return [*lines, "", f"By class: {by_class}."]


def run_tables(runs: Mapping[tuple[str, str, int], Results]) -> list[str]:
    """A table for each kind of run."""
    lines: list[str] = []
    for kind in (WITH, WITHOUT):
        found = {key: value for key, value in runs.items() if key[0] == kind}
        if not found:
            continue
        seeds = ", ".join(str(seed) for seed in sorted({seed for _, _, seed in found}))
        heading = kind if kind == WITH else "without prior preservation"
        fields = {
            "kind": heading,
            "seeds": seeds,
            "places": len(PLACES),
            "columns": " | ".join(COLUMNS),
        }
        lines.append(SUBJECTS.format(**fields))
        subjects = sorted({subject for _, subject, _ in found})
        rows = {
            s: [value for (_, subject, _), value in found.items() if subject == s] for s in subjects
        }
        lines += [row(name, results) for name, results in rows.items()]
        if len(rows) > 1:
            lines.append(row("**mean**", list(found.values())))
    return lines


def row(name: str, results: Sequence[Results]) -> str:
    """The means of some runs."""
    m = {key: mean(result[key] for result in results) for key in results[0]}
    clip, effnet = "CLIP-I", "EfficientNet-Lite0"
    cells = [
        name,
        *(f"{m[f'{e}, gap closed']:.0%}" for e in (clip, effnet)),
        f"{m['scenes']:.0%} ({m['scenes, base']:.0%})",
        *(
            f"{m[f'{e}, class drift']:.2f} ({m[f'{e}, centred subject']:.2f})"
            for e in (clip, effnet)
        ),
        *(f"{m[f'{e}, diversity kept']:.0%}" for e in (clip, effnet)),
        f"{m['class kept']:.0%} ({m['class, base']:.0%})",
        f"{max(result['nearest training image, dB'] for result in results):.1f}",
        f"{m['seconds'] / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
