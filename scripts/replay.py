"""Make a run or a picture again from the recipe inside, and say whether it is the same.

    python scripts/replay.py logs/.../                    # a run's folder, or a .ckpt in it
    python scripts/replay.py outputs/.../00000.png        # a picture of stable_txt2img.py

What a run started from is not in its folder: give it with --ckpt. The exit status is 0 where both
are the same to the bit. On another processor or with other versions, a rounding may differ: what
has changed is said.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldm.commands import exit_status
from ldm.config import PROJECT
from ldm.errors import UserError
from ldm.studies.replay import Comparison, compare_pictures, replay_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, help="a run's folder, a .ckpt in it, or a PNG")
    add("--ckpt", type=Path, help="what a run started from; or what drew a picture")
    add("--outdir", type=Path, help="keep what is made there (default: it is removed again)")
    return parser


def replay(args: argparse.Namespace) -> int:
    """Make it again, and compare."""
    if not args.file.exists():
        raise UserError(f"{args.file}: no such file or folder")
    if args.outdir is not None:
        return _told(_again(args, args.outdir))
    with tempfile.TemporaryDirectory(prefix="replay-") as outdir:
        return _told(_again(args, Path(outdir)))


def _again(args: argparse.Namespace, outdir: Path) -> Comparison:
    if args.file.suffix.lower() == ".png":
        return _picture(args, outdir)
    if args.file.is_file() and args.file.resolve().parent.name != "checkpoints":
        raise UserError(
            f"{args.file}: holds the model's config and not the training's: give the run's "
            "folder, or a .ckpt in it"
        )
    folder = args.file if args.file.is_dir() else args.file.resolve().parent.parent
    return replay_run(folder, outdir, args.ckpt)


def _picture(args: argparse.Namespace, outdir: Path) -> Comparison:
    # A script that is run is no part of a package, so it cannot import its neighbour by name.
    draw = runpy.run_path(str(PROJECT / "scripts/stable_txt2img.py"))["main"]
    before = set(outdir.rglob("*.png"))
    words = ["--like", str(args.file), "--outdir", str(outdir)]
    words += ["--ckpt", str(args.ckpt)] if args.ckpt else []
    if draw(words):
        raise UserError(f"{args.file}: could not be drawn again")
    drawn = sorted(set(outdir.rglob("*.png")) - before)
    if len(drawn) != 1:
        raise UserError(f"{outdir}: {len(drawn)} pictures were drawn, where one was wanted")
    return compare_pictures(args.file, drawn[0])


def _told(found: Comparison) -> int:
    print(found)
    return 0 if found.same else 1


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: replay(args))


if __name__ == "__main__":
    sys.exit(main())
