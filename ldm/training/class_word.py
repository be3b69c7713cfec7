"""The start summary's line about the class word: whether it fits the photos, by a CLIP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ldm.config import RunConfig
from ldm.data.personalized import PersonalizedBase
from ldm.data.reading import load_image
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.data.datamodule import DataModuleFromConfig

log = logging.getLogger(__name__)

KEY = "run.class_clip"
MOST = 8  # photos that are looked at: a start should not become slower with a large folder


@contextmanager
def without_hub() -> Iterator[None]:
    """Take from the hub's cache only what is there: an unreachable hub is asked for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def class_word_line(config: RunConfig, data: DataModuleFromConfig) -> str:
    """Say which class words fit each subject's photos, and whether the given one does.

    It is empty unless `run.class_clip` names a CLIP, see `ldm.tiny.encoders.read_clip`. A CLIP that
    is not on this machine is one line, never an error: the training does not need it.
    """
    name = config.get(KEY)
    if not name:
        return ""
    subjects = [photos for photos in data.each("train") if isinstance(photos, PersonalizedBase)]
    if not subjects:
        return ""
    # Read only now: most starts do without.
    from ldm.evaluation.class_nouns import suggest
    from ldm.tiny.encoders import read_clip

    try:
        # A network draws its first weights from the global generator, which is the training's.
        with torch.random.fork_rng(devices=[]), without_hub():
            towers = read_clip(name)
        lines = []
        for photos in subjects:
            pictures = [load_image(path) for path in photos.paths[:MOST]]
            found = suggest(pictures, towers, photos.class_word)
            if found.is_doubtful:
                log.warning("the class word %s", found.line())
            lines.append(found.line())
    except UserError as error:
        words = ", ".join(f"'{photos.class_word}'" for photos in subjects)
        return f"{words}, not compared with the photos: {error}"
    return "; ".join(lines)
