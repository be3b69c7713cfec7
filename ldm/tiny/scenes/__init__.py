"""The tiny world's scenes: DreamBooth's prompts as pictures with depth and a ground to stand on.

`SCENES` maps the words of a prompt ("in the jungle") to a function `(rng, size) -> (size, size, 3)
uint8`. The picture is a function of the generator `rng` alone. A scene is put together from cached
tiles and props.
"""

from ldm.tiny.scenes import nature, town  # noqa: F401  (they register their scenes)
from ldm.tiny.scenes.paint import rgb
from ldm.tiny.scenes.plain import PLAIN
from ldm.tiny.scenes.plate import SCENES

__all__ = ["PLAIN", "SCENES", "rgb"]
