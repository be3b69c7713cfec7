"""Training steps, measured: this project's own `train`, and the references of
`ldm.benchmark.reference`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.benchmark.clock import ClockCallback, StepClock
from ldm.benchmark.reference import REFERENCES, accumulated
from ldm.callbacks.setup import callbacks_of
from ldm.callbacks.timing import resident_bytes
from ldm.checkpoints.export import target_of
from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.host import CUDA, is_out_of_memory
from ldm.training.initial_weights import Start
from ldm.training.run import Run
from ldm.training.train import train
from ldm.util import instantiate_from_config

OURS = "ours"
CLOCK = "benchmark_clock"  # its name under lightning.callbacks


@dataclass(frozen=True)
class Settings:
    """How a training is measured."""

    steps: int = 5
    warmup: int = 1
    device: str = "cpu"
    threads: int = 1
    clock: str = "wall"
    weights: Path | None = None

    def new_clock(self) -> StepClock:
        """Return a clock for one training."""
        return StepClock(self.warmup, self.steps, self.clock)


def measure_training(kind: str, config: Mapping[str, object], settings: Settings) -> dict[str, Any]:
    """Measure what some steps of a config take, in this process.

    Args:
        kind: `ours`, or one of `REFERENCES`.
        config: plain containers, checked.

    Returns:
        `seconds` of each step, `peak_bytes` (on a CPU beyond what the imported packages take) and
        `flops` of a step; or `failed`, if the memory did not suffice.
    """
    torch.set_num_threads(settings.threads)
    with torch.device("meta"):
        instantiate_from_config(target_of(config), "model")  # imports what the model needs
    before = resident_bytes()[0] if settings.device == "cpu" else 0
    try:
        clock = (
            _clocked_training(config, settings)
            if kind == OURS
            else _clocked_reference(kind, config, settings)
        )
    except (UserError, RuntimeError, MemoryError) as error:
        if not any(
            is_out_of_memory(e) for e in (error, error.__cause__) if e is not None
        ):  # `train` explains its own
            raise
        return {"failed": "out of memory"}
    return {"seconds": clock.seconds, "peak_bytes": clock.peak_bytes - before, "flops": clock.flops}


def _clocked_training(config: Mapping[str, object], settings: Settings) -> StepClock:
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        config = training_config(config, settings, Path(folder))
        trained = train(
            RunConfig(config), Run(Path(folder) / "run", "benchmark"), Start(settings.weights)
        )
    callbacks = callbacks_of(trained.trainer)
    return next(callback.clock for callback in callbacks if isinstance(callback, ClockCallback))


def _clocked_reference(kind: str, config: Mapping[str, object], settings: Settings) -> StepClock:
    torch.backends.cudnn.benchmark = bool(
        RunConfig(config).get("lightning.trainer.benchmark")
    )  # the same as Lightning would set
    torch.manual_seed(0)
    clock, device = settings.new_clock(), torch.device(settings.device)
    reference = REFERENCES[kind](config, device)
    clock.begin(device)
    for _ in range(clock.total):
        clock.before()
        reference.step()
        clock.after()
    return clock


def training_config(given: Mapping[str, Any], settings: Settings, folder: Path) -> dict[str, Any]:
    """Return the config with photos of noise, with nothing logged or kept, and with a clock."""
    config = copy.deepcopy(dict(given))
    total = settings.new_clock().total
    _use_noise(config["data"]["params"], folder, total * accumulated(config))
    asked = RunConfig(config)
    callbacks = asked.section("lightning.callbacks")
    pictures = [
        name
        for name, known in callbacks.items()
        if "ImageLogger" in str((known or {}).get("target"))
    ]
    lightning = config["lightning"] = dict(asked.section("lightning"))
    clock = {
        "target": f"{ClockCallback.__module__}.{ClockCallback.__name__}",
        "params": {"warmup": settings.warmup, "steps": settings.steps, "clock": settings.clock},
    }
    lightning["callbacks"] = {**callbacks, **dict.fromkeys(pictures), CLOCK: clock}
    lightning["trainer"] = {
        **asked.trainer,
        "accelerator": "gpu" if settings.device == CUDA else "cpu",
        "devices": 1,
        "max_steps": total,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    return config


def _use_noise(data: dict[str, Any], folder: Path, batches: int) -> None:
    """Make a batch of noise for the subject and one for its class. Leave validation out.

    No more than that: in a run of hundreds of steps the pictures are few beside the steps, and what
    a run chooses by itself goes by that.
    """
    for name in ("validation", "test", "num_class_images"):
        data.pop(name, None)
    if data.get("latent_cache"):
        data["latent_cache"] = True  # and not in the user's folder
    for seed, name in enumerate(("train", "reg")):
        if data.get(name):
            params = data[name]["params"] = dict(data[name].get("params") or {})
            params["data_root"] = str(folder / name)
            params["repeats"] = max(params.get("repeats", 1), batches)  # no epoch ends in between
            params.pop("masks", None)
            write_photos(folder / name, data["batch_size"], params.get("size") or 512, seed)


def write_photos(folder: Path, count: int, size: int, seed: int) -> None:
    """Write square pictures of noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
