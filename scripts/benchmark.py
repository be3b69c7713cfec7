"""Measure this project on this machine. Each measurement runs in a process of its own, so that peaks are its own.

    python scripts/benchmark.py load --config configs/stable-diffusion/v1-inference.yaml --for sample --dtype fp16
    python scripts/benchmark.py load --ckpt sd-v1-4-full-ema.ckpt --for train
    python scripts/benchmark.py train --base configs/tiny/dreambooth.yaml --against diffusers --against two-forward
    python scripts/benchmark.py train --base configs/stable-diffusion/v1-finetune_unfrozen.yaml --device cuda \\
        --precision bf16-mixed --against diffusers --switch "no recomputation: \\
        model.params.unet_config.params.use_checkpoint=false"

Prints a line or a table, and writes all of it as JSON with `--json FILE`. Without `--ckpt` the weights are random: the
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.benchmark import report
from ldm.benchmark.isolation import apart
from ldm.benchmark.load import measure_load, random_weights, report_load
from ldm.benchmark.machine import machine, matmul_rate
from ldm.benchmark.reference import accumulated, autocast_dtype, has_prior
from ldm.benchmark.train import Settings, measure_training
from ldm.benchmark.variants import AGAINST, OURS, Variant, variants
from ldm.checkpoint import write_atomically
from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.export import DTYPES, SUFFIXES
from ldm.families import CONFIGS
from ldm.inference import pick_device
from ldm.training.cli import OVERRIDE, Parser

Measured = dict[str, Any]
log = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    load = kinds.add_parser("load", help="seconds and peak memory of loading a checkpoint")
    load.add_argument("--config", type=Path, default=CONFIGS / "v1-inference.yaml", help="default: %(default)s")
    load.add_argument("--ckpt", type=Path, help="default: random weights for --config, in --dtype")
    load.add_argument("--format", choices=SUFFIXES, default=".safetensors", help="of those (default: %(default)s)")
    load.add_argument("--for", dest="purpose", choices=["sample", "train"], default="sample")
    load.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the loaded model, to sample from")
    _add_train(kinds.add_parser("train", help="seconds, memory and operations of a training step"))
    for kind in kinds.choices.values():
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", type=Path, nargs="+", required=True, metavar="YAML", help="configs; key.path=value changes a key")
    add("--ckpt", type=Path, help="our weights at the start (default: random)")
    add("--steps", type=int, default=5, help="that are measured (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before those (default: %(default)s)")
    add("--precision", choices=["32-true", "bf16-mixed", "16-mixed"], help="default: the config's")
    add("--batch", type=int, help="subject images of a step, and as many of the class (default: the config's)")
    _add_comparison(parser, AGAINST)
    add("--switch", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="a row with those keys changed")


def _add_comparison(parser: argparse.ArgumentParser, against: Sequence[str]) -> None:
    add = parser.add_argument
    add("--size", type=int, help="pixels of an image's side (default: the config's)")
    add("--device", choices=["cpu", "cuda"], help="default: the GPU, if there is one")
    add("--against", action="append", default=[], choices=against, help="measure that, too, and compare with it")
    add("--repeat", type=int, default=1, help="rounds in which each row is measured once (default: %(default)s)")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, and the `key.path=value` between them as `overrides`."""
    overrides = [word for word in argv if OVERRIDE.match(word)]
    args = build_parser().parse_args([word for word in argv if word not in overrides])
    if overrides and args.kind != "train":
        raise UserError(f"'{overrides[0]}': only a training takes overrides")
    for name, least in (("steps", 1), ("warmup", 0), ("repeat", 1), ("batch", 1), ("size", 1)):
        if (given := getattr(args, name, None)) is not None and given < least:
            raise UserError(f"--{name} {given}: expected at least {least}")
    args.overrides = overrides
    return args


