"""DreamBooth in miniature, from photos to a contact sheet. `make demo` runs this.

The model starts from random weights: the loop is the real one, the samples are noise until it is pretrained.

python scripts/demo.py --subject robot
python scripts/demo.py --subject my/photos --class_word mug
"""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.commands import exit_status
from ldm.contact_sheet import contact_sheet
from ldm.data.image_folder import find_images, load_image
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ROOT / "models/tiny/subjects"
CONFIG = ROOT / "configs/tiny/dreambooth.yaml"
SHOWN = 5  # pictures in a row of the sheet


def build_parser() -> argparse.ArgumentParser:
    names = ", ".join(sorted(path.name for path in SUBJECTS.iterdir() if path.is_dir()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="robot", help=f"{names}, or a folder of photos (default: %(default)s)")
    parser.add_argument("--class_word", help="the subject's class noun (default: its folder's name)")
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--outdir", default="outputs/demo", help="default: %(default)s")
    return parser


def photos_of(subject: str) -> Path:
    """The folder of a subject that ships with the project, or of the user's own photos."""
    folder = SUBJECTS / subject if (SUBJECTS / subject).is_dir() else Path(subject)
    if not folder.is_dir():
        raise UserError(f"--subject {subject}: neither a subject in {SUBJECTS} nor a folder of photos")
    return folder


def train(photos: Path, class_word: str, outdir: Path, steps: int | None) -> Path:
    """Run the training command, as a user would; its last checkpoint."""
    before = set((outdir / "logs").glob("*"))
    command = [
        *[sys.executable, str(ROOT / "main.py"), "--base", str(CONFIG), "-t"],
        *["--data_root", str(photos), "--reg_data_root", str(outdir / "class_images" / class_word)],
        *["--class_word", class_word, "--logdir", str(outdir / "logs")],
        *(["--max_steps", str(steps)] if steps else []),
    ]
    print(f"$ {shlex.join(['python', 'main.py', *command[2:]])}\n", flush=True)
    if status := subprocess.run(command).returncode:
        raise UserError(f"the training ended with status {status}")
    (run,) = set((outdir / "logs").glob("*")) - before
    return run / "checkpoints" / "last.ckpt"


def draw(checkpoint: Path, prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
    """A row of pictures for each prompt."""
    from ldm.inference import Recipe, image_seed, load_model, text_to_image

    model = load_model(checkpoint)
    side = model.image_size * model.downsampling
    recipe = Recipe(steps=50, scale=4.0, height=side, width=side)
    seeds = [image_seed(recipe.seed, number) for number in range(SHOWN)]
    return {prompt: text_to_image(model, [prompt] * SHOWN, seeds, recipe) for prompt in prompts}


def demo(args: argparse.Namespace) -> None:
    """Photos, training, samples, and a contact sheet of them all."""
    begin = time.monotonic()
    photos, outdir = photos_of(args.subject), Path(args.outdir)
    class_word = args.class_word or photos.resolve().name.rstrip("0123456789")

    checkpoint = train(photos, class_word, outdir, args.steps)
    print(f"\ntrained after {(time.monotonic() - begin) / 60:.1f} minutes; sampling", flush=True)

    pictures = [load_image(path) for path in find_images(photos)][:SHOWN]
    class_images = [load_image(path) for path in find_images(outdir / "class_images" / class_word)][:SHOWN]
    rows = [("the subject's photos", pictures)]
    rows += draw(checkpoint, [f"photo of a sks {class_word}", f"photo of a {class_word}"]).items()
    rows.append((f"photo of a {class_word}, before training", class_images))
    sheet = outdir / f"{photos.resolve().name}.png"
    contact_sheet(rows, title=f"DreamBooth: a sks {class_word}").save(sheet)

    print("\nthe model started from random weights: expect noise below the photos")
    print(f"contact sheet after {(time.monotonic() - begin) / 60:.1f} minutes: {sheet}\nanother prompt:")
    prompt = f"photo of a sks {class_word} on the beach"
    print(f"  .venv/bin/python scripts/stable_txt2img.py --ckpt {shlex.quote(str(checkpoint))} --prompt {prompt!r}")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: demo(args))


if __name__ == "__main__":
    sys.exit(main())
