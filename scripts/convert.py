"""Make a small file to share of a training checkpoint: weights alone, with the config that they belong to.

    python scripts/convert.py --ckpt logs/.../checkpoints/last.ckpt --output model.safetensors --half --ema

`--only PREFIX` keeps a part, for example the image tower of the miniature's CLIP: `--only clip.visual.`
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ldm.checkpoint import (
    ema_weights,
    read_checkpoint,
    state_dict_of,
    tensor_bytes,
    without_initial_weights,
    write_atomically,
)
from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.inference import find_config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, type=Path, help="what to convert")
    parser.add_argument("--output", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="16 bits for each weight")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    parser.add_argument("--only", metavar="PREFIX", default="", help="tensors whose names start so")
    return parser


def shared_config(config: dict[str, Any] | None) -> dict[str, Any]:
    """The model's config without what only its training needs."""
    model = without_initial_weights((config or {}).get("model") or {})
    params = {**model.get("params", {})}
    if "use_ema" in params:
        params["use_ema"] = False
    return {"model": {**model, "params": params}} if model else {}


def convert(args: argparse.Namespace) -> None:
    """Read, choose, round, write."""
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: expected a file that ends in .safetensors")
    content = read_checkpoint(args.ckpt)
    state = state_dict_of(content, args.ckpt)
    if args.ema:
        state = ema_weights(state, args.ckpt)
    state = {key: value for key, value in state.items() if key.startswith(args.only) and "model_ema." not in key}
    if not state:
        raise UserError(f"--only {args.only}: no tensor of {args.ckpt} starts so")
    # The schedule stays as it is: its ends need the digits.
    state = {
        key: (value.half() if args.half and value.is_floating_point() and value.ndim != 1 else value).contiguous()
        for key, value in state.items()
    }
    config = shared_config(find_config(content, args.ckpt))
    metadata = {"format": "pt", **({"config": json.dumps(config)} if config else {})}
    write_atomically(args.output, lambda path: save_file(state, path, metadata=metadata), tensor_bytes(state))
    print(f"{args.output}: {len(state)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
