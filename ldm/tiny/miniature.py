"""The miniature: where its files are, and DreamBooth on it as a user would run it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ldm.config import PROJECT
from ldm.errors import UserError
from ldm.sampling.super_resolution import check_upscales, enlarge
from ldm.sampling.text_to_image import Recipe, image_seed, load_model, text_to_image

ROOT = PROJECT
WEIGHTS = ROOT / "models/tiny/sd-tiny.safetensors"
CLIP_IMAGES = ROOT / "models/tiny/clip-image.safetensors"
SUBJECTS = ROOT / "models/tiny/subjects"
CONFIG = ROOT / "configs/tiny/dreambooth.yaml"
CLIP_CONFIG = ROOT / "configs/tiny/clip.yaml"
# This sampler's pictures are crisper than those of DDIM in as many steps: docs/sampling.md.
RECIPE = Recipe(steps=20, scale=4.0, sampler="dpmpp_2m", schedule="karras", height=64, width=64)
# The cascade: a base of 32 pixels, and super-resolution to 64.
BASE_WEIGHTS = ROOT / "models/tiny/cascade-base.safetensors"
SR_WEIGHTS = ROOT / "models/tiny/cascade-sr.safetensors"
BASE_CONFIG = ROOT / "configs/tiny/cascade_base_dreambooth.yaml"
SR_CONFIG = ROOT / "configs/tiny/cascade_sr_dreambooth.yaml"
SMALL = Recipe(steps=25, scale=4.0, height=32, width=32)
LARGE = Recipe(steps=25, scale=1.0, height=64, width=64)


def subject_names() -> list[str]:
    """Return the names of the subjects that ship with the project."""
    return sorted(path.name for path in SUBJECTS.iterdir() if path.is_dir())


def photos_of(subject: str) -> Path:
    """Return the folder of a subject that ships with the project, or of the user's own photos.

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
    """Return the class noun that a folder is named after: `dog2` holds photos of a dog."""
    return photos.resolve().name.rstrip("0123456789")


def dreambooth(
    photos: Path,
    class_word: str,
    class_images: Path | None,
    logdir: Path,
    more: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
    weights: Path = WEIGHTS,
    config: Path | None = None,
) -> Path:
    """Fine-tune the miniature on photos with the training command; return the last checkpoint.

    Args:
        class_images: where the class images are, or where they are put; None to train without them.
        more: further words of the command line.
        say: is called with the command line; None also silences the training.
        weights: the miniature to start from.
        config: of the training; by default the latent miniature's.

    Raises:
        UserError: the training failed.
    """
    # A name of this process alone: another one may train in the same folder.
    config = config or CONFIG
    name = f"{config.stem}-{os.getpid()}"
    before = _folders(logdir, name)
    # The command line, as a user would write it.
    words = ["--base", str(config), "-t", "-n", name, "--actual_resume", str(weights)]
    words += ["--data_root", str(photos)]
    if class_images:
        words += ["--reg_data_root", str(class_images)]
    words += ["--class_word", class_word, "--logdir", str(logdir), *more]
    if say:
        say(f"$ {shlex.join(['python', 'main.py', *words])}\n")

    # The training runs as a process of its own. Its run folder is the one that was not there.
    command = [sys.executable, str(ROOT / "main.py"), *words]
    result = subprocess.run(command, stderr=None if say else subprocess.PIPE, text=True)
    if result.returncode:
        tail = f": {result.stderr.strip().splitlines()[-1]}" if result.stderr else ""
        raise UserError(f"the training ended with status {result.returncode}{tail}")
    (run,) = _folders(logdir, name) - before
    return run / "checkpoints" / "last.ckpt"


def _folders(parent: Path, name: str) -> set[Path]:
    """Return the run folders of a name; none where their parent does not exist."""
    return {path for path in parent.glob(f"*_{name}") if path.is_dir()}


class PromptSampler:
    """Samples pictures of prompts from one checkpoint.

    A picture is a function of its prompt, its place in the list of prompts and the seed.
    """

    def __init__(self, checkpoint: Path, seed: int = RECIPE.seed, batch_size: int = 32):
        self.model = load_model(checkpoint)
        self.seed, self.batch_size = seed, batch_size

    def __call__(self, prompts: Sequence[str]) -> list[Image.Image]:
        """Sample one picture for each prompt."""
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            seeds = [image_seed(self.seed, start + number) for number in range(len(part))]
            images += self.draw(part, seeds)
        return images

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Sample one batch."""
        return text_to_image(self.model, prompts, seeds, RECIPE)


class CascadeSampler(PromptSampler):
    """Samples pictures from a cascade: small ones by its base, enlarged by a second checkpoint.

    Args:
        augmentation: variance of the noise on the small pictures; by default as in training.
    """

    def __init__(
        self,
        checkpoint: Path,
        enlarging: Path,
        augmentation: float | None = None,
        seed: int = RECIPE.seed,
        batch_size: int = 32,
    ):
        super().__init__(checkpoint, seed, batch_size)
        self.enlarging = check_upscales(load_model(enlarging))
        self.augmentation = augmentation

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Sample small pictures with guidance, then enlarge them without."""
        small = text_to_image(self.model, prompts, seeds, SMALL)
        return enlarge(self.enlarging, small, prompts, seeds, LARGE, self.augmentation)


def check_cascade() -> None:
    """Raise a `UserError` if the weights of the miniature cascade are not there."""
    for weights in (BASE_WEIGHTS, SR_WEIGHTS):
        if not weights.is_file():
            raise UserError(
                f"{weights}: not there, though it comes with the project: get it again, or train "
                "it as docs/cascade.md says"
            )
