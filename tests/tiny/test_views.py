"""Views: which sprites can show them, which way a thing looks, and how large it is."""

from pathlib import Path

import numpy as np
import pytest

from ldm.rng import generator
from ldm.tiny.views import ABOVE, BEHIND, CAMERAS, CAMERAS_OF, VIEWS, camera, fitting
from ldm.tiny.world import Description, World


def seen_from(dataset, view, count=400):
    found = [dataset.describe(generator("view", view, n)) for n in range(count)]
    return [seen for seen in found if (seen.view or "") == view]


def test_the_issues_views_are_there():
    assert set(VIEWS) == {
        "facing left",
        "facing right",
        "from behind",
        "from above",
        "close-up",
        "far away",
    }


def test_backs_and_tops_are_shown_only_where_they_are_said(toys):
    dataset = World(toys, size=16, classes=["dog"])
    assert {camera(seen.sprite) for seen in seen_from(dataset, "from behind")} == set(BEHIND)
    assert {camera(seen.sprite) for seen in seen_from(dataset, "from above")} == set(ABOVE)
    for view in ("", "close-up", "far away"):
        assert not {camera(seen.sprite) for seen in seen_from(dataset, view)} & {*BEHIND, *ABOVE}
    for view in ("facing left", "facing right"):
        assert {camera(seen.sprite) for seen in seen_from(dataset, view)} == {"turned", "side"}


def test_a_class_without_a_back_is_not_shown_from_behind(toys):
    dataset = World(toys, size=16, classes=["vase"])
    views = {dataset.describe(generator("vase", n)).view for n in range(200)}
    assert views == {None, "close-up", "far away"}


def test_drawings_in_profile_face_a_side():
    drawings = [
        Path("dog/noto-dog.png"),
        Path("dog/noto-guide-dog.png"),
        Path("dog/toy-dog00@side.png"),
    ]
    assert fitting("facing left", drawings, "dog", ["*-guide-dog.png"]) == drawings[1:]
    assert fitting("facing left", drawings, "vase", ["*-guide-dog.png"]) == []


def test_a_sprite_is_mirrored_to_face_the_side_that_is_said(toys):
    """Toys are rendered turned to the right, drawings in profile look to the left."""
    dataset = World(toys, size=16, classes=["dog"])
    toy, rng = toys / "dog" / "toy-dog00@side.png", np.random.default_rng(0)
    for sprite, mirrored in ((toy, "facing left"), (Path("dog/twemoji-dog.png"), "facing right")):
        for view in ("facing left", "facing right"):
            seen = Description("dog", sprite, "in a meadow", None, "", view=view)
            assert dataset._mirror(seen, rng) == (view == mirrored)


@pytest.mark.parametrize(
    ("view", "smallest", "largest"),
    [("far away", 0.2, 0.4), ("close-up", 1.2, 1.7), (None, 0.6, 1)],
)
def test_distance_is_size(toys, view, smallest, largest):
    dataset, toy = World(toys, size=16), toys / "dog" / "toy-dog00@front.png"
    for seed in range(20):
        seen = Description("dog", toy, "in a meadow", None, "", view=view)
        place = dataset._place(seen, dataset._sprite(toy), np.random.default_rng(seed))
        assert smallest < max(place.width, place.height) < largest


def test_cameras_of_a_class_are_cameras():
    assert all(set(names) <= set(CAMERAS) for names in CAMERAS_OF.values())
