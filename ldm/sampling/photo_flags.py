"""The flags of commands that draw a photo anew."""

from __future__ import annotations

import argparse


def add_photo_flags(parser: argparse.ArgumentParser, strength: float) -> None:
    """Add the flags of commands that draw a photo anew."""
    add = parser.add_argument_group("photo").add_argument
    add("--init-img", "--init_img", metavar="PHOTO", help="the photo, of any size and format")
    add(
        "--strength",
        type=float,
        default=strength,
        help="share of the steps that are taken; 1 ignores what was there (default: %(default)s)",
    )


def add_mask_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is drawn anew."""
    add = parser.add_argument_group("mask").add_argument
    add("--mask", metavar="IMAGE", help="white is drawn anew; as large as the photo")
    add("--box", type=box, metavar="X,Y,W,H", help="a rectangle of the photo, instead of a mask")
    add(
        "--mask_blur",
        type=int,
        default=4,
        help="pixels inside the mask's border that mix photo and painting (default: %(default)s)",
    )
    add(
        "--padding",
        type=int,
        default=32,
        help="pixels around the mask that the model sees at least (default: %(default)s)",
    )


def box(text: str) -> list[int]:
    """Read four whole numbers that commas separate."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"expected left, top, width, height, got {text}")
    return numbers
