"""Measure this project on this machine. Each measurement runs in a process of its own, so that
peaks are its own.

    python scripts/benchmark.py load --config configs/stable-diffusion/v1-inference.yaml \\
        --for sample --dtype fp16
    python scripts/benchmark.py load --ckpt sd-v1-4-full-ema.ckpt --for train
    python scripts/benchmark.py train --base configs/tiny/dreambooth.yaml \\
        --against diffusers --against two-forward
    python scripts/benchmark.py train --base configs/stable-diffusion/v1-finetune_unfrozen.yaml \\
        --device cuda --against diffusers --switch "bf16: lightning.trainer.precision=bf16-mixed"
    python scripts/benchmark.py memory --precision bf16-mixed --card 12 --card 24 \\
        --base configs/stable-diffusion/v1-finetune_unfrozen.yaml
    python scripts/benchmark.py sample --config configs/stable-diffusion/v1-inference.yaml \\
        --against diffusers
    python scripts/benchmark.py class_images --count 10 1000 20000 --clock cpu

Prints a line or a table, and writes all of it as JSON with `--json FILE`. Without `--ckpt` the
weights are random: the speed does not depend on them. docs/benchmarks.md says what the columns
mean.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.benchmark import class_images, sample
from ldm.benchmark.isolation import in_own_process
from ldm.benchmark.load import measure_load, random_weights, report_load
from ldm.benchmark.machine import CLOCKS, machine, require_diffusers
from ldm.benchmark.predict import predicted
from ldm.benchmark.report import describe
from ldm.benchmark.rows import Row, measure_rows
from ldm.benchmark.train import Settings
from ldm.benchmark.variants import AGAINST, OURS, training_rows, variants
from ldm.checkpoints.export import DTYPES, SUFFIXES
from ldm.checkpoints.families import CONFIGS
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.sampling.text_to_image import pick_device
from ldm.training.cli import OVERRIDE, Parser

sys.path.append(str(Path(__file__).resolve().parent.parent))  # configs name targets in main.py

Measured = dict[str, Any]
INFERENCE = CONFIGS / "v1-inference.yaml"


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    _add_load(kinds.add_parser("load", help="seconds and peak memory of loading a checkpoint"))
    _add_train(kinds.add_parser("train", help="seconds, memory and operations of a training step"))
    _add_memory(
        kinds.add_parser("memory", help="what a training step will need, from the config alone")
    )
    _add_sample(kinds.add_parser("sample", help="seconds, memory and operations of sampling"))
    _add_class_images(
        kinds.add_parser("class_images", help="seconds and memory of a start with many of them")
    )
    for kind in kinds.choices.values():
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, default=INFERENCE, help="default: %(default)s")
    add("--ckpt", type=Path, help="default: random weights for --config, in --dtype")
    add(
        "--format", choices=SUFFIXES, default=".safetensors", help="of those (default: %(default)s)"
    )
    add("--for", dest="purpose", choices=["sample", "train"], default="sample")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the loaded model, to sample from")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", type=Path, help="our weights at the start (default: random)")
    add("--steps", type=int, default=5, help="that are measured (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before those (default: %(default)s)")
    _add_training(parser)
    _add_comparison(parser, AGAINST)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--card",
        type=float,
        action="append",
        default=[],
        metavar="GB",
        help="of a GPU: what the engine would choose on it (default: this machine)",
    )
    _add_training(parser)
    _add_size(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--base",
        type=Path,
        nargs="+",
        required=True,
        metavar="YAML",
        help="configs; key.path=value changes a key",
    )
    add("--precision", choices=["32-true", "bf16-mixed", "16-mixed"], help="default: the config's")
    add(
        "--batch",
        type=int,
        help="subject images of a step, and as many of the class (default: the config's)",
    )
    add(
        "--switch",
        action="append",
        default=[],
        metavar="'NAME: KEY=VALUE ...'",
        help="a row with those keys changed",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, help="pixels of an image's side (default: the config's)"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, default=INFERENCE, help="default: %(default)s")
    add("--ckpt", type=Path, help="our weights (default: random)")
    add("--steps", type=int, default=20, help="of DDIM, with guidance (default: %(default)s)")
    add("--batch", type=int, default=4, help="pictures drawn at once (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), default="fp32", help="default: %(default)s")
    add("--compile", action="store_true", help="ours with the UNet's pass made by torch.compile")
    _add_comparison(parser, ["diffusers"])


def _add_comparison(parser: argparse.ArgumentParser, against: Sequence[str]) -> None:
    _add_size(parser)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: the GPU, if there is one")
    add(
        "--against",
        action="append",
        default=[],
        choices=against,
        help="measure that, too, and compare with it",
    )
    add(
        "--repeat",
        type=int,
        default=1,
        help="rounds in which each row is measured once (default: %(default)s)",
    )
    _add_clock(parser)


def _add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: this process's time, for a busy machine",
    )


def _add_class_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--count",
        type=int,
        nargs="+",
        default=[10, 1000],
        metavar="N",
        help="images in a folder, a row for each number (default: 10 1000); "
        "1000 of 512 pixels take 60 MB of the disk",
    )
    add("--size", type=int, default=512, help="pixels of a side (default: %(default)s)")
    _add_clock(parser)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags, and keep the `key.path=value` between them as `overrides`."""
    overrides = [word for word in argv if OVERRIDE.match(word)]
    args = build_parser().parse_args([word for word in argv if word not in overrides])
    if overrides and args.kind not in ("train", "memory"):
        raise UserError(f"'{overrides[0]}': only a training takes overrides")
    for name, least in (("steps", 1), ("warmup", 0), ("repeat", 1), ("batch", 1), ("size", 1)):
        if (given := getattr(args, name, None)) is not None and given < least:
            raise UserError(f"--{name} {given}: expected at least {least}")
    ckpt = getattr(args, "ckpt", None)
    if ckpt and not ckpt.is_file():
        raise UserError(f"--ckpt {ckpt}: no such file")
    args.overrides = overrides
    return args


