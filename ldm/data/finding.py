"""Find the images of a folder, and leave out what programs and file systems put there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.data.file_kinds import picture_kind
from ldm.data.notices import warn_once
from ldm.errors import UserError

SUFFIXES = (
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm",
    ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
UNREADABLE = {
    ".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".pef", ".psd",
    ".raf", ".raw", ".rw2", ".srw", ".svg", ".xcf",
}  # fmt: skip
# Where NAS devices, Windows and macOS keep thumbnails, copies and deleted files. Hidden folders
# (.thumbnails, .AppleDouble, .ipynb_checkpoints) and files (._01.jpg) are left out by their dot.
SYSTEM_FOLDERS = {
    "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "lost+found", "network trash folder", "recycler", "system volume information",
    "temporary items",
}  # fmt: skip
# Files that lie beside images and are no pictures.
TEXTS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".xmp"}
SNIFFED = 100  # files of other endings whose first bytes are looked at
MASK = ".mask"  # a mask is named after its image: 01.mask.png beside 01.jpg


def list_images(root: str | Path) -> list[Path]:
    """List the image files under `root` by their endings, sorted, without masks.

    The list is empty if there is no such folder.
    """
    return [path for path in image_files(root) if not is_mask(path)]


def image_files(root: str | Path) -> list[Path]:
    """List the image files under `root` by their endings, sorted, masks included."""
    return [path for path in list_files(root) if path.suffix.lower() in SUFFIXES]


def is_mask(path: Path) -> bool:
    """Tell whether an image file is named as a mask, which is never taken for an image."""
    return Path(path.stem).suffix.lower() == MASK


def find_images(root: str | Path) -> list[Path]:
    """List the image files under `root`, sorted, and warn of pictures that are not read.

    Hidden files and folders and those of the system are left out. Linked folders are searched,
    each once.

    Raises:
        UserError: `root` is missing, is no folder or has no image in it.
    """
    root = Path(root).expanduser()
    wanted = f"expected a folder with images ({' '.join(SUFFIXES)})"
    if not root.exists():
        raise UserError(f"{root}: no such folder; {wanted}")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; {wanted}")
    files = list_files(root)
    images = [path for path in files if path.suffix.lower() in SUFFIXES and not is_mask(path)]
    if not images:
        endings = sorted({path.suffix.lower() for path in files} - {""})
        found = f", found only {' '.join(endings) or 'other files'}" if files else ""
        raise UserError(f"{root}: no image in it{found}; {wanted}")
    _warn_of_unread(root, files)
    return images


def _warn_of_unread(root: Path, files: Sequence[Path]) -> None:
    """Warn of pictures whose format or ending keeps them from being read."""
    unreadable = Counter(path.suffix.lower() for path in files if path.suffix.lower() in UNREADABLE)
    if unreadable:
        warn_once(
            f"{root}: {unreadable.total()} files ending in {' '.join(sorted(unreadable))} "
            "are skipped; "
            "save them as .png or .jpg"
        )
    known = {*SUFFIXES, *UNREADABLE, *TEXTS}
    others = [path for path in files if path.suffix.lower() not in known]
    kinds = {path: picture_kind(path) for path in others[:SNIFFED]}
    pictures = [path for path, kind in kinds.items() if kind]
    if pictures:
        path = pictures[0]
        more = f" and {len(pictures) - 1} more" if len(pictures) > 1 else ""
        warn_once(
            f"{path}{more}: {kinds[path]} by content, but not by its ending: skipped; rename it"
        )


def list_files(root: str | Path) -> list[Path]:
    """List the files under `root`, sorted; hidden files and those of the system are left out."""
    return sorted(path for _, files in walk(root) for path in files)


def walk(root: str | Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield `root` and each folder under it with the files in it; nothing if there is no `root`.

    Links to folders are followed. Each folder comes once, and none that `root` lies in, so links
    in a circle come to an end.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        return
    seen = {_identity(folder) for folder in root.resolve().parents}
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        # Links come last, so that a folder that is also linked keeps its own name.
        folder = folders.pop() if folders else links.pop()
        if _identity(folder) in seen:
            continue
        seen.add(_identity(folder))
        files = []
        for entry in _entries(folder):
            path = Path(entry.path)
            # A link that leads to itself is one to nothing; an entry would raise for it.
            if entry.is_symlink():
                if os.path.isdir(path):
                    links.append(path)
                # A link to a file that is gone is listed, so that reading it says so.
                elif os.path.isfile(path) or not os.path.exists(path):
                    files.append(path)
            elif entry.is_dir():
                folders.append(path)
            elif entry.is_file():
                files.append(path)
        yield folder, files


def is_searched(root: str | Path, folder: str | Path) -> bool:
    """Tell whether the search for images under `root` comes to `folder`, which may not exist
    yet.
    """
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        if _is_left_out(place.name):
            return False
        place = place.parent
    return any(place.samefile(found) for found, _ in walk(root))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List what is in a folder, without what is left out."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not _is_left_out(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot look into this folder ({error.strerror})") from error
    return sorted(found, key=lambda entry: entry.name)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _identity(folder: Path) -> tuple[int, int]:
    """Return what a folder is known by, whatever links lead to it: its device and inode."""
    status = folder.stat()
    return status.st_dev, status.st_ino
