"""DreamBench, the dataset of the DreamBooth paper, in its published layout.

`dataset/{subject}/*.jpg`, and `prompts_and_classes.txt` with each subject's class and two lists of
25 prompts: for objects and for live subjects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ldm.data.finding import list_images
from ldm.errors import UserError, check_once, nearest

FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # the classes of the nine live subjects
# A line of a list: 'a {0} {1} in the snow'.format(unique_token, class_token),
PROMPT = re.compile(r"""^\s*(['"])(?P<template>.*\{0\}.*\{1\}.*)\1\s*\.format\(.*\)\s*,?\s*$""")
SUBJECT = re.compile(r"^\s*(?P<subject>[\w-]+)\s*,\s*(?P<class>[^,]+?)\s*$")
OF_OBJECTS, OF_LIVE = "Object Prompts", "Live Subject Prompts"


@dataclass(frozen=True)
class Subject:
    """A subject of the dataset: its photos, its class and the templates of its prompts."""

    name: str
    class_word: str
    photos: Path
    templates: tuple[str, ...]

    def prompts(self, identifier: str, noun: str | None = None) -> list[str]:
        """Return its prompts, "a sks dog in the snow", or with another noun; either may be ""."""
        named = self.class_word if noun is None else noun
        texts = (template.format(identifier, named) for template in self.templates)
        return [" ".join(text.split()) for text in texts]


def read_dataset(root: Path, names: list[str] | None = None) -> list[Subject]:
    """Read the subjects of a dataset.

    Args:
        root: the repository's folder, or its folder `dataset`.
        names: of the subjects to read; all by default.

    Raises:
        UserError: a file, a folder or a subject is not there.
    """
    folder = next((f for f in (root, root / "dataset") if (f / FILE).is_file()), None)
    if folder is None:
        raise UserError(f"{root}: no {FILE} in it, which says the subjects' classes and prompts")
    classes, lists = parse((folder / FILE).read_text(encoding="utf-8"), folder / FILE)
    for name in names or []:
        if name not in classes:
            raise UserError(f"{folder}: no subject '{name}'{nearest(name, classes)}")
    check_once("--subjects", names or [])
    subjects = []
    for name in names or list(classes):
        if not list_images(folder / name):
            raise UserError(f"{folder / name}: no photos of this subject")
        templates = lists[OF_LIVE if classes[name] in LIVE else OF_OBJECTS]
        subjects.append(Subject(name, classes[name], folder / name, tuple(templates)))
    return subjects


def parse(text: str, path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return each subject's class, and the two lists of templates over {0} and {1}."""
    classes: dict[str, str] = {}
    lists: dict[str, list[str]] = {OF_OBJECTS: [], OF_LIVE: []}
    section = "Classes"
    for line in text.splitlines():
        heading = line.strip()
        if heading in ("Classes", "Prompts", *lists):
            section = heading
        elif section in lists:
            if found := PROMPT.match(line):
                lists[section].append(found["template"])
        elif section == "Classes" and (found := SUBJECT.match(line)):
            classes[found["subject"]] = found["class"]
    classes.pop("subject_name", None)  # the table's heading
    missing = [name for name, templates in lists.items() if not templates]
    if not classes or missing:
        what = f"no prompts under {missing[0]!r}" if missing else "no subjects under 'Classes'"
        raise UserError(f"{path}: {what}")
    return classes, lists
