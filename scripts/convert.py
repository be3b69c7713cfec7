"""Convert checkpoints: to the weights alone, to a diffusers folder, and back; LoRA files.

    convert=scripts/convert.py
    python $convert --ckpt RUN/checkpoints/last.ckpt --output my-dog.safetensors --dtype fp16
    python $convert --ckpt my-dog.safetensors --output pipeline/              # for diffusers
    python $convert --ckpt pipeline/ --output model.ckpt                      # and back

    python $convert --ckpt my-dog.safetensors --lora_base sd-v1-4.ckpt --output lora.safetensors
    python $convert --ckpt sd-v1-4.ckpt --lora lora.safetensors --output merged.safetensors
    python $convert --ckpt sd-v1-4.ckpt --vae vae-ft-mse.ckpt --output better-eyes.safetensors
    python $convert --ckpt my-dog.safetensors --mix sd-v1-4.ckpt 0.3 --output softer.safetensors

    python $convert --ckpt RUN/checkpoints/last.ckpt --words --output my-dog.pt  # for web UIs

--ckpt may be a .ckpt, .safetensors, .pt or .bin, the index of a sharded one, or a pipeline folder.
Files of ours say which config they fit, and those of Stable Diffusion are recognised; for others
give --config. Of a LoRA run's checkpoint the plain model is written, its adapters merged; with
--adapters these alone, as a LoRA file. --mix takes back some of a training: 0.3 of the base model's
weights and 0.7 of the trained ones, in the UNet and the text encoder.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.ema import WEIGHTS
from ldm.checkpoints.embeddings import LAYOUTS, files_of_words, read_words, write_words
from ldm.checkpoints.export import DTYPES, SUFFIXES
from ldm.checkpoints.lora import adapters_alone, extract_lora, merge_lora, not_in_lora
from ldm.checkpoints.lora_formats import read_lora
from ldm.checkpoints.mixing import mixed
from ldm.checkpoints.parts import with_autoencoder
from ldm.checkpoints.pipeline_folder import check_new_folder
from ldm.commands import exit_status
from ldm.errors import UserError

# Flags that choose or change a model's weights, which a LoRA file does not have.
OF_MODELS = ("keep_ema", "lora", "vae", "mix", "only")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", required=True, type=Path, help="a checkpoint file or a diffusers pipeline folder"
    )
    parser.add_argument(
        "--output", required=True, help="a .safetensors or .ckpt file, or a folder for diffusers"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an --output file (never a folder)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="the model's YAML (default: the checkpoint's own, or its family's)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of the matrices and convolutions (default: as they are)",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="default: the EMA weights, if the checkpoint has them"
    )
    parser.add_argument(
        "--keep_ema",
        action="store_true",
        help="the trained weights, and the EMA weights beside them",
    )
    parser.add_argument(
        "--lora_base",
        type=Path,
        metavar="CKPT",
        help="write the LoRA that leads from this one to --ckpt",
    )
    parser.add_argument("--rank", type=int, default=32, help="of that LoRA (default: %(default)s)")
    parser.add_argument(
        "--adapters", action="store_true", help="of a LoRA run's checkpoint, the LoRA file alone"
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="PATH",
        help="merge this LoRA (a file, or a folder of peft's) into the weights",
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of the merged LoRA (default: %(default)s)"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        metavar="CKPT",
        help="put this one's autoencoder in the place of the model's",
    )
    parser.add_argument(
        "--mix",
        nargs=2,
        metavar=("BASE", "SHARE"),
        help="mix this share, from 0 to 1, of the base model's weights into the trained ones",
    )
    parser.add_argument(
        "--words",
        nargs="?",
        const=LAYOUTS[0],
        choices=LAYOUTS,
        help="of a checkpoint with new words, or an embedding file, these alone: .safetensors for "
        "diffusers, or .pt in this layout (default: %(const)s)",
    )
    parser.add_argument(
        "--only", metavar="PREFIX", nargs="+", default=[], help="tensors whose names start so"
    )
    return parser


def convert(args: argparse.Namespace) -> None:
    """Read, choose, change, write."""
    if args.words:
        convert_words(args)
        return
    check_flags(args)
    checkpoint = Checkpoint.open(args.ckpt, args.config)
    if args.adapters:
        write(adapters_of(checkpoint), args)
        return

    # Choose one copy of the weights, or keep both.
    checkpoint = checkpoint.refuse_other_kinds().merged()
    print(checkpoint)
    if args.keep_ema:
        checkpoint.ema()  # raises if there are no EMA weights
        checkpoint = checkpoint.for_sharing()
    else:
        checkpoint = checkpoint.for_sampling(args.weights)
    if args.only:
        checkpoint = checkpoint.only(args.only)

    # Change them.
    if args.lora_base:
        checkpoint = difference(checkpoint, args)
    if args.mix:
        checkpoint = with_base(checkpoint, args)
    if args.vae:
        checkpoint = with_autoencoder(checkpoint, args.vae)
    if args.lora:
        checkpoint = with_lora(checkpoint, args.lora, args.strength)

    # What the config determines is in the file, for programs that do not build it.
    checkpoint = checkpoint.complete()
    write(checkpoint, args)


def convert_words(args: argparse.Namespace) -> None:
    """Write new words, or an embedding file's, in the layout of another program."""
    for flag in (*OF_MODELS, "weights", "adapters", "lora_base", "dtype"):
        if getattr(args, flag):
            raise UserError(f"--words: does not go with --{flag}")
    words = read_words(args.ckpt)
    for file in files_of_words(words, args.output, args.words):
        check_new_file(file, args.overwrite)
    for file in write_words(words, args.output, args.words):
        print(f"{file}: {', '.join(words)}")


