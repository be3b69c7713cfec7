"""Read an image file as 8-bit RGB."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ldm.data.file_kinds import why_unreadable
from ldm.data.notices import warn_once
from ldm.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = 178_956_970  # more are decoded at a part of their size, or refused, as Pillow does
PNG_START = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that its pixels or their orientation depend on.
PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"}


def load_image(path: str | Path, background: str = "white") -> Image.Image:
    """Return an image file as 8-bit RGB, turned as its EXIF data says, on a `background`.

    Metadata that is damaged or large does not matter where the pixels are whole. Of an animation,
    the first frame is read. A JPEG of more than `MOST_PIXELS` is decoded at a half, a quarter or an
    eighth of its size.

    Raises:
        UserError: the file does not decode, or has too many pixels.
    """
    path = Path(path)
    # Pillow warns of what is odd in metadata, which is not read here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(path, path, background)
        except Image.DecompressionBombError as error:
            return _decode_reduced(path, background, error)
        except Exception as error:  # Pillow's readers raise whatever their parsers do
            image = _decode_without_metadata(path, background)
            if image is None:
                raise _unreadable(path, error) from error
            return image


def _decode(file: Path | IO[bytes], path: Path, background: str) -> Image.Image:
    with Image.open(file) as image:
        _warn_of_frames(image, path)
        image.load()
        return _to_rgb(_upright(image), background)


def _warn_of_frames(image: Image.Image, path: Path) -> None:
    """Say that only the first frame of an animation, or the first page of a TIFF, is read."""
    if image.format == "MPO":  # a camera's photo, with a preview or a second view behind it
        return
    try:
        frames = getattr(image, "n_frames", 1)
        image.seek(0)
    except Exception:  # a later frame that is damaged
        return
    if frames > 1:
        warn_once(f"{path}: of its {frames} frames, the first one is read")


def _decode_reduced(path: Path, background: str, error: Exception) -> Image.Image:
    """Decode a JPEG of very many pixels at a part of its size; other formats have no such way."""
    count = re.search(r"(\d+) pixels", str(error))
    size = f"{int(count[1]) / 1e6:.0f} megapixels" if count else "too many pixels"
    try:
        # The class itself, because Image.open refuses the size before anything can be reduced.
        with JpegImageFile(path) as image:
            pixels = image.width * image.height
            part = next(n for n in (2, 4, 8) if pixels <= n**2 * MOST_PIXELS / 2)
            image.draft(None, (image.width // part, image.height // part))
            image.load()
            warn_once(f"{path}: {size}; read at 1/{part} of its width and height")
            return _to_rgb(_upright(image), background)
    except (SyntaxError, StopIteration):
        most = f"{MOST_PIXELS / 1e6:.0f} megapixels are the most"
        raise UserError(f"{path}: {size}, and {most}: save it smaller, or as .jpg") from error
    except Exception as broken:
        raise _unreadable(path, broken) from broken


def _decode_without_metadata(path: Path, background: str) -> Image.Image | None:
    """Decode the pixels of a PNG or JPEG whose metadata Pillow cannot read; None if they fail."""
    try:
        content = path.read_bytes()
        plain = pixels_of_png(content) if content.startswith(PNG_START) else pixels_of_jpeg(content)
        return _decode(io.BytesIO(plain), path, background)
    except Exception:  # the first error is the one to report
        return None


def pixels_of_png(content: bytes) -> bytes:
    """Return a PNG without the chunks that its pixels do not need: texts, profiles, animation."""
    kept, at = [PNG_START], len(PNG_START)
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + length
        (checksum,) = struct.unpack(">I", content[end - 4 : end].rjust(4, b"\0"))
        is_damaged_exif = kind == b"eXIf" and checksum != zlib.crc32(content[at + 4 : end - 4])
        if kind in PNG_KEPT and not is_damaged_exif:
            kept.append(content[at:end])
        if kind == b"IEND" or end > len(content) or not kind.isalpha():
            break
        at = end
    # What follows the last whole chunk may be anything. Decoding finds pixels that are cut off.
    if kept[-1][4:8] != b"IEND":
        kept.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return b"".join(kept)


def pixels_of_jpeg(content: bytes) -> bytes:
    """Return a JPEG without comments and application segments; EXIF and Adobe's colour mode stay.

    Raises:
        ValueError: it is no JPEG.
    """
    if not content.startswith(b"\xff\xd8"):
        raise ValueError("no JPEG")
    kept, at = [content[:2]], 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:  # the scan, where pixels begin
        marker = content[at + 1]
        (length,) = struct.unpack(">H", content[at + 2 : at + 4])
        segment = content[at : at + 2 + length]
        is_exif = marker == 0xE1 and segment[4:8] == b"Exif"
        is_adobe = marker == 0xEE and len(segment) >= 16
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or is_exif or is_adobe:
            kept.append(segment)
        at += 2 + length
    return b"".join([*kept, content[at:]])


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data says; where that is damaged, leave it as it is."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever the parser stumbles over
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        values = values >> 8 if image.mode.startswith("I;16") or values.max() > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(below, image).convert("RGB")
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error that says in words why an image does not decode."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, (Image.UnidentifiedImageError, FileNotFoundError, IsADirectoryError)):
        reason = why_unreadable(path)
    return UserError(f"{path}: cannot read this image ({reason}); replace or remove it")
