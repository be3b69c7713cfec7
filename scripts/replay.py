"""Make a run or a picture again from the recipe inside, and say whether it is the same.

    python scripts/replay.py logs/.../                    # a run's folder
    python scripts/replay.py model.safetensors --data_root photos --reg_data_root class_images
    python scripts/replay.py outputs/.../00000.png        # a picture of stable_txt2img.py

A weights file is a run's checkpoint, or what was exported of it: whole weights in any precision, a
LoRA, new words. What a run started from is not in its folder: give it with --ckpt. Where the photos
are is not in an exported file: give it with the flags of main.py, which go to it. The exit status
is 0 where both are the same to the bit. On another processor or with other versions, a rounding may
differ: what has changed is said.
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
from ldm.sampling.metadata import read_recipe
from ldm.studies.replay import (
    Comparison,
    changes_since,
    compare_pictures,
    replay_file,
    replay_run,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s FILE [--ckpt FILE] [--outdir DIR] [flags of main.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, help="a run's folder, a weights file, or a PNG")
    add("--ckpt", type=Path, help="what a run started from; or what drew a picture")
    add("--outdir", type=Path, help="keep what is made there (default: it is removed again)")
    return parser


def replay(args: argparse.Namespace, rest: Sequence[str] = ()) -> int:
    """Make it again, and compare."""
    if not args.file.exists():
        raise UserError(f"{args.file}: no such file or folder")
    if args.outdir is not None:
        return _told(_again(args, rest, args.outdir))
    with tempfile.TemporaryDirectory(prefix="replay-") as outdir:
        return _told(_again(args, rest, Path(outdir)))


def _again(args: argparse.Namespace, rest: Sequence[str], outdir: Path) -> Comparison:
    if args.file.is_dir():
        return replay_run(args.file, outdir, args.ckpt, rest)
    if args.file.suffix.lower() != ".png":
        return replay_file(args.file, outdir, args.ckpt, rest)
    if rest:
        raise UserError(f"{args.file}: a picture takes no flags of main.py, got {' '.join(rest)}")
    return _picture(args, outdir)


def _picture(args: argparse.Namespace, outdir: Path) -> Comparison:
    # A script that is run is no part of a package, so it cannot import its neighbour by name.
    draw = runpy.run_path(str(PROJECT / "scripts/stable_txt2img.py"))["main"]
    before = set(outdir.rglob("*.png"))
    words = ["--like", str(args.file), "--outdir", str(outdir)]
    words += ["--ckpt", str(args.ckpt)] if args.ckpt else []
    for line in changes_since((read_recipe(args.file) or {}).get("environment", {})):
        logging.info("%s", line)
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
    args, rest = build_parser().parse_known_args(argv)
    return exit_status(lambda: replay(args, rest))


if __name__ == "__main__":
    sys.exit(main())
