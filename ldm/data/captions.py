"""Read the captions that lie in text files beside the images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.data.notices import warn_once
from ldm.errors import UserError

ENDINGS = (".txt", ".caption")  # of a caption file, in any case
TEMPLATE_FIELD = re.compile(r"\{(identifier|class_word)\}")
# Files in which other programs keep the captions of a whole folder.
LISTS = {
    f"{name}.{ending}" for name in ("captions", "metadata") for ending in ("csv", "json", "jsonl")
}
# Encodings by the mark that a file begins with; without a mark it is UTF-8.
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def read_captions(images: Sequence[Path], may_be_empty: bool = False) -> dict[Path, str]:
    """Return the caption of each image that has one: dog.txt, dog.caption or dog.jpg.txt for
    dog.jpg.

    Text files that belong to no image are warned of.

    Raises:
        UserError: an image with two captions that differ, or a file that is no text, or that is
            empty and may not be.
    """
    # Each folder is listed once: asking for every spelling of every ending would miss some.
    folders = sorted({image.parent for image in images})
    files = [file for folder in folders for file in _caption_files(folder)]
    by_name: dict[Path, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.with_suffix(""), []).append(file)

    captions: dict[Path, str] = {}
    used: set[Path] = set()
    for image in images:
        beside = [*by_name.get(image.with_suffix(""), []), *by_name.get(image, [])]
        used.update(beside)
        if beside:
            captions[image] = _one_caption(image, beside, may_be_empty)
    _warn_of_unused(folders, [file for file in files if file not in used])
    return captions


def _caption_files(folder: Path) -> list[Path]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in visible if path.suffix.lower() in ENDINGS and path.is_file())


def _one_caption(image: Path, files: Sequence[Path], may_be_empty: bool) -> str:
    found = {file: read_text(file, "caption").strip() for file in files}
    if len(set(found.values())) > 1:
        names = " and ".join(file.name for file in files)
        raise UserError(f"{image}: two captions that differ, {names}: remove one")
    file, text = next(iter(found.items()))
    if not text and not may_be_empty:
        raise UserError(
            f"{file}: this caption is empty; write one, or remove the file to use the templates"
        )
    # A caption is read as it is. With a template's fields it would teach these letters.
    field = TEMPLATE_FIELD.search(text)
    if field:
        raise UserError(
            f"{file}: {field[0]} is filled in where it is in a template, not in a caption; write "
            "the word itself"
        )
    return text


def _warn_of_unused(folders: Iterable[Path], unused: Sequence[Path]) -> None:
    """Warn of captions that belong to no image, and of files that list the captions of a folder."""
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.lower() in LISTS:
                warn_once(
                    f"{path}: is not read; a caption is a text beside its image, 01.txt for 01.jpg"
                )
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warn_once(f"{unused[0]}{more}: no image of this name is beside it: nobody's caption")


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if a mark at its beginning says so.

    Raises:
        UserError: it cannot be read, or is no such text; the message calls it `what`.
    """
    advice = "save it as UTF-8 text"
    try:
        content = path.read_bytes()
        marked = [encoding for mark, encoding in ENCODINGS.items() if content.startswith(mark)]
        text = content.decode(marked[0] if marked else "utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot read this {what} ({error}); {advice}") from error
    if "\0" in text:
        raise UserError(f"{path}: cannot read this {what} (zero bytes in it); {advice}")
    return text
