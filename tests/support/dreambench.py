"""A small dataset in the published layout of DreamBench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.support.runs import pictures

LAYOUT = """\
Classes

subject_name,class
{classes}

Prompts

Object Prompts

prompt_list = [
'a {{0}} {{1}} in the snow'.format(unique_token, class_token),
'a red {{0}} {{1}}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {{0}} {{1}} in the snow'.format(unique_token, class_token),
'a {{0}} {{1}} wearing a santa hat'.format(unique_token, class_token)
]
"""


def make_dataset(folder: Path, classes: Mapping[str, str]) -> Path:
    """Make a folder of photos for each subject, and the file that says their classes."""
    for seed, name in enumerate(classes):
        pictures(folder / name, 2, seed)
    lines = "\n".join(f"{name},{class_word}" for name, class_word in classes.items())
    (folder / "prompts_and_classes.txt").write_text(LAYOUT.format(classes=lines))
    return folder
