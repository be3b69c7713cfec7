"""A page: a title and sections of tables and figures, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.files import write_atomically

LARGEST = 400_000  # bytes of a picture that is embedded as it is
WIDEST = 1200  # pixels of a picture's side on a page
QUALITY = 88  # of a JPEG, in the place of larger files


@dataclass(frozen=True)
class Link:
    """A cell that leads to another file."""

    text: str
    href: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table with its caption; a folded one shows its caption alone until it is opened."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A picture inside the page. `alt` says in words what it shows.

    Args:
        width: in pixels, which the caption does not pass; None for as wide as it comes.
    """

    source: str
    alt: str
    caption: str = ""
    width: int | None = None


@dataclass(frozen=True)
class Figures:
    """Figures in a row."""

    figures: Sequence[Figure]
    kind: str = "figures"


Block = Text | Table | Figures


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Args:
        reload: seconds after which a browser reads it again; None for a page that is finished.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    reload: int | None = None

    def html(self) -> str:
        """Return the page's HTML."""
        return str(_template().render(page=self))

    def save(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        text = self.html()
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def data_uri(content: bytes, kind: str) -> str:
    """Return a file as an address that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(path: Path, alt: str, caption: str = "") -> Figure:
    """Return a picture's file as a figure. A large one is embedded as a JPEG.

    Raises:
        UserError: the file cannot be read as an image.
    """
    content, kind = path.read_bytes(), "image/png"
    try:
        if len(content) > LARGEST or path.suffix.lower() != ".png":
            content, kind = _smaller(path), "image/jpeg"
        with Image.open(io.BytesIO(content)) as shown:
            width = shown.width
    except Exception as error:  # Pillow's readers raise whatever their parsers do
        problem = "cannot read this image; replace or remove it"
        raise UserError(f"{path}: {problem}") from error
    return Figure(data_uri(content, kind), alt, caption, width)


def _smaller(path: Path) -> bytes:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


@functools.cache
def _template() -> Any:
    import jinja2

    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True).from_string(source)
