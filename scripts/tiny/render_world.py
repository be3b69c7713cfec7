"""Draw pictures of the tiny world into a folder, so that a training need not draw them.

    python scripts/tiny/render_world.py --outdir outputs/world --count 24000

Shards that exist stay as they are, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.commands import exit_status
from ldm.tiny.encoders import miniature_nouns
from ldm.tiny.rendered import SHARD, shard_path, write_shard
from ldm.tiny.sprites import SPRITES
from ldm.tiny.world import World


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--outdir", type=Path, required=True, help="where the shards go")
    add("--count", type=int, default=24_000, help="pictures in all")
    add("--sprites", type=Path, default=SPRITES, help="default: %(default)s")
    add(
        "--classes",
        nargs="+",
        default=miniature_nouns(),
        metavar="CLASS",
        help="'all' for every class that has sprites (default: those of the miniature)",
    )
    add("--balance", type=float, default=0.0, help="as of ldm.tiny.world.World")
    add("--plain", action="store_true", help="without materials, accessories, views and styles")
    add(
        "--showing",
        nargs="+",
        default=[],
        metavar="WORD",
        help="every picture shows one of these words, equally often: 'facing left' striped ...",
    )
    add("--split", choices=("train", "test"), default="train")
    add("--held_out", type=float, default=0.0, help="share of designs that the split test has")
    return parser


def render(args: argparse.Namespace) -> None:
    """Draw the shards that are not there yet."""
    world = World(
        args.sprites,
        classes="all" if args.classes == ["all"] else args.classes,
        labels=True,
        balance=args.balance,
        split=args.split,
        held_out=args.held_out,
        plain=args.plain,
        showing=args.showing,
    )
    args.outdir.mkdir(parents=True, exist_ok=True)
    shards = -(-args.count // SHARD)  # rounded up
    for number in range(shards):
        if not shard_path(args.outdir, number).is_file():
            write_shard(world, args.outdir, number)
            print(f"{shard_path(args.outdir, number)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: render(args))


if __name__ == "__main__":
    sys.exit(main())
