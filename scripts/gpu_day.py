"""Measure everything that only a GPU can say, in one command of under ten minutes.

    python scripts/gpu_day.py --out gpu_day
    python scripts/gpu_day.py --out gpu_day --into docs/benchmarks.md
    python scripts/gpu_day.py --out rehearsal --rehearse

First what has to be right: autocast with recomputation, `deterministic`, resuming bit by bit, AdamW
in the backward pass, compilation, DDP and NCCL with one process. Then what is fast: training steps,
sampling and memory of Stable Diffusion v1, beside diffusers in the same call. Each piece leaves a
JSON file in `--out`/pieces; a call that ends early, or that runs out of `--minutes`, goes on from
there when it is made again. All of it is in `--out`/gpu_day.json and, as tables, in tables.md.

With `--rehearse` the same pieces run on the processor, at the size of a toy.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.benchmark import gpu_day
from ldm.commands import exit_status
from ldm.config import PROJECT
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.host import accelerators
from ldm.training.cli import Parser

sys.path.append(str(Path(__file__).resolve().parent.parent))  # configs name targets in main.py


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_day"), help="folder (default: %(default)s)")
    add("--minutes", type=float, default=9.5, help="start no piece later (default: %(default)s)")
    add("--size", type=int, default=512, help="pixels of an image's side (default: %(default)s)")
    add("--into", type=Path, metavar="FILE", help="write the tables there, between its two marks")
    add("--rehearse", action="store_true", help="a toy on the processor, to see that it runs")
    return parser


def measure(argv: Sequence[str]) -> None:
    """Run what is left of the day, and write what there is."""
    args = build_parser().parse_args(argv)
    configs = PROJECT / "configs"
    if args.rehearse:
        day = gpu_day.rehearsal(configs, args.out)
    elif accelerators()[0] != "gpu":
        raise UserError("this machine has no GPU; --rehearse tries the pieces on the processor")
    else:
        day = gpu_day.whole_day(configs, args.out, args.size)
    left = gpu_day.run(day, args.minutes)
    found, tables = gpu_day.summarize(day)
    content = json.dumps(found, indent=1, default=str) + "\n"
    write_atomically(args.out / "gpu_day.json", lambda path: path.write_text(content))
    write_atomically(args.out / "tables.md", lambda path: path.write_text(tables))
    if args.into:
        gpu_day.put_into(args.into, tables)
    print(tables)
    if left:
        print(f"{left} pieces are left: make the same call again")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: measure(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
