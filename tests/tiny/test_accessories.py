"""Accessories: drawn on the head, and only where the head is seen."""

import numpy as np
import pytest

from ldm.tiny.accessories import ACCESSORIES, variant, wearable
from ldm.tiny.world import Description, World

HEAD = {"crown": [0.5, 0.1, 0.3], "eyes": [0.5, 0.3, 0.3], "neck": [0.5, 0.5, 0.25]}


def test_the_issues_accessories_are_there():
    assert {"wearing a red hat", "wearing a bow tie", "wearing sunglasses"} <= set(ACCESSORIES)


@pytest.mark.parametrize("words", ACCESSORIES)
def test_an_accessory_is_drawn_where_it_is_worn(words, toys):
    """A hat changes the upper part of the picture, glasses and scarves what is below; nothing else
    changes.
    """
    dataset, toy = World(toys, size=64), toys / "dog" / "toy-dog00@front.png"
    dressed_up = Description("dog", toy, "on a white background", None, "", accessory=words)
    place = dataset._place(dressed_up, dataset._sprite(toy), np.random.default_rng(1))
    layer = place.render(dataset._sprite(toy), 64, None, 0.0)
    dressed = place.dress(dataset._sprite(toy), layer, variant(words, 0))
    changed = np.abs(dressed - layer).max(-1) > 20
    assert 8 < changed.sum() < 1500
    rows = np.flatnonzero(changed.any(1)).mean() / 64
    top, bottom = place.bottom - place.height, place.bottom
    middle = (rows - top) / (bottom - top)
    expected = HEAD[variant(words, 0).anchor][1]
    assert abs(middle - expected) < 0.45
    np.testing.assert_array_equal(
        dressed, place.dress(dataset._sprite(toy), layer, variant(words, 0))
    )


def test_what_is_worn_follows_a_mirrored_sprite(toys):
    dataset, toy = World(toys, size=64), toys / "dog" / "toy-dog00@front.png"
    sprite = dataset._sprite(toy)
    sprite.anchors = {"crown": [0.2, 0.2, 0.15]}
    place = dataset._place(
        Description("dog", toy, "", None, "", accessory="x"), sprite, np.random.default_rng(1)
    )
    columns = []
    for mirrored in (False, True):
        turned = type(place)(**{**vars(place), "mirrored": mirrored, "x": 0.5, "angle": 0.0})
        layer = np.zeros((64, 64, 4), np.float32)
        worn = turned.dress(sprite, layer, variant("wearing a golden crown", 0))
        columns.append(np.average(np.arange(64), weights=worn[..., 3].sum(0)))
    assert columns[0] < 31 < 33 < columns[1] and columns[0] + columns[1] == pytest.approx(
        63, abs=1.5
    )


def test_faces_are_dressed_only_where_they_are_seen():
    assert set(wearable(HEAD, "front")) == set(wearable(HEAD, None)) == set(ACCESSORIES)
    assert wearable(HEAD, "above") == wearable({}, "front") == []
    hats = set(wearable(HEAD, "back"))
    assert "wearing a red hat" in hats and not hats & {"wearing sunglasses", "wearing a bow tie"}
    assert set(wearable({"crown": [0.5, 0.1, 0.3]}, "front")) == hats


def test_a_head_is_dressed_only_if_there_is_one(toys):
    dataset = World(toys, size=16, classes=["vase"])
    assert dataset._sprite(toys / "vase" / "toy-vase00@front.png").anchors == {}
