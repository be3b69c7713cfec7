"""A family of simple toys for every class of the tiny world, in any number of designs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.tiny.renderer import Toy
from ldm.tiny.toys import animals, things

BUILDERS: dict[str, Callable[[np.random.Generator], Toy]] = {
    "backpack": things.backpack,
    "bear": animals.bear,
    "boot": things.boot,
    "bowl": things.bowl,
    "bus": things.bus,
    "cactus": things.cactus,
    "can": things.can,
    "candle": things.candle,
    "car": things.car,
    "cat": animals.cat,
    "clock": things.clock,
    "dog": animals.dog,
    "fox": animals.fox,
    "glasses": things.glasses,
    "owl": animals.owl,
    "panda": animals.panda,
    "penguin": animals.penguin,
    "rabbit": animals.rabbit,
    "robot": things.robot,
    "sneaker": things.sneaker,
    "stuffed animal": animals.stuffed_animal,
    "teapot": things.teapot,
    "toy": things.toy,
    "vase": things.vase,
}


def build(class_word: str, number: int) -> Toy:
    """Build design number `number` of a class. A number means the same design every time."""
    return BUILDERS[class_word](np.random.default_rng([number, *class_word.encode()]))
