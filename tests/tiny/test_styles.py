"""Styles change the whole picture, each in its own way."""

import numpy as np
import pytest

from ldm.tiny.scenes import SCENES
from ldm.tiny.styles import STYLES, luma


@pytest.fixture(scope="module")
def finished():
    """A picture with a blue disc in a meadow, and the disc's outline."""
    size = 64
    picture = SCENES["in a meadow"](np.random.default_rng(0), size).astype(np.float32) / 255
    y, x = np.mgrid[:size, :size]
    outline = (np.hypot(y - 34, x - 32) < 18).astype(np.float32)
    picture[outline > 0] = (0.2, 0.3, 0.85)
    return picture, outline


def drawn(name, finished, seed=0):
    picture, outline = finished
    return STYLES[name](picture.copy(), outline, np.random.default_rng(seed))


def test_there_are_at_least_six():
    named = {
        "pencil sketch",
        "watercolor painting",
        "ink wash painting",
        "pixel art",
        "stained glass window",
    }
    assert named | {"woodblock print", "oil painting"} <= set(STYLES)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_changes_the_picture_and_repeats_itself(name, finished):
    picture, _ = finished
    before = picture.copy()
    result = drawn(name, finished)
    assert result.shape == picture.shape and result.min() >= 0 and result.max() <= 1.001
    assert np.abs(result - picture).mean() > 0.03
    np.testing.assert_array_equal(result, drawn(name, finished))
    np.testing.assert_array_equal(before, picture)  # the original is left as it was


def test_no_two_styles_look_alike(finished):
    small = {name: drawn(name, finished) for name in STYLES}
    for name, result in small.items():
        others = {
            other: np.abs(result - value).mean() for other, value in small.items() if other != name
        }
        assert min(others.values()) > 0.03, f"{name} looks like {min(others, key=others.get)}"


@pytest.mark.parametrize("name", STYLES)
def test_the_thing_still_stands_out(name, finished):
    _, outline = finished
    result = drawn(name, finished)
    inside, around = result[outline > 0].mean(0), result[outline == 0].mean(0)
    assert np.abs(inside - around).max() > 0.06


@pytest.mark.parametrize("name", ["pencil sketch"])
def test_a_drawing_in_one_colour_has_no_other(name, finished):
    result = drawn(name, finished)
    assert np.ptp(result - luma(result)[..., None], axis=-1).max() < 0.12


def test_coloured_styles_keep_the_things_colour(finished):
    _, outline = finished
    for name in set(STYLES) - {"pencil sketch", "ink wash painting"}:
        assert drawn(name, finished)[outline > 0].mean(0).argmax() == 2, name


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("name", STYLES)
def test_other_sizes(name, size):
    rng = np.random.default_rng(0)
    result = STYLES[name](
        rng.random((size, size, 3), np.float32), np.ones((size, size), np.float32), rng
    )
    assert result.shape == (size, size, 3)
