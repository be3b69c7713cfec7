"""Pictures in labelled rows on one sheet: how the demo shows subject photos next to samples."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import UserError

Entry = Image.Image | tuple[str, Image.Image]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, FAINT = "#fafafa", "#1c1c1c", "#666666"


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Entry]]], cell: int = 128, title: str | None = None
) -> Image.Image:
    """Return a grid of pictures, each fitted into `cell` pixels a side, each row under its label.

    A row is a label and its pictures; a picture may carry a caption, as `(caption, picture)`. Rows
    may differ in length. The sheet grows with its title and labels; a caption wider than its
    picture ends in an ellipsis.
    """
    if cell < 1 or not rows:
        raise UserError(
            f"a contact sheet needs rows and a cell of 1 pixel or more, got {len(rows)} and {cell}"
        )
    # All sizes follow from the cell, so that a sheet looks alike at any scale.
    gap = max(2, cell // 16)
    large, medium, small = (ImageFont.load_default(max(10, round(cell / n))) for n in (6, 8, 10))
    # Measure everything first: a Pillow image cannot grow.
    headings = [(title or "", large)] + [(label, medium) for label, _ in rows]
    columns = max(len(entries) for _, entries in rows)
    width = max(
        columns * (cell + gap) - gap, *(round(font.getlength(text)) for text, font in headings)
    )
    top = gap + (_line(large) + gap if title else 0)
    heights = [_line(medium) + _pictures_height(entries, cell, gap, small) for _, entries in rows]

    # Draw the rows from the top, each at the height that was measured for it.
    sheet = Image.new("RGB", (gap + width + gap, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title or "", INK, large)
    for (label, entries), height in zip(rows, heights):
        draw.text((gap, top), label, INK, medium)
        for column, entry in enumerate(entries):
            caption, image = _captioned(entry)
            x, y = gap + column * (cell + gap), top + _line(medium)
            _paste_fitted(sheet, image, (x, y), cell)
            draw.text((x, y + cell + gap // 4), _shorten(caption, small, cell), FAINT, small)
        top += height
    return sheet


def _captioned(entry: Entry) -> tuple[str, Image.Image]:
    return ("", entry) if isinstance(entry, Image.Image) else entry


def _pictures_height(entries: Sequence[Entry], cell: int, gap: int, font: Font) -> int:
    """Return the height of a row's pictures and captions, the gap below them included."""
    captions = _line(font) if any(_captioned(entry)[0] for entry in entries) else 0
    return (cell if entries else 0) + captions + gap


def _paste_fitted(
    sheet: Image.Image, image: Image.Image, corner: tuple[int, int], cell: int
) -> None:
    """Scale the image into the cell, keeping its proportions, and centre it there."""
    # The longer side fills the cell; the shorter one gets margins.
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    place = (corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2)
    # The picture's own alpha is the mask, so that transparent parts show the paper.
    sheet.paste(fitted, place, mask=fitted)


def _line(font: Font) -> int:
    """Return the height of a line of text, with some air below it."""
    # These letters reach highest and lowest.
    return round(1.3 * font.getbbox("Ág")[3])


def _shorten(text: str, font: Font, width: int) -> str:
    """Return the text, or as much of its beginning as fits the width together with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
