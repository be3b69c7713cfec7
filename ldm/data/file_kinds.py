"""Tell what a file is by its first bytes: its ending may say something else."""

from __future__ import annotations

from pathlib import Path

# Pictures that Pillow reads, by how their files begin.
READ = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
# Pictures that Pillow does not read.
NOT_READ = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"gimp xcf": "GIMP",
}
# The brands in the header of the MP4 family, to which HEIC and AVIF belong, too.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def picture_kind(path: Path) -> str | None:
    """Name the format of a picture ("PNG", "HEIC"); None for any other file."""
    head = _head(path)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _brand(head)
    for start, kind in (READ | NOT_READ).items():
        if head.startswith(start):
            return kind
    return None


def _why_no_file(path: Path) -> str:
    """Say what is in a file's place."""
    if path.is_dir():
        return "it is a folder; give a file in it"
    if path.is_symlink():
        return "a link to a file that is gone"
    return "there is no such file"


def why_unreadable(path: Path) -> str:
    """Say why Pillow does not open a file that has the ending of an image, and what to do."""
    if not path.is_file():
        return _why_no_file(path)
    head, kind = _head(path), picture_kind(path)
    text = head.lstrip().lower()
    if not head:
        return "the file is empty"
    if kind == "HEIC" or kind in NOT_READ.values():
        return f"{kind}, whatever its ending says: save it as .png or .jpg"
    if kind == "TIFF":
        return "a TIFF that is damaged, or of a kind that Pillow does not read: save it as .png"
    if kind is not None:
        return f"a damaged {kind} file"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image itself: fetch it with git lfs pull"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image: download the image itself"
    if head[4:8] == b"ftyp":
        return "a video, not an image"
    return "no image format that Pillow knows"


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _brand(head: bytes) -> str | None:
    if head[8:12] in HEIC_BRANDS:
        return "HEIC"
    return "AVIF" if head[8:12] in AVIF_BRANDS else None
