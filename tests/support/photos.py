"""Small pictures, and files that look like ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def folder(root: Path, count: int, shape: tuple[int, ...] = (8, 8, 3), first: int = 0) -> Path:
    """Write `count` images under `root`, image i full of the value 10 (first + i)."""
    root.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full(shape, 10 * (first + i), np.uint8)).save(root / f"{i:02}.png")
    return root


def picture(width: int = 24, height: int = 16, turn: int = 0) -> Image.Image:
    """Return a picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = [x * 255 // (width - 1), y * 255 // (height - 1), (x + 2 * y) % 256]
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8)).rotate(turn)


def as_numbers(pictures: Sequence[Image.Image]) -> NDArray[np.float64]:
    """Return pictures as numbers in [0, 255], of which differences may be negative."""
    return np.array([np.asarray(picture, np.float64) for picture in pictures])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_chunk(png: bytes, kind: bytes, content: bytes, damaged: bool = False) -> bytes:
    """Return a PNG with one more chunk behind its header."""
    crc = zlib.crc32(kind + content) ^ damaged
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return png[:33] + chunk + png[33:]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """Return a JPEG with one more segment at its beginning."""
    return (
        jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]
    )
