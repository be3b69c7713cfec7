"""Materials replace a thing's colours, patterns keep them; neither changes its outline or the
scene.
"""

import numpy as np
import pytest

from ldm.tiny.colours import COLOURS, recoloured
from ldm.tiny.materials import MATERIALS, PATTERNS

EVERY = {**MATERIALS, **PATTERNS}


@pytest.fixture(scope="module")
def thing():
    """A blue ball with light from above, on nothing."""
    size = 96
    y, x = np.mgrid[:size, :size]
    inside = np.hypot(y - 48, x - 48) < 44
    light = np.clip(1.25 - y / size, 0.25, 1)[..., None]
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[..., :3] = np.array([50, 90, 230]) * light
    pixels[inside, 3] = 255
    return pixels


def changed(word, pixels, seed=0):
    return EVERY[word](pixels.copy(), np.random.default_rng(seed))


def mean_colour(pixels):
    return pixels[pixels[..., 3] > 127][:, :3].astype(float).mean(0)


def test_there_are_at_least_five():
    assert {"wooden", "golden", "stone", "glass"} <= set(MATERIALS) and {
        "striped",
        "spotted",
    } <= set(PATTERNS)
    assert not set(MATERIALS) & set(PATTERNS) and not set(EVERY) & set(COLOURS)


@pytest.mark.parametrize("word", EVERY)
def test_a_material_changes_the_thing_and_repeats_itself(word, thing):
    result = changed(word, thing)
    assert result.dtype == np.uint8 and result.shape == thing.shape
    inside = thing[..., 3] > 127
    assert np.abs(result[inside, :3].astype(float) - thing[inside, :3]).mean() > 8
    np.testing.assert_array_equal(result, changed(word, thing))


@pytest.mark.parametrize("word", EVERY)
def test_the_outline_stays(word, thing):
    result = changed(word, thing)
    assert (result[thing[..., 3] == 0, 3] == 0).all()
    if word != "glass":
        np.testing.assert_array_equal(result[..., 3], thing[..., 3])
    else:
        assert 40 < result[thing[..., 3] > 0, 3].mean() < 230


@pytest.mark.parametrize("word", PATTERNS)
@pytest.mark.parametrize("colour", [None, "red", "green", "yellow"])
def test_colours_stay_under_a_pattern(word, colour, thing):
    """Between the marks the thing is as it was, and the marks take a good part of it."""
    base = thing if colour is None else recoloured(thing, colour)
    result = changed(word, base)
    inside = base[..., 3] > 127
    same = np.abs(result[inside, :3].astype(int) - base[inside, :3]).max(-1) <= 2
    assert 0.3 < same.mean() < 0.85


@pytest.mark.parametrize(
    ("word", "order"),
    [("golden", (0, 1, 2)), ("wooden", (0, 1, 2)), ("glass", (2, 1, 0))],
    ids=lambda v: str(v),
)
def test_a_material_has_its_own_colour(word, order, thing):
    colour = mean_colour(changed(word, thing))
    assert list(np.argsort(-colour)) == list(order)


@pytest.mark.parametrize("word", ["stone", "silver"])
def test_stone_and_silver_are_grey(word, thing):
    assert np.ptp(mean_colour(changed(word, thing))) < 20


@pytest.mark.parametrize("word", EVERY)
def test_an_empty_sprite_stays_empty(word):
    assert (changed(word, np.zeros((12, 9, 4), np.uint8))[..., 3] == 0).all()
