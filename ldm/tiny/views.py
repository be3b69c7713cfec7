"""From where a thing is seen: the cameras of the toys, and the words of a caption for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Name of a camera -> how far a toy is turned to the right, and how far the camera looks down, in
# degrees.
CAMERAS = {
    "front": (0.0, 9.0),
    "quarter": (32.0, 10.0),
    "turned": (62.0, 9.0),
    "side": (90.0, 8.0),
    "away": (150.0, 10.0),
    "back": (180.0, 9.0),
    "above": (28.0, 66.0),
}
# Some things look the same from most sides, or cannot be recognised from some. They are rendered
# from these cameras alone.
CAMERAS_OF = {
    "bowl": ("front", "above"),
    "cactus": ("front", "quarter", "above"),
    "can": ("front", "quarter", "above"),
    "candle": ("front", "quarter", "above"),
    "clock": ("front", "quarter", "back", "above"),
    "glasses": ("front", "quarter"),
    "teapot": ("front", "quarter", "above"),
    "vase": ("front", "quarter", "above"),
}
BEHIND, ABOVE = ("away", "back"), ("above",)
LEFT, RIGHT = "facing left", "facing right"
VIEWS = (LEFT, RIGHT, "from behind", "from above", "close-up", "far away")
# Things that have a front and a back. A vase looks the same from behind.
WITH_A_BACK = {
    "backpack", "bear", "bus", "car", "cat", "clock", "dog", "fox", "owl", "panda", "penguin",
    "rabbit", "robot", "stuffed animal",
}  # fmt: skip
WITH_A_SIDE = (WITH_A_BACK | {"boot", "sneaker"}) - {"backpack", "clock", "owl", "stuffed animal"}


def camera(sprite: Path) -> str | None:
    """Return the name of the camera that rendered a sprite; None for a drawing."""
    return sprite.stem.partition("@")[2] or None


def fitting(
    view: str, sprites: Sequence[Path], class_word: str, sides: Sequence[str]
) -> list[Path]:
    """Return the sprites of a class that can show a view.

    Args:
        view: one of `VIEWS`; "" for none in particular.
        sides: patterns of the names of drawings in profile. All of these look to the left.
    """
    if view == "from behind":
        return [s for s in sprites if class_word in WITH_A_BACK and camera(s) in BEHIND]
    if view == "from above":
        return [s for s in sprites if camera(s) in ABOVE]
    if view in (LEFT, RIGHT):
        return [s for s in sprites if class_word in WITH_A_SIDE and in_profile(s, sides)]
    return [s for s in sprites if camera(s) not in (*BEHIND, *ABOVE)]


def in_profile(sprite: Path, sides: Sequence[str]) -> bool:
    """Return whether a sprite looks to one side."""
    seen_by = camera(sprite)
    if seen_by is None:
        return any(sprite.match(pattern) for pattern in sides)
    return seen_by in ("turned", "side")
