"""Write the weights that the miniature's CLIP starts from: the text encoder of the miniature, which
stays as it is, an image tower, and a projection that has learned nothing yet.

python scripts/tiny/clip_start.py --output clip-start.safetensors
python main.py --base configs/tiny/clip.yaml -t -n clip --actual_resume clip-start.safetensors \\
    model.params.freeze_text=true
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.files import write_atomically
from ldm.tiny.clip import CLIP, with_text_encoder
from ldm.tiny.miniature import CLIP_CONFIG, CLIP_IMAGES, WEIGHTS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", type=Path, default=WEIGHTS, help="the miniature (default: the one that ships)")
    add("--images", type=Path, default=CLIP_IMAGES, help="a file with `clip.visual.*`")
    add("--output", required=True, type=Path, help="the .safetensors file to write")
    return parser


def run(args: argparse.Namespace) -> None:
    """Put the towers together and write them."""
    clip = CLIP(**to_plain(load_config([CLIP_CONFIG]))["model"]["params"])
    images = state_dict_of(read_checkpoint(args.images), args.images)
    diffusion = state_dict_of(read_checkpoint(args.ckpt), args.ckpt)
    state = with_text_encoder({**clip.state_dict(), **images}, diffusion)
    clip.load_state_dict({key: value.float() for key, value in state.items()})
    weights = {key: value.contiguous() for key, value in clip.state_dict().items()}
    write_atomically(args.output, lambda path: save_file(weights, path))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
