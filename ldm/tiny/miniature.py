"""The embedded default: where it lies, and DreamBooth on it as a user would run it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ldm.config import PROJECT
from ldm.errors import UserError
from ldm.sampling.text_to_image import Recipe, image_seed, load_model, text_to_image

ROOT = PROJECT
WEIGHTS = ROOT / "models/tiny/sd-tiny.safetensors"
CLIP_IMAGES = ROOT / "models/tiny/clip-image.safetensors"
SUBJECTS = ROOT / "models/tiny/subjects"
CONFIG = ROOT / "configs/tiny/dreambooth.yaml"
CLIP_CONFIG = ROOT / "configs/tiny/clip.yaml"
RECIPE = Recipe(steps=25, scale=4.0, height=64, width=64)


def subject_names() -> list[str]:
    """The subjects that ship with the project."""
    return sorted(path.name for path in SUBJECTS.iterdir() if path.is_dir())


def photos_of(subject: str) -> Path:
    """The folder of a subject that ships with the project, or of the user's own photos.

    Raises:
        UserError: there is neither.
    """
    folder = SUBJECTS / subject if (SUBJECTS / subject).is_dir() else Path(subject)
    if not folder.is_dir():
        known = ", ".join(subject_names())
        raise UserError(
            f"{subject}: no folder of photos, and none of the subjects that come along ({known})"
        )
    return folder


def class_word_of(photos: Path) -> str:
    """The class noun that a folder is named after: `dog2` holds photos of a dog."""
    return photos.resolve().name.rstrip("0123456789")


def dreambooth(
    photos: Path,
    class_word: str,
    class_images: Path,
    logdir: Path,
    more: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
    weights: Path = WEIGHTS,
) -> Path:
    """Fine-tune the miniature on photos with the training command; the last checkpoint.

    Args:
        class_images: where the class images are, or go.
        more: further words of the command line.
        say: gets the command line; None also silences the training.
        weights: the miniature to start from.

    Raises:
        UserError: the training failed.
    """
    before = _folders(logdir)
    command = [
        *[
            sys.executable,
            str(ROOT / "main.py"),
            "--base",
            str(CONFIG),
            "-t",
            "--actual_resume",
            str(weights),
        ],
        *[
            "--data_root",
            str(photos),
            "--reg_data_root",
            str(class_images),
            "--class_word",
            class_word,
        ],
        *["--logdir", str(logdir), *more],
    ]
    if say:
        say(f"$ {shlex.join(['python', 'main.py', *command[2:]])}\n")
    result = subprocess.run(command, stderr=None if say else subprocess.PIPE, text=True)
    if result.returncode:
        tail = f": {result.stderr.strip().splitlines()[-1]}" if result.stderr else ""
        raise UserError(f"the training ended with status {result.returncode}{tail}")
    (run,) = _folders(logdir) - before
    return run / "checkpoints" / "last.ckpt"


def _folders(parent: Path) -> set[Path]:
    return {path for path in parent.glob("*") if path.is_dir()}


class Painter:
    """Pictures of prompts by one checkpoint, each a function of its prompt, its number and the
    seed.
    """

    def __init__(self, checkpoint: Path, seed: int = RECIPE.seed, batch_size: int = 32):
        self.model = load_model(checkpoint)
        self.seed, self.batch_size = seed, batch_size

    def __call__(self, prompts: Sequence[str]) -> list[Image.Image]:
        """One picture for each prompt."""
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            seeds = [image_seed(self.seed, start + number) for number in range(len(part))]
            images += text_to_image(self.model, part, seeds, RECIPE)
        return images
