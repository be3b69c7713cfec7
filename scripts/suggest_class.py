"""Suggest a class word for photos, with a CLIP.

    python scripts/suggest_class.py photos/ --clip ViT-B-32/openai
    python scripts/suggest_class.py models/tiny/subjects/dog --clip miniature --class_word cat
    python scripts/suggest_class.py photos/ --clip ViT-L-14/clip-vit-large.bin --nouns dog wolf fox

CLIP compares the photos with "a photo of a NOUN" for 145 nouns. `miniature` is the
small CLIP that comes along: it needs no network, and it knows the 24 classes of the miniature's
world alone. The shares are those of CLIP's softmax, averaged over the photos. A given word looks
wrong if another noun is more than five times as likely, unless one is a kind of the other. main.py
does the same at its start with run.class_clip=NAME.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ldm.commands import exit_status
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.evaluation.class_nouns import suggest
from ldm.sampling.text_to_image import pick_device
from ldm.tiny.encoders import read_clip

SHOWN = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("photos", help="a folder of photos of the subject")
    add(
        "--clip",
        required=True,
        metavar="NAME",
        help="a CLIP that open_clip knows, such as ViT-B-32/openai; a file of ViT-B-32's weights; "
        "`miniature`, the one that comes along; or another checkpoint of the miniature's CLIP",
    )
    add("--class_word", help="the word that you have in mind, to compare")
    add("--nouns", nargs="+", metavar="NOUN", help="compare with these instead")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the photos, ask CLIP, print the nouns."""
    photos = [load_image(path) for path in find_images(args.photos)]
    clip = read_clip(args.clip, pick_device(args.device))
    found = suggest(photos, clip, args.class_word, args.nouns)
    print(found.line())
    for noun, share in list(found.shares.items())[:SHOWN]:
        print(f"  {share:6.1%}  {noun}")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
