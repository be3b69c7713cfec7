"""DreamBooth in miniature, from photos to a contact sheet. `make demo` runs this.

python scripts/demo.py --subject robot
python scripts/demo.py --subject my/photos --class_word mug
python scripts/demo.py --model cascade       # base and super-resolution in pixels
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ldm.commands import exit_status
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.sampling.contact_sheet import Entry, contact_sheet
from ldm.tiny.applications import applications, world_word
from ldm.tiny.miniature import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    RECIPE,
    SMALL,
    SR_CONFIG,
    SR_WEIGHTS,
    WEIGHTS,
    CascadeSampler,
    PromptSampler,
    check_cascade,
    class_word_of,
    dreambooth,
    photos_of,
    subject_names,
)
from ldm.training.stages import Stages

NO_PRIOR = "model.params.reg_weight=0"
SHOWN = 6  # pictures in a row of the sheet
SCENES = (
    "in the snow",
    "on the beach",
    "in the jungle",
    "with the Eiffel Tower in the background",
    "on top of a wooden floor",
    "at night",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(subject_names())
    parser.add_argument(
        "--subject", default="dog", help=f"{names}, or a folder of photos (default: %(default)s)"
    )
    parser.add_argument(
        "--class_word", help="the subject's class noun (default: its folder's name)"
    )
    parser.add_argument(
        "--model",
        choices=["latent", "cascade"],
        default="latent",
        help="diffusion in latents, or a base and super-resolution in pixels",
    )
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument(
        "--without_prior", action="store_true", help="leave the prior-preservation loss out"
    )
    parser.add_argument("--outdir", default="outputs/demo", help="default: %(default)s")
    return parser


def sheet_rows(
    photos: Sequence[Image.Image], class_word: str, tuned: PromptSampler, base: PromptSampler
) -> list[tuple[str, Sequence[Entry]]]:
    """Draw the rows of the sheet: the photos, the subject and its class, before and after."""
    subject, of_class = f"photo of a sks {class_word}", f"photo of a {class_word}"

    def captioned(prompts: Mapping[str, str]) -> list[Entry]:
        return list(zip(prompts, tuned(list(prompts.values()))))

    return [
        ("the subject's photos", list(photos[:SHOWN])),
        (subject, tuned([subject] * SHOWN)),
        (f"{subject} ...", captioned({scene: f"{subject} {scene}" for scene in SCENES})),
        *[(title, captioned(asked)) for title, asked in applications(class_word).items()],
        (f"{of_class}, before", base([of_class] * SHOWN)),
        (f"{of_class}, after", tuned([of_class] * SHOWN)),
    ]


Tuned = tuple[PromptSampler, PromptSampler, list[str]]


def tune(photos: Path, class_word: str, outdir: Path, prior: bool, more: Sequence[str]) -> Tuned:
    """Train the latent miniature; return what draws after and before, and the command to draw."""
    class_images = outdir / "class_images" / class_word if prior else None
    more = more if prior else [*more, NO_PRIOR]
    checkpoint = dreambooth(photos, class_word, class_images, outdir / "logs", more, print)
    command = ["scripts/stable_txt2img.py", "--ckpt", str(checkpoint)]
    return PromptSampler(checkpoint), PromptSampler(WEIGHTS), command


def tune_cascade(
    photos: Path, class_word: str, outdir: Path, prior: bool, more: Sequence[str]
) -> Tuned:
    """Train the cascade's base, then its super-resolution on the photos alone."""
    class_images = outdir / "class_images_cascade" / class_word if prior else None
    logs, of_base = outdir / "logs", more if prior else [*more, NO_PRIOR]
    base = dreambooth(
        photos, class_word, class_images, logs, of_base, print, BASE_WEIGHTS, BASE_CONFIG
    )
    large = dreambooth(photos, class_word, None, logs, more, print, SR_WEIGHTS, SR_CONFIG)
    command = ["scripts/cascade_txt2img.py", "--base_ckpt", str(base), "--sr_ckpt", str(large)]
    return CascadeSampler(base, large), CascadeSampler(BASE_WEIGHTS, SR_WEIGHTS), command


def demo(args: argparse.Namespace) -> None:
    """Train on the photos, draw samples, and write a contact sheet of them all."""
    begin, stages = time.monotonic(), Stages()

    def say(what: str) -> None:
        print(f"\n[{(time.monotonic() - begin) / 60:.1f} min] {what}", flush=True)

    cascade = args.model == "cascade"
    if cascade:
        check_cascade()
    photos, outdir = photos_of(args.subject), Path(args.outdir)
    class_word, other_word = world_word(args.class_word or class_word_of(photos))
    pictures = [load_image(path) for path in find_images(photos)]
    if other_word:
        print(other_word, flush=True)
    drawn_first = "" if args.without_prior else "class images and "
    say(f"{len(pictures)} photos of a {class_word}; {drawn_first}training\n")
    more = ["--max_steps", str(args.steps)] if args.steps else []
    train = tune_cascade if cascade else tune
    tuned, base, command = train(photos, class_word, outdir, not args.without_prior, more)
    stages.end("training, as it says above")

    say("sampling")
    rows = sheet_rows(pictures, class_word, tuned, base)
    stages.end("sampling")
    without = " without prior preservation" if args.without_prior else ""
    of_cascade = "-cascade" if cascade else ""
    sheet = outdir / f"{photos.resolve().name}{of_cascade}{without.replace(' ', '-')}.png"
    contact_sheet(rows, title=f"DreamBooth{without}: a sks {class_word}").save(sheet)

    say(f"contact sheet: {sheet}\ntime: {stages}\nanother prompt:")
    prompt = f"photo of a sks {class_word} floating on top of water"
    recipe = SMALL if cascade else RECIPE
    sampler = recipe.sampler if recipe.schedule is None else f"{recipe.sampler} {recipe.schedule}"
    command += ["--sampler", sampler, "--ddim_steps", str(recipe.steps)]
    command += ["--scale", f"{recipe.scale:g}", "--prompt", prompt]
    print(f"  .venv/bin/python {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: demo(args))


if __name__ == "__main__":
    sys.exit(main())
