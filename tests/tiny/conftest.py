"""Sprites that are drawn here, so that no test of the tiny world fetches anything."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ldm.tiny.views import CAMERAS

FAMILIES = ("noto", "noto_v1", "twemoji", "fluent", "fluent_3d")
ANCHORS = {"crown": [0.5, 0.1, 0.3], "eyes": [0.5, 0.3, 0.3], "neck": [0.5, 0.5, 0.25]}


def blob(rng: np.random.Generator) -> Image.Image:
    """Draw an ellipse in some colour."""
    image = Image.new("RGBA", (128, int(rng.integers(60, 129))))
    ImageDraw.Draw(image).ellipse(
        (2, 2, 125, image.height - 3), fill=tuple(rng.integers(256, size=3))
    )
    return image


@pytest.fixture(scope="package")
def sprites(tmp_path_factory):
    """Blobs of three classes: 5 families of 2 icons each, and one class of a single design."""
    root = tmp_path_factory.mktemp("sprites")
    rng = np.random.default_rng(0)
    for class_word, icons in (
        ("dog", ("dog", "poodle")),
        ("glasses", ("glasses", "goggles")),
        ("owl", ("owl",)),
    ):
        (root / class_word).mkdir()
        for icon in icons:
            for family in FAMILIES if class_word != "owl" else FAMILIES[:2]:
                blob(rng).save(root / class_word / f"{family}-{icon}.png")
    return root


@pytest.fixture(scope="package")
def toys(tmp_path_factory):
    """Two designs of a dog as if rendered by every camera, with a head to wear things on, and a
    vase of one camera.
    """
    root = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(1)
    text = PngInfo()
    text.add_text("anchors", json.dumps(ANCHORS))
    for class_word, cameras in (("dog", CAMERAS), ("vase", ("front",))):
        (root / class_word).mkdir()
        for number in range(2):
            for camera in cameras:
                path = root / class_word / f"toy-{class_word}{number:02}@{camera}.png"
                blob(rng).save(path, pnginfo=text if class_word == "dog" else None)
    return root
