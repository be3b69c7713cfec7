"""Render the toys of the tiny world: every class in many designs, each from several sides.

    python scripts/tiny/render_toys.py --outdir models/tiny/sprites

A cut-out is `{class}/toy-{class}{number}@{camera}.png`. The cameras are those of `ldm.tiny.views`.
The file's text says where the toy's head is, so that it can wear something. Files that exist stay
as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from ldm.tiny.renderer import cut_out
from ldm.tiny.toys import BUILDERS, build
from ldm.tiny.views import CAMERAS, CAMERAS_OF


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--outdir", type=Path, default=Path("models/tiny/sprites"), help="where the sprites go"
    )
    parser.add_argument(
        "--classes", nargs="+", choices=BUILDERS, default=list(BUILDERS), metavar="CLASS"
    )
    parser.add_argument("--designs", type=int, default=10, help="designs per class")
    parser.add_argument("--size", type=int, default=88, help="longer side of a cut-out in pixels")
    args = parser.parse_args(argv)
    for number in range(args.designs):
        for class_word in args.classes:
            render_design(class_word, number, args.outdir / class_word, args.size)
    print(f"{args.outdir}: {args.designs} designs of {len(args.classes)} classes")


def render_design(class_word: str, number: int, folder: Path, size: int) -> None:
    """Render the cut-outs of a design that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    toy = build(class_word, number)
    for camera in CAMERAS_OF.get(class_word, CAMERAS):
        yaw, pitch = CAMERAS[camera]
        path = folder / f"toy-{class_word.replace(' ', '_')}{number:02}@{camera}.png"
        if path.exists():
            continue
        image, anchors = cut_out(toy, yaw, pitch, size)
        text = PngInfo()
        text.add_text("anchors", json.dumps(anchors))
        image.save(path, pnginfo=text)


if __name__ == "__main__":
    main()
