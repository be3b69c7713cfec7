"""Convert checkpoints: the weights alone in a file, or a diffusers pipeline folder, and back; LoRA files.

    python scripts/convert.py --ckpt logs/.../checkpoints/last.ckpt --output my-dog.safetensors --dtype fp16
    python scripts/convert.py --ckpt my-dog.safetensors --output pipeline/                     # for diffusers
    python scripts/convert.py --ckpt pipeline/ --output model.ckpt                             # and back

    python scripts/convert.py --ckpt my-dog.safetensors --lora_base sd-v1-4.ckpt --output lora.safetensors
    python scripts/convert.py --ckpt sd-v1-4.ckpt --lora lora.safetensors --output my-dog.safetensors     # merged
    python scripts/convert.py --ckpt sd-v1-4.ckpt --vae vae-ft-mse.ckpt --output better-eyes.safetensors

--ckpt may be a .ckpt, a .safetensors, the index of a sharded one, or a pipeline folder. Files of ours say which config
they fit, and those of Stable Diffusion are recognised; for others give --config. Of a LoRA run's checkpoint the plain
model is written, its adapters merged; with --adapters these alone, as a LoRA file.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import find_config, lora_alpha, plain_weights
from ldm.checkpoints.diffusers_format import VAE, config_of_pipeline, part, read_pipeline, save_pipeline
from ldm.checkpoints.ema import WEIGHTS, ema_weights, weights_to_sample_from
from ldm.checkpoints.export import DTYPES, SUFFIXES, in_dtype, shared_config, target_of, training_facts, write_weights
from ldm.checkpoints.families import config_for
from ldm.checkpoints.loading import describe, instantiate_filled
from ldm.checkpoints.lora import adapted_layers, adapters_alone, extract_lora, merge_lora, not_in_lora
from ldm.checkpoints.lora_formats import read_lora
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.util import instantiate_from_config


@dataclass(frozen=True)
class Model:
    """Named tensors, the config of their model (empty if nothing says it), and what is known about their training."""

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    facts: Mapping[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, type=Path, help="a checkpoint file or a diffusers pipeline folder")
    parser.add_argument(
        "--output", required=True, type=Path, help="a .safetensors or .ckpt file, or a folder for diffusers"
    )
    parser.add_argument("--config", type=Path, help="the model's YAML (default: the checkpoint's own, or its family's)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the matrices and convolutions (default: as they are)")
    parser.add_argument("--weights", choices=WEIGHTS, help="default: the averaged ones, if the checkpoint has them")
    parser.add_argument("--keep_ema", action="store_true", help="the trained weights, and the averages beside them")
    parser.add_argument(
        "--lora_base", type=Path, metavar="CKPT", help="write the LoRA that leads from this one to --ckpt"
    )
    parser.add_argument("--rank", type=int, default=32, help="of that LoRA (default: %(default)s)")
    parser.add_argument("--adapters", action="store_true", help="of a LoRA run's checkpoint, the LoRA file alone")
    parser.add_argument(
        "--lora", type=Path, metavar="PATH", help="merge this LoRA (a file, or a folder of peft's) into the weights"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="of the merged LoRA (default: %(default)s)")
    parser.add_argument(
        "--vae", type=Path, metavar="CKPT", help="put this one's autoencoder in the place of the model's"
    )
    parser.add_argument("--only", metavar="PREFIX", default="", help="tensors whose names start so")
    return parser


def read(args: argparse.Namespace) -> Model:
    """The weights that the flags choose, and what is known about them."""
    given = to_plain(load_config([args.config])) if args.config else None
    if args.ckpt.is_dir():
        for flag in ("weights", "keep_ema", "only"):
            if getattr(args, flag):
                raise UserError(f"--{flag}: is for checkpoint files; {args.ckpt} is a pipeline folder")
        return read_folder(args.ckpt, given)
    content = read_checkpoint(args.ckpt)
    own = find_config(content, args.ckpt)
    state: Mapping[str, Tensor] = plain_weights(content, args.ckpt, given)
    print(f"{args.ckpt}: {describe(state)}")
    if args.keep_ema:
        if args.weights:
            raise UserError("--keep_ema: keeps both, without --weights")
        ema_weights(state, args.ckpt)  # raises if there are none
    else:
        state = weights_to_sample_from(state, args.ckpt, args.weights)
    state = {key: value for key, value in state.items() if key.startswith(args.only)}
    if not state:
        raise UserError(f"--only {args.only}: no tensor of {args.ckpt} starts so")
    return Model(state, shared_config(given or own), facts_of(content, own))


def facts_of(content: Mapping[str, Any], config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """How a checkpoint's weights were trained, as it says itself or as its run's config does."""
    return content.get("training") or training_facts(config, content.get("global_step"))


def read_folder(folder: Path, given: Mapping[str, Any] | None) -> Model:
    """A diffusers pipeline as a model of the given config, or of the one that it fits."""
    config = given or to_plain(load_config([config_of_pipeline(folder)]))
    with torch.device("meta"):
        ours = instantiate_from_config(target_of(shared_config(config)), "model")
    state = {**schedule_of(config), **read_pipeline(folder, ours.state_dict())}
    return Model(state, shared_config(config), {})


def read_adapters(args: argparse.Namespace) -> Model:
    """The adapters of a LoRA run's checkpoint, as a LoRA file's tensors."""
    for flag in ("weights", "keep_ema", "lora", "lora_base", "vae", "only"):
        if getattr(args, flag):
            raise UserError(f"--adapters: does not go with --{flag}")
    if args.output.suffix == "":
        raise UserError(f"--output {args.output}: --adapters writes a .safetensors file")
    content = read_checkpoint(args.ckpt)
    state = state_dict_of(content, args.ckpt)
    if not adapted_layers(state):
        raise UserError(f"{args.ckpt}: no adapters in it: it is not of a LoRA run (see --lora_base)")
    given = to_plain(load_config([args.config])) if args.config else None
    alone = adapters_alone(state, lora_alpha(content, args.ckpt, given))
    return Model(alone, {}, facts_of(content, find_config(content, args.ckpt)))


def schedule_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The schedule's buffers, which a pipeline does not have."""
    params = config["model"]["params"]
    accepted = signature(NoiseSchedule.create).parameters
    schedule = NoiseSchedule.create(**{key: value for key, value in params.items() if key in accepted})
    return {name: getattr(schedule, name) for name in NoiseSchedule.names()}


