"""Convert checkpoints: weights alone in a small file, or a diffusers pipeline folder, and back.

    python scripts/convert.py --ckpt logs/.../checkpoints/last.ckpt --output model.safetensors --half --ema
    python scripts/convert.py --ckpt model.safetensors --output pipeline/                      # for diffusers
    python scripts/convert.py --ckpt pipeline/ --output model.safetensors --config configs/.../v1-inference.yaml

    python scripts/convert.py --ckpt my-dog.safetensors --lora_base sd-v1-4.ckpt --output lora.safetensors
    python scripts/convert.py --ckpt sd-v1-4.ckpt --lora lora.safetensors --output my-dog.safetensors         # merged

Files of ours say which config they fit; for others give `--config`. `--only PREFIX` keeps a part, for example the
image tower of the miniature's CLIP: `--only clip.visual.`
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import (
    ema_weights,
    instantiate_filled,
    read_checkpoint,
    state_dict_of,
    tensor_bytes,
    without_initial_weights,
    write_atomically,
)
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.diffusers_format import read_pipeline, save_pipeline
from ldm.errors import UserError
from ldm.families import config_for
from ldm.inference import find_config
from ldm.lora import extract_lora, merge_lora
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.util import instantiate_from_config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, type=Path, help="a checkpoint file or a diffusers pipeline folder")
    parser.add_argument("--output", required=True, type=Path, help="a .safetensors file, or a folder for diffusers")
    parser.add_argument("--config", type=Path, help="the model's YAML (default: the one that the checkpoint carries)")
    parser.add_argument("--half", action="store_true", help="16 bits for each weight")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    parser.add_argument(
        "--lora_base", type=Path, metavar="CKPT", help="write the LoRA that leads from this one to --ckpt"
    )
    parser.add_argument("--rank", type=int, default=32, help="of that LoRA (default: %(default)s)")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="merge this LoRA into the weights")
    parser.add_argument("--strength", type=float, default=1.0, help="of the merged LoRA (default: %(default)s)")
    parser.add_argument("--only", metavar="PREFIX", default="", help="tensors whose names start so")
    return parser


def shared_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model's config without what only its training needs."""
    model = without_initial_weights((config or {}).get("model") or {})
    params = {**model.get("params", {})}
    if "use_ema" in params:
        params["use_ema"] = False
    return {"model": {**model, "params": params}} if model else {}


def read(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the config of their model (empty if nothing says it)."""
    given = to_plain(load_config([args.config])) if args.config else None
    if args.ckpt.is_dir():
        if args.ema or args.only:
            raise UserError(f"{args.ckpt}: --ema and --only are for checkpoint files, not for a pipeline folder")
        if given is None:
            raise UserError(f"{args.ckpt}: a pipeline does not say which of our configs it fits: give --config")
        with torch.device("meta"):
            ours = instantiate_from_config(_target(shared_config(given)), "model")
        return {**schedule_of(given), **read_pipeline(args.ckpt, ours.state_dict())}, shared_config(given)
    content = read_checkpoint(args.ckpt)
    state = state_dict_of(content, args.ckpt)
    state = ema_weights(state, args.ckpt) if args.ema else state
    state = {key: value for key, value in state.items() if key.startswith(args.only) and "model_ema." not in key}
    if not state:
        raise UserError(f"--only {args.only}: no tensor of {args.ckpt} starts so")
    return state, shared_config(given or find_config(content, args.ckpt))


def schedule_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The schedule's buffers, which a pipeline does not have."""
    params = config["model"]["params"]
    accepted = signature(NoiseSchedule.create).parameters
    schedule = NoiseSchedule.create(**{key: value for key, value in params.items() if key in accepted})
    return {name: getattr(schedule, name) for name in NoiseSchedule.names()}


def _target(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config["model"].items() if key != "base_learning_rate"}


def convert(args: argparse.Namespace) -> None:
    """Read, choose, round, write."""
    if args.output.suffix not in ("", ".safetensors"):
        raise UserError(f"--output {args.output}: expected a .safetensors file, or a folder for a diffusers pipeline")
    state, config = read(args)
    if args.lora_base:
        base = state_dict_of(read_checkpoint(args.lora_base), args.lora_base)
        state, config = extract_lora(base, state, args.rank), {}
    if args.lora:
        state = {key: value.clone() for key, value in state.items()}
        layers = merge_lora(state, state_dict_of(read_checkpoint(args.lora), args.lora), args.strength)
        print(f"{args.lora}: {layers} layers merged")
    if args.output.suffix == "":
        config = config or to_plain(load_config([config_for(state, args.ckpt)]))
        model, _ = instantiate_filled(_target(config), state, args.ckpt)
        save_pipeline(model.half() if args.half else model, config["model"]["params"], args.output)
        print(args.output)
        return
    # Vectors stay as they are: the ends of the schedule need the digits.
    state = {
        key: (value.half() if args.half and value.is_floating_point() and value.ndim != 1 else value).contiguous()
        for key, value in state.items()
    }
    metadata = {"format": "pt", **({"config": json.dumps(config)} if config else {})}
    write_atomically(args.output, lambda path: save_file(state, path, metadata=metadata), tensor_bytes(state))
    print(f"{args.output}: {len(state)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
