"""The tiny world's scenes."""

import numpy as np
import pytest
from PIL import Image

from ldm.tiny.scenes import PLAIN, SCENES

PAPER_SCENES = [
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "on top of green grass with sunflowers around it",
    "on top of a dirt road",
    "on top of a white rug",
    "floating in an ocean of milk",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
]


@pytest.mark.parametrize("size", [32, 64])
def test_every_scene_draws_repeatably_and_unlike_the_others(size):
    drawn = {words: draw(np.random.default_rng(3), size) for words, draw in SCENES.items()}
    for words, pixels in drawn.items():
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(
            pixels, SCENES[words](np.random.default_rng(3), size), err_msg=words
        )
        assert (pixels != SCENES[words](np.random.default_rng(4), size)).any(), words
    small = {
        w: np.asarray(Image.fromarray(p).resize((8, 8), Image.Resampling.BOX), float)
        for w, p in drawn.items()
    }
    for words, pixels in small.items():
        closest = min(
            (np.abs(pixels - other).mean(), name) for name, other in small.items() if name != words
        )
        assert closest[0] > 6, f"{words} looks like {closest[1]}"


def test_the_papers_scenes_are_there():
    assert {*PAPER_SCENES, "at night", "on a red background", "on an orange background"} <= set(
        SCENES
    )
    assert set(PLAIN) < set(SCENES)
