"""Plain scenes: a studio in one colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.tiny.scenes.paint import mix, rgb
from ldm.tiny.scenes.plate import Plate, scene

PLAIN_COLOURS = {
    "red": ("#e0453c", "#d8322f", "#ff7a70"),
    "orange": ("#f58a2e", "#f6a05a", "#ef7a1a"),
    "yellow": ("#fbd23f", "#ffdf6b", "#f2c521"),
    "green": ("#4fb04a", "#9bdc7c", "#2f9a4f"),
    "blue": ("#3f83e0", "#72bdf0", "#2a62c8"),
    "purple": ("#8a48c0", "#a86fd6", "#6f35a5"),
    "pink": ("#f58ab8", "#f9acd0", "#ee6fa5"),
    "brown": ("#8a5a36", "#9c6b45", "#75492a"),
    "gray": ("#8f939a", "#a5a8ad", "#7a7e86"),
    "white": ("#f4f4f2", "#ffffff", "#ecebe8"),
    "black": ("#1c1c20", "#26262b", "#121215"),
}


def plain_words(colour: str) -> str:
    """Return what a caption says of a plain scene: "on an orange background"."""
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def _plain(colour: str) -> Callable[[Plate], None]:
    """Return a function that draws the plain scene of a colour."""

    def draw(p: Plate) -> None:
        """Draw a studio in one colour, its floor lighter."""
        base = rgb(p.choice(*PLAIN_COLOURS[colour])) * p.between(0.96, 1.04)
        bright = mix(base, np.ones(3), 0.0 if colour == "black" else p.between(0.1, 0.4))
        turn = p.between(0.4, 0.6)
        p.gradient(base, base, end=turn)
        p.gradient(base, bright, start=turn - 0.05)

    return draw


for _colour in PLAIN_COLOURS:
    scene(plain_words(_colour))(_plain(_colour))
PLAIN = [plain_words(colour) for colour in PLAIN_COLOURS]
