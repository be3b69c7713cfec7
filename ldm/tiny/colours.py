"""What a colour word makes of a thing."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, UInt8

from ldm.tiny.scenes.paint import rgb

Array = np.ndarray
# A colour's shadows, its middle tones, its highlights.
COLOURS = {
    "red": ("#5e0a0f", "#d92b2b", "#ff9a8f"),
    "orange": ("#7a3208", "#f5851f", "#ffd2a0"),
    "yellow": ("#7d5a05", "#f7cf2b", "#fff3b0"),
    "green": ("#0d4016", "#35a53f", "#b4ecaa"),
    "blue": ("#0c1f66", "#2f63dd", "#a9ccff"),
    "purple": ("#2e0d55", "#8036bf", "#d8b0f5"),
    "pink": ("#8a2457", "#f277b0", "#ffd3e6"),
    "brown": ("#33190b", "#84522c", "#c9a27c"),
    "black": ("#060608", "#2a2a30", "#6a6a74"),
    "white": ("#9aa0a8", "#e9ebee", "#ffffff"),
    "gray": ("#36393f", "#868b93", "#d0d4d9"),
}


@functools.cache
def _ramp(colour: str) -> Float[Array, "256 3"]:
    """Return a colour word's red, green and blue, 0 to 255, for every tone from dark to light."""
    shadow, middle, light = (rgb(c) * 255 for c in COLOURS[colour])
    t = np.linspace(0, 2, 256)[:, None]
    lower = shadow + (middle - shadow) * t
    upper = middle + (light - middle) * (t - 1)
    return np.where(t < 1, lower, upper).astype(np.float32)


def recoloured(pixels: UInt8[Array, "h w 4"], colour: str) -> UInt8[Array, "h w 4"]:
    """Give a sprite one colour and keep its light and dark.

    Where most of a sprite has colours, its white places, such as eyes, stay white.
    """
    straight = pixels[..., :3].astype(np.float32)
    visible = pixels[..., 3] > 127
    if not visible.any():
        return pixels
    # The colour follows the brightness; the sprite's middle brightness becomes the middle tone.
    luma = straight @ np.array([0.3, 0.59, 0.11], np.float32)
    low, middle, high = np.percentile(luma[visible], (3, 50, 97))
    dark = np.maximum((luma - low) / max(middle - low, 40) - 1, -1)
    bright = np.minimum((luma - middle) / max(high - middle, 40), 1)
    tone = np.clip(127.5 + 127.5 * np.where(luma < middle, dark, bright), 0, 255)
    toned = _ramp(colour)[tone.astype(np.uint8)]

    # Keep what is bright and has no colour.
    value = straight.max(-1)
    saturation = (value - straight.min(-1)) / np.maximum(value, 1)
    if (saturation[visible] > 0.25).mean() > 0.5:
        keep = np.clip((value - 200) / 30, 0, 1) * np.clip((0.16 - saturation) / 0.06, 0, 1)
        toned += (straight - toned) * keep[..., None]
    return np.concatenate([toned.astype(np.uint8), pixels[..., 3:]], -1)