def benchmark_load(args: argparse.Namespace) -> tuple[Measured, str]:
    """Load a checkpoint in a fresh process."""
    if args.purpose == "train" and args.dtype != "fp32":
        raise UserError("--dtype: weights are trained in fp32")
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark") as folder:
        path = args.ckpt or random_weights(
            args.config, Path(folder) / f"random{args.format}", args.dtype
        )
        measured = in_own_process(measure_load, args.config, path, args.purpose, args.dtype)
        facts = {"file": str(path), "file_bytes": path.stat().st_size, "config": str(args.config)}
        measured |= {**facts, "machine": machine()}
    return measured, report_load(measured)


def benchmark_train(args: argparse.Namespace) -> tuple[Measured, str]:
    """Train a few steps of every variant."""
    settings = Settings(
        args.steps, args.warmup, _device(args), torch.get_num_threads(), args.clock, args.ckpt
    )
    rows = training_rows(args.base, _with_flags(args), args.switch, args.against, settings)
    return _measured(args, rows, settings.device)


def benchmark_memory(args: argparse.Namespace) -> tuple[Measured, str]:
    """Estimate what a training step of every variant needs, as the engine would have it."""
    rows = variants(args.base, _with_flags(args), args.switch, [])
    figures, text = predicted(rows, args.card)
    given = {key: value for key, value in vars(args).items() if key != "json"}
    return {"given": given, **figures}, text


def _with_flags(args: argparse.Namespace) -> list[str]:
    """Return the overrides that the flags stand for, before those that are given."""
    made = []
    if args.size:
        data = to_plain(load_config(args.base, args.overrides)).get("data", {}).get("params") or {}
        made += [
            f"data.params.{name}.params.size={args.size}"
            for name in ("train", "reg")
            if data.get(name)
        ]
    if args.batch:
        made.append(f"data.params.batch_size={args.batch}")
    if args.precision:
        made.append(f"lightning.trainer.precision={args.precision}")
    return made + args.overrides


def benchmark_sample(args: argparse.Namespace) -> tuple[Measured, str]:
    """Draw a batch of pictures with every program."""
    device = _device(args)
    if args.dtype == "fp16" and device == "cpu":
        raise UserError("--dtype fp16: is for GPUs; a CPU samples in fp32 or bf16")
    if args.against:
        require_diffusers()
    threads = torch.get_num_threads()
    settings = sample.Settings(
        *(args.steps, args.batch, args.size, args.dtype, device, threads, args.clock),
        args.compile,
    )
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark") as folder:
        path = args.ckpt or random_weights(
            args.config, Path(folder) / "random.safetensors", args.dtype
        )
        rows = [
            Row(
                kind,
                sample.measure_sampling,
                (kind, args.config, path, settings),
                args.batch,
                args.dtype,
            )
            for kind in (*args.against, OURS)
        ]
        return _measured(args, rows, device)


def benchmark_class_images(args: argparse.Namespace) -> tuple[Measured, str]:
    """Start with folders of class images, each in a fresh process."""
    given = {key: value for key, value in vars(args).items() if key != "json"}
    found = class_images.measure_class_images(args.count, args.size, args.clock)
    measured = {"given": given, "kind": args.kind, **found}
    return measured, class_images.report_class_images(measured)


def _device(args: argparse.Namespace) -> str:
    device = pick_device(args.device).type
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: nothing here measures on {device}; give --device cpu")
    if device == "cuda" and args.clock == "cpu":
        raise UserError("--clock cpu: what a GPU computes is not in this process's time")
    return device


def _measured(args: argparse.Namespace, rows: Sequence[Row], device: str) -> tuple[Measured, str]:
    """Return everything that the JSON holds, and the table."""
    given = {key: value for key, value in vars(args).items() if key != "json"}
    compared_to = args.against[0] if args.against else OURS
    measured = {
        "given": given,
        "kind": args.kind,
        **measure_rows(rows, device, compared_to, args.repeat, args.clock),
    }
    return measured, describe(measured)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], tuple[Measured, str]]] = {
    "load": benchmark_load,
    "train": benchmark_train,
    "memory": benchmark_memory,
    "sample": benchmark_sample,
    "class_images": benchmark_class_images,
}


def benchmark(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    measured, text = BENCHMARKS[args.kind](args)
    print(text)
    if args.json:
        content = json.dumps(measured, indent=1, default=str) + "\n"
        write_atomically(args.json, lambda temporary: temporary.write_text(content))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: benchmark(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
