"""Folders of anyone's pictures: which subject, which seed and which prompt each is of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.captions import read_text
from ldm.data.finding import find_images, list_images
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.prompt_suites import filled, read_suite
from ldm.sampling.metadata import read_recipe

log = logging.getLogger(__name__)

GROUPED, IN_TURN = "grouped", "in_turn"
ORDERS = (GROUPED, IN_TURN)
SEED = "seed"


@dataclass(frozen=True)
class Place:
    """Where the pictures of one subject and seed are, and the subject's photos."""

    subject: str
    seed: str
    images: list[Path]
    real: list[Path]
    of_class: list[Path]


def places(images: Path, real: Path, of_class: Path | None = None) -> list[Place]:
    """Find the subjects and seeds of folders.

    `real` holds one subject's photos, or a folder of photos a subject. `images` has the same
    subjects as folders. A subject's pictures of several trainings are in `seed...` folders.

    Raises:
        UserError: a folder is not there or is empty, a subject has no photos, or a picture is one
            of them.
    """
    for folder in filter(None, (images, real, of_class)):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    names = [folder.name for folder in _folders(real) if list_images(folder)]
    if not names or _own(real):
        return list(_of_subject(real.resolve().name, images, find_images(real), of_class))
    given = [folder.name for folder in _folders(images)]
    for name in given:
        if name not in names:
            raise UserError(f"{images / name}: no photos of this subject: {real / name} is missing")
    if not given:
        raise UserError(
            f"{images}: no folder of a subject in it; {real} has {', '.join(names[:5])}"
        )
    missing = [name for name in names if name not in given]
    if missing:
        log.warning("%s: no pictures of %s", images, ", ".join(missing))
    found: list[Place] = []
    for name in given:
        photos = find_images(real / name)
        found += _of_subject(name, images / name, photos, of_class / name if of_class else None)
    return found


def _of_subject(
    name: str, images: Path, real: list[Path], of_class: Path | None
) -> Iterator[Place]:
    """Yield a place for each of a subject's seeds."""
    seeds = [folder for folder in _folders(images) if folder.name.startswith(SEED)]
    if seeds and _own(images):
        log.warning("%s: pictures beside %s are left out", images, seeds[0].name)
    for folder in seeds or [images]:
        seed = folder.name if seeds else ""
        classes: list[Path] = []
        if of_class is not None:
            beside = of_class / seed
            classes = find_images(beside if seed and beside.is_dir() else of_class)
        pictures = find_images(folder)
        # A photo that is compared with itself is as like as can be.
        photos = {path.resolve() for path in real}
        for path in pictures:
            if path.resolve() in photos:
                problem = "is a photo of --real, too: keep the two in folders apart"
                raise UserError(f"{path}: {problem}")
        yield Place(name, seed, pictures, real, classes)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _own(folder: Path) -> bool:
    """Return whether images lie in a folder itself."""
    return any(path.parent == folder for path in list_images(folder))


def read_prompts(path: Path, class_word: str | None, identifier: str) -> list[str] | dict[str, str]:
    """Return the prompts of a file: a line each, a suite of templates, or by pictures' names.

    A text file has a prompt a line. A YAML is a suite over `{subject}` and `{class}`. A JSON is an
    object of the names of pictures' files and their prompts.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        if class_word is None:
            raise UserError(f"--prompts {path}: a suite of templates needs --class_word")
        return filled(read_suite(path), class_word, identifier)
    text = read_text(path, "file of prompts")
    if kind == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"--prompts {path}: no JSON ({error})") from error
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise UserError(f'--prompts {path}: expected {{"00000.png": "a sks dog", ...}}')
        return found
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompts in it")
    return prompts


def prompts_of(
    pictures: Sequence[Path],
    given: Sequence[str] | Mapping[str, str] | None,
    order: str | None = None,
) -> list[str] | None:
    """Return each picture's prompt; None where none is known of any.

    A picture's own words come first: the recipe in its PNG, or a text file of its name. Else the
    prompts are taken by the pictures' order.

    Args:
        given: the prompts in their order, or by the names of files.
        order: of several pictures a prompt: `grouped` (the first prompt's come first) or `in_turn`.

    Raises:
        UserError: pictures whose prompt is not known, or not among the given ones.
    """
    if isinstance(given, Mapping):
        for path in pictures:
            if path.name not in given:
                raise UserError(f"{path}: --prompts has no prompt for {path.name}")
        return [given[path.name] for path in pictures]
    own = [_own_prompt(path) for path in pictures]
    if all(prompt is not None for prompt in own):
        for path, prompt in zip(pictures, own):
            if given and prompt not in given:
                raise UserError(f"{path}: made of {prompt!r}, which --prompts does not have")
        return [str(prompt) for prompt in own]
    if any(prompt is not None for prompt in own):
        nameless = pictures[own.index(None)]
        raise UserError(f"{nameless}: says no prompt, and others do; name all by a JSON --prompts")
    if not given:
        return None
    return _by_order(pictures, list(given), order)


def _by_order(pictures: Sequence[Path], given: list[str], order: str | None) -> list[str]:
    many, left = divmod(len(pictures), len(given))
    folder = pictures[0].parent
    if left:
        raise UserError(
            f"{folder}: {len(pictures)} pictures and {len(given)} prompts: which is of which?"
        )
    if many > 1 and order is None:
        raise UserError(
            f"{folder}: {many} pictures a prompt: say --order grouped (the first prompt's "
            f"{many} come first) or in_turn"
        )
    if order == GROUPED:
        return [prompt for prompt in given for _ in range(many)]
    return given * many


def _own_prompt(path: Path) -> str | None:
    """Return what a picture's file, or the text beside it, says that it was made of."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return read_text(beside, "caption").strip()
    if path.suffix.lower() != ".png":
        return None
    try:
        recipe = read_recipe(path)
    except UserError:
        # Texts that cannot be read say nothing; pixels that cannot be read are refused now.
        load_image(path)
        return None
    return None if recipe is None else str(recipe["prompt"])
