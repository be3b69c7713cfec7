"""The flags that say where the tasks of a study run."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from ldm.errors import UserError
from ldm.studies.engines import Engine, make_engine


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the tasks run."""
    add = parser.add_argument
    add("--engine", default="local", help="local (default), ray, submitit")
    add("--workers", type=int, default=1, help="tasks at once (default: 1)")
    add(
        "--engine_options",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="ray: address, gpus; submitit: cluster and the executor's parameters",
    )


def engine_of(args: argparse.Namespace, folder: Path, in_rounds: bool = False) -> Engine:
    """Return the engine that the flags name."""
    import torch

    options = {}
    for text in args.engine_options:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--engine_options {text}: expected KEY=VALUE")
        options[key] = yaml.safe_load(value)
    devices = list(range(torch.cuda.device_count()))
    return make_engine(args.engine, args.workers, folder, options, devices, in_rounds)
