"""Seconds and memory that loading a checkpoint takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ldm.callbacks.timing import resident_bytes
from ldm.checkpoints.export import DTYPES, in_dtype, shared_config, target_of, write_weights
from ldm.config import RunConfig, load_config, to_plain
from ldm.files import tensor_bytes
from ldm.sampling.text_to_image import load_model
from ldm.training.initial_weights import Start, build_model
from ldm.util import instantiate_from_config

GB = 1e9


def random_weights(config: Path, path: Path, dtype: str) -> Path:
    """Write a checkpoint of a config's model with random weights, and return its path."""
    torch.manual_seed(0)
    plain = to_plain(load_config([config]))
    model = instantiate_from_config(target_of(shared_config(plain)), "model")
    write_weights(path, in_dtype(model.state_dict(), DTYPES[dtype]), shared_config(plain), {})
    return path


def measure_load(config: Path, path: Path, purpose: str, dtype: str) -> dict[str, Any]:
    """Measure the seconds and the memory of loading, beyond what the imported packages take."""
    plain = to_plain(load_config([config]))
    with torch.device("meta"):
        instantiate_from_config(target_of(plain), "model")  # imports what the model needs
    (before, _), start = resident_bytes(), time.perf_counter()
    if purpose == "train":
        model, _ = build_model(RunConfig(plain), Start(path), resumes=False)
    else:
        model = load_model(path, config, dtype=DTYPES[dtype])
    weights = list(model.state_dict().values())
    for value in weights:
        value.flatten()[:: 4096 // value.element_size()].sum()  # a number of every page
    seconds = time.perf_counter() - start
    peak, size = resident_bytes()[1] - before, tensor_bytes(weights)
    return {
        "kind": "load",
        "for": purpose,
        "dtype": dtype,
        "seconds": seconds,
        "peak_bytes": peak,
        "weights": size,
    }


def report_load(m: dict[str, Any]) -> str:
    """Return a measurement as one line for a person."""
    sizes = f"peak {m['peak_bytes'] / GB:.2f} GB for {m['weights'] / GB:.2f} GB of weights"
    what = f"{m['file']} ({m['file_bytes'] / GB:.2f} GB) to {m['for']} in {m['dtype']}"
    return f"load {what}: {m['seconds']:.1f} s, {sizes} ({m['peak_bytes'] / m['weights']:.2f} x)"
