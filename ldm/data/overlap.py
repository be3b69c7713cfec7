"""Find what the subject's images and the class images have in common: it would be taught as
both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.data.finding import is_searched
from ldm.data.notices import warn_once
from ldm.errors import UserError

WAY_OUT = "give the subject's photos and the class images a folder each, neither inside the other"


def check_folders(subject: str | Path, prior: str | Path) -> None:
    """Raise a `UserError` if the search for images in one of two folders comes to the other one.

    The folder `prior` may not exist yet.
    """
    subject, prior = Path(subject).expanduser(), Path(prior).expanduser()
    if prior.exists() and subject.exists() and prior.samefile(subject):
        raise UserError(
            f"{prior}: is the folder of both the subject's photos and the class images: {WAY_OUT}; "
            "or train without class images: model.params.reg_weight=0"
        )
    if is_searched(subject, prior):
        raise UserError(
            f"{prior}: the class images lie in the subject's folder {subject}, and would be "
            f"trained as the subject: {WAY_OUT}"
        )
    if is_searched(prior, subject):
        raise UserError(
            f"{subject}: the subject's photos lie in the folder of the class images {prior}, and "
            f"would be trained as the class: {WAY_OUT}"
        )


def check_files(subject: Sequence[Path], prior: Sequence[Path]) -> None:
    """Raise a `UserError` if a file is in both sets by a link."""
    of_subject = {_identity(path): path for path in subject}
    both = [(of_subject[_identity(path)], path) for path in prior if _identity(path) in of_subject]
    if both:
        raise UserError(
            f"{_named(both)}: one file, among the subject's photos and the class images: {WAY_OUT}"
        )


def warn_of_copies(
    subject: Mapping[Path, str],
    prior: Mapping[Path, str],
    how: str = "as the subject and as its class",
) -> None:
    """Warn of pictures that are in both sets, which come as hashes of their pixels."""
    of_subject = {pixels: path for path, pixels in subject.items()}
    copies = [(of_subject[pixels], path) for path, pixels in prior.items() if pixels in of_subject]
    if copies:
        warn_once(f"{_named(copies)}: one picture, {how}: remove one")


def _named(pairs: Sequence[tuple[Path, Path]]) -> str:
    first, second = pairs[0]
    more = f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""
    return f"{first} and {second}{more}"


def _identity(path: Path) -> tuple[int, int] | Path:
    """Return what a file is known by, whatever links lead to it; a link to nothing is itself."""
    if not path.exists():
        return path
    status = path.stat()
    return status.st_dev, status.st_ino
