"""Measure this project on this machine. Each measurement runs in a process of its own, so that peaks are its own.

    python scripts/benchmark.py load --config configs/stable-diffusion/v1-inference.yaml --for sample --dtype fp16
    python scripts/benchmark.py load --ckpt sd-v1-4-full-ema.ckpt --for train

Prints a line, and writes all of it as JSON with `--json FILE`. Without `--ckpt` a file of random weights is made and
removed again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.callbacks.timing import resident_bytes
from ldm.checkpoint import tensor_bytes, write_atomically
from ldm.commands import exit_status
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.export import DTYPES, SUFFIXES, in_dtype, shared_config, target_of, write_weights
from ldm.families import CONFIGS
from ldm.inference import load_model
from ldm.training.train import Start, build_model
from ldm.util import instantiate_from_config

GB = 1e9
Measured = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    load = kinds.add_parser("load", help="seconds and peak memory of loading a checkpoint")
    load.add_argument("--config", type=Path, default=CONFIGS / "v1-inference.yaml", help="default: %(default)s")
    load.add_argument("--ckpt", type=Path, help="default: random weights for --config, in --dtype")
    load.add_argument("--format", choices=SUFFIXES, default=".safetensors", help="of those (default: %(default)s)")
    load.add_argument("--for", dest="purpose", choices=["sample", "train"], default="sample")
    load.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the loaded model, to sample from")
    load.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def machine() -> Measured:
    """What the figures hold for."""
    return {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def benchmark_load(args: argparse.Namespace) -> Measured:
    """Load a checkpoint in a fresh process."""
    if args.purpose == "train" and args.dtype != "fp32":
        raise UserError("--dtype: weights are trained in fp32")
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark") as folder:
        path = args.ckpt or random_weights(args.config, Path(folder) / f"random{args.format}", args.dtype)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            measured = pool.apply(measure_load, (args.config, path, args.purpose, args.dtype))
        return {**measured, "file": str(path), "file_bytes": path.stat().st_size, "config": str(args.config)}


def random_weights(config: Path, path: Path, dtype: str) -> Path:
    """A checkpoint of a config's model with random weights."""
    torch.manual_seed(0)
    plain = to_plain(load_config([config]))
    model = instantiate_from_config(target_of(shared_config(plain)), "model")
    write_weights(path, in_dtype(model.state_dict(), DTYPES[dtype]), shared_config(plain), {})
    return path


def measure_load(config: Path, path: Path, purpose: str, dtype: str) -> Measured:
    """Seconds and memory beyond what the imported packages take; every weight is read once."""
    plain = to_plain(load_config([config]))
    with torch.device("meta"):
        instantiate_from_config(target_of(plain), "model")  # imports what the model needs
    (before, _), start = resident_bytes(), time.perf_counter()
    if purpose == "train":
        model, _ = build_model(plain, Start(path), resumes=False)
    else:
        model = load_model(path, config, dtype=DTYPES[dtype])
    weights = list(model.state_dict().values())
    for value in weights:
        value.flatten()[:: 4096 // value.element_size()].sum()  # a number of every page
    seconds = time.perf_counter() - start
    peak, size = resident_bytes()[1] - before, tensor_bytes(weights)
    return {"kind": "load", "for": purpose, "dtype": dtype, "seconds": seconds, "peak_bytes": peak, "weights": size}


def report_load(m: Measured) -> str:
    """The line for a person."""
    sizes = f"peak {m['peak_bytes'] / GB:.2f} GB for {m['weights'] / GB:.2f} GB of weights"
    return (
        f"load {m['file']} ({m['file_bytes'] / GB:.2f} GB) to {m['for']} in {m['dtype']}: {m['seconds']:.1f} s, "
        f"{sizes} ({m['peak_bytes'] / m['weights']:.2f} x)"
    )


def benchmark(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    measured = {**benchmark_load(args), "machine": machine()}
    print(report_load(measured))
    if args.json:
        text = json.dumps(measured, indent=1) + "\n"
        write_atomically(args.json, lambda temporary: temporary.write_text(text))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