def benchmark_load(args: argparse.Namespace) -> tuple[Measured, str]:
    """Load a checkpoint in a fresh process."""
    if args.purpose == "train" and args.dtype != "fp32":
        raise UserError("--dtype: weights are trained in fp32")
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark") as folder:
        path = args.ckpt or random_weights(args.config, Path(folder) / f"random{args.format}", args.dtype)
        measured = apart(measure_load, args.config, path, args.purpose, args.dtype)
        facts = {"file": str(path), "file_bytes": path.stat().st_size, "config": str(args.config)}
        measured |= {**facts, "machine": machine()}
    return measured, report_load(measured)


def benchmark_train(args: argparse.Namespace) -> tuple[Measured, str]:
    """Train a few steps of every variant."""
    if args.ckpt and not args.ckpt.is_file():
        raise UserError(f"--ckpt {args.ckpt}: no such file")
    rows = variants(args.base, _with_flags(args), args.switch, args.against)
    dtypes = [_dtype(row) for row in rows]
    device = pick_device(args.device).type
    settings = Settings(args.steps, args.warmup, device, torch.get_num_threads(), args.ckpt)
    jobs = [(row.name, measure_training, (row.kind, row.config, settings)) for row in rows]
    images = [_images_per_step(row.config) for row in rows]
    measured = measure_rows(jobs, images, dtypes, device, args)
    return {"kind": "train", "base": [str(path) for path in args.base], **measured}, _told(measured)


def _with_flags(args: argparse.Namespace) -> list[str]:
    """The overrides that the flags stand for, before those that are given."""
    made = []
    if args.size:
        made += [f"data.params.{name}.params.size={args.size}" for name in ("train", "reg")]
    if args.batch:
        made.append(f"data.params.batch_size={args.batch}")
    if args.precision:
        made.append(f"lightning.trainer.precision={args.precision}")
    return made + args.overrides


def _dtype(row: Variant) -> str:
    """The name in `DTYPES` of what a row computes in."""
    dtype = None if row.kind == "two-forward" else autocast_dtype(row.config)
    return next(name for name, known in DTYPES.items() if known == (dtype or torch.float32))


def _images_per_step(config: Measured) -> int:
    return config["data"]["params"]["batch_size"] * (1 + has_prior(config)) * accumulated(config)


def measure_rows(
    jobs: Sequence[tuple[str, Any, tuple[Any, ...]]],
    images: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    args: argparse.Namespace,
) -> Measured:
    """Measure all rows, in `--repeat` rounds; ratios are to the first of `--against`, or to ours."""
    rates = {d: apart(matmul_rate, device, d, torch.get_num_threads()) for d in dict.fromkeys(dtypes)}
    rounds: dict[str, list[Measured]] = {name: [] for name, _, _ in jobs}
    for number in range(args.repeat):
        for name, function, arguments in jobs:
            log.info("measuring %s%s", name, f" ({number + 1} of {args.repeat})" if args.repeat > 1 else "")
            rounds[name].append(apart(function, *arguments))
    rows = []
    for (name, found), count, dtype in zip(rounds.items(), images, dtypes):
        rows.append({"name": name, "dtype": dtype, **report.figures(report.merged(found), count, rates[dtype])})
    compared_to = args.against[0] if args.against else OURS
    report.compare(rows, compared_to)
    facts = {**machine(device), "matmul_flops_per_second": rates}
    given = {"overrides": getattr(args, "overrides", []), "switches": getattr(args, "switch", [])}
    return {**given, "steps": args.steps, "compared_to": compared_to, "variants": rows, "machine": facts}


def _told(measured: Measured) -> str:
    """The machine and the table, for a person."""
    facts = measured["machine"]
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in facts["matmul_flops_per_second"].items())
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    head = f"{where}; torch {facts['torch']}; TFLOP/s of a matrix product: {rates}"
    return f"{head}\n\n{report.table(measured['variants'], measured['compared_to'])}"


BENCHMARKS = {"load": benchmark_load, "train": benchmark_train}


def benchmark(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    measured, text = BENCHMARKS[args.kind](args)
    print(text)
    if args.json:
        content = json.dumps(measured, indent=1) + "\n"
        write_atomically(args.json, lambda temporary: temporary.write_text(content))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_status(lambda: benchmark(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