def convert(args: argparse.Namespace) -> None:
    """Read, choose, round, write."""
    if args.output.suffix not in ("", *SUFFIXES):
        raise UserError(f"--output {args.output}: expected a .safetensors or .ckpt file, or a folder for diffusers")
    model = read_adapters(args) if args.adapters else read(args)
    if args.lora_base:
        base = plain_weights(read_checkpoint(args.lora_base), args.lora_base)
        base = weights_to_sample_from(base, args.lora_base, None)
        report_left_out(not_in_lora(base, model.state))
        model = Model(extract_lora(base, model.state, args.rank), {}, model.facts)
    if args.vae:
        model = Model(with_vae(model.state, args.vae), model.config, model.facts)
    if args.lora:
        state = {key: value.clone() for key, value in model.state.items()}
        layers = merge_lora(state, read_lora(args.lora), args.strength, args.lora)
        print(f"{args.lora}: {layers} layers merged")
        model = Model(state, model.config, model.facts)
    state = in_dtype(model.state, DTYPES.get(args.dtype))
    if args.output.suffix == "":
        write_pipeline(args, state, model.config)
    else:
        write_weights(args.output, state, model.config, model.facts)
        print(f"{args.output}: {len(state)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")


def report_left_out(keys: Sequence[str]) -> None:
    """Say what differs between two models and has no place in a LoRA file."""
    if keys:
        print(f"{len(keys)} tensors differ that a LoRA cannot hold (biases, norms, embeddings, the autoencoder):")
        print(f"  {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")


def with_vae(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A model's tensors with the autoencoder of another checkpoint, or of one that is nothing else."""
    other = state_dict_of(read_checkpoint(path), path)
    other = part(other, VAE) or other
    ours = part(state, VAE)
    if wrong := [key for key, value in ours.items() if key not in other or other[key].shape != value.shape]:
        raise UserError(
            f"--vae {path}: no autoencoder of this model's shape in it: '{wrong[0]}' is missing or different"
        )
    return {**state, **{VAE + key: other[key] for key in ours}}


def write_pipeline(args: argparse.Namespace, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A folder for diffusers, all of it in the precision that was asked for."""
    if args.keep_ema:
        raise UserError(f"--keep_ema: a pipeline folder such as {args.output} has one set of weights")
    config = config or to_plain(load_config([config_for(state, args.ckpt)]))
    model, _ = instantiate_filled(target_of(config), state, args.ckpt)
    if args.dtype:
        model = model.to(DTYPES[args.dtype])
    save_pipeline(model, config["model"]["params"], args.output)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
