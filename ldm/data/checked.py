"""Which images of a large folder have been decoded before, by their content.

To decode 20,000 images takes minutes, to read their bytes seconds. What is remembered lies in the
user's cache folder, never beside the photos.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import PIL

from ldm.errors import UserError
from ldm.files import write_atomically

log = logging.getLogger(__name__)

DECODER = f"Pillow {PIL.__version__}, 1"  # of another one, nothing is known


def cache_folder() -> Path:
    """Return where the user's programs keep what they can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dreambooth-ldm"


class CheckedImages:
    """The hashes of the pixels of a folder's images, by the hashes of their files.

    Args:
        root: the folder, which has one file in the cache.
    """

    def __init__(self, root: Path):
        name = hashlib.blake2b(str(root.resolve()).encode(), digest_size=16).hexdigest()
        self.path = cache_folder() / "checked" / f"{name}.json"
        self._known = self._read()
        self._seen: dict[str, str] = {}

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(found["pixels"]) if found["decoder"] == DECODER else {}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or half of one: made anew
            return {}

    def pixels(self, file_hash: str) -> str | None:
        """Return the hash of the pixels that a file of this content was decoded to; None if none
        was.
        """
        known = self._known.get(file_hash)
        if known is not None:
            self._seen[file_hash] = known
        return known

    def add(self, file_hash: str, pixels: str) -> None:
        """Note what a file of this content was decoded to."""
        self._seen[file_hash] = pixels

    def save(self) -> None:
        """Keep what was seen of the folder, for the next start; where that fails, do without."""
        if self._seen == self._known:
            return
        content = json.dumps({"decoder": DECODER, "pixels": self._seen})
        try:
            write_atomically(self.path, lambda path: path.write_text(content, encoding="utf-8"))
        except (UserError, OSError) as error:
            log.info("what was checked is not remembered: %s", error)


def hash_of(content: bytes | memoryview) -> str:
    """Return a hash of a file's bytes, or of pixels."""
    # Of those in Python the fastest; nobody gains by a collision.
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