def check_new_file(file: Path, overwrite: bool) -> None:
    """Raise a `UserError` if a file would be replaced that nobody said is to be."""
    # A model may be gigabytes that took a night to train or to fetch.
    if file.exists() and not overwrite:
        raise UserError(
            f"--output {file}: is there already; give another name, or --overwrite to replace it"
        )


def check_flags(args: argparse.Namespace) -> None:  # noqa: C901, PLR0912 - one check a flag
    """Raise a `UserError` for what can be refused before anything is read."""
    is_folder = args.output.suffix not in SUFFIXES
    if args.output.suffix not in ("", *SUFFIXES) and not args.ends_in_slash:
        expected = (
            "a .safetensors or .ckpt file, or a folder for diffusers: end its name with a slash"
        )
        raise UserError(f"--output {args.output}: expected {expected}")
    if is_folder:
        check_new_folder(args.output)
    elif args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give the name of a file")
    check_mix(args)
    sources = {flag: getattr(args, flag) for flag in ("ckpt", "lora_base", "lora", "vae")}
    sources["mix"] = Path(args.mix[0]) if args.mix else None
    for flag, source in sources.items():
        if source and source.exists() and args.output.exists() and args.output.samefile(source):
            raise UserError(
                f"--output {args.output}: is the file that --{flag} reads; give another name"
            )
    check_new_file(args.output, args.overwrite)
    for alone in ("adapters", "lora_base"):
        if not getattr(args, alone):
            continue
        others = (*OF_MODELS, *(["weights", "lora_base"] if alone == "adapters" else []))
        for flag in others:
            if getattr(args, flag):
                raise UserError(f"--{alone}: does not go with --{flag}")
        if is_folder:
            raise UserError(f"--output {args.output}: --{alone} writes a .safetensors file")
    if args.keep_ema and args.weights:
        raise UserError("--keep_ema: keeps both, without --weights")
    if args.keep_ema and args.lora:
        raise UserError(
            "--keep_ema: does not go with --lora, which the averages, that one samples from, would "
            "not have: leave one of the two out"
        )
    if args.keep_ema and is_folder:
        raise UserError(
            f"--keep_ema: a pipeline folder such as {args.output} has one set of weights"
        )
    if args.only and is_folder:
        raise UserError(f"--only: a pipeline folder such as {args.output} has all of the weights")
    if args.rank < 1:
        raise UserError(f"--rank {args.rank}: expected 1 or more")
    if not math.isfinite(args.strength):
        raise UserError(f"--strength {args.strength}: expected a number")
    if args.ckpt.is_dir():
        for flag in ("weights", "keep_ema", "only"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag}: is for checkpoint files; {args.ckpt} is a pipeline folder"
                )


def check_mix(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a share that is none, or for what does not go with --mix."""
    if not args.mix:
        return
    for flag in ("keep_ema", "only"):
        if getattr(args, flag):
            raise UserError(f"--mix: does not go with --{flag}")
    share_of(args)


def share_of(args: argparse.Namespace) -> float:
    """Return the share of the base model's weights that --mix gives."""
    text = args.mix[1]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UserError(f"--mix {args.mix[0]} {text}: expected a share from 0 to 1, such as 0.3")
    return share


def with_base(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """Return the weights with a share of the base model's."""
    share = share_of(args)
    base = Checkpoint.open(args.mix[0], args.config).refuse_other_kinds().merged().for_sampling()
    mix = mixed(checkpoint, base, share)
    print(f"{base.path}: {share:g} of its weights, and {1 - share:g} of the trained ones")
    return mix


def adapters_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the adapters of a LoRA run's checkpoint, as a LoRA file has them."""
    if not checkpoint.has_adapters:
        raise UserError(
            f"{checkpoint.path}: no adapters in it: it is not of a LoRA run (see --lora_base)"
        )
    return checkpoint.as_lora(adapters_alone(checkpoint.state, checkpoint.alpha()))


def difference(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """Return the LoRA that leads from --lora_base to these weights."""
    base = Checkpoint.open(args.lora_base, args.config).merged().for_sampling()
    for whole in (base, checkpoint):
        whole.check_whole()
    report_left_out(not_in_lora(base.state, checkpoint.state))
    return checkpoint.as_lora(extract_lora(base.state, checkpoint.state, args.rank))


def report_left_out(keys: Sequence[str]) -> None:
    """Say what differs between two models and has no place in a LoRA file."""
    if keys:
        print(
            f"{len(keys)} tensors differ that a LoRA cannot hold (biases, norms, embeddings, the "
            "autoencoder):"
        )
        print(f"  {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")


def with_lora(checkpoint: Checkpoint, path: Path, strength: float) -> Checkpoint:
    """Return the weights with a LoRA file's differences added."""
    state = {key: value.clone() for key, value in checkpoint.check_whole().state.items()}
    layers = merge_lora(state, read_lora(path), strength, path)
    print(f"{path}: {layers} layers merged")
    return checkpoint.with_state(state)


def write(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Write the file or the folder, in the precision that was asked for."""
    checkpoint.save(args.output, DTYPES.get(args.dtype))
    if args.output.is_dir():
        print(args.output)
        return
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {len(checkpoint.state)} tensors, {size:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    # A folder may have a dot in its name. A slash says so, of which a path keeps none.
    args.ends_in_slash = args.output.endswith(("/", os.sep))
    args.output = Path(args.output)
    return exit_status(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
