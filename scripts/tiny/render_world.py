"""Draw pictures of the tiny world into a folder, so that a training need not draw them.

    python scripts/tiny/render_world.py --outdir outputs/world --count 24000

Shards that exist stay as they are, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.tiny.rendered import SHARD, shard_path, write_shard
from ldm.tiny.sprites import SPRITES
from ldm.tiny.world import World


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outdir", type=Path, required=True, help="where the shards go")
    parser.add_argument("--count", type=int, default=24_000, help="pictures in all")
    parser.add_argument("--sprites", type=Path, default=SPRITES, help="default: %(default)s")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="default: all")
    parser.add_argument("--balance", type=float, default=0.0, help="as of ldm.tiny.world.World")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument(
        "--held_out", type=float, default=0.0, help="share of designs that the split test has"
    )
    args = parser.parse_args(argv)
    world = World(
        args.sprites,
        classes=args.classes or "all",
        labels=True,
        balance=args.balance,
        split=args.split,
        held_out=args.held_out,
    )
    args.outdir.mkdir(parents=True, exist_ok=True)
    shards = -(-args.count // SHARD)  # rounded up
    for number in range(shards):
        if not shard_path(args.outdir, number).is_file():
            write_shard(world, args.outdir, number)
            print(f"{shard_path(args.outdir, number)}", flush=True)


if __name__ == "__main__":
    main()
