"""Seconds and memory that a training's start takes for a folder of many class images."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ldm.benchmark.isolation import in_own_process
from ldm.benchmark.machine import CLOCKS, machine
from ldm.benchmark.report import in_columns
from ldm.callbacks.timing import resident_bytes
from ldm.checkpoints.families import CONFIGS
from ldm.config import load_config, to_plain
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.streams import Stream
from ldm.errors import UserError
from ldm.files import size_text

log = logging.getLogger(__name__)

CONFIG = CONFIGS / "v1-finetune_unfrozen.yaml"  # whose data.params.reg reads the images
EXAMPLES = 20
SMALLEST = 16  # pixels of a side, so that a patch of noise tells images apart
BASES = 4  # pictures that the images are made of
PATCH = 32  # pixels of the side of what each image has for itself
COARSE = 24  # pixels between the colours that a picture fades between
GRAIN = 9.0  # of 255: an image of 512 pixels then has about 60 kB
SPARE = 1.1  # of the disk, because images differ in size
STARTS = ("first", "next")
MB = 1e6
COLUMNS = (
    "class images",
    "MB",
    "opened, s",
    "first check, s",
    "next check, s",
    f"{EXAMPLES} examples, s",
    "and at the next start",
    "peak MB",
    "and at the next start",
)


def base_pictures(size: int, seed: int = 0) -> list[UInt8[np.ndarray, "size size 3"]]:
    """Return pictures of colours that fade into each other, with grain, of `size` pixels a side."""
    random, found = np.random.default_rng(seed), []
    for _ in range(BASES):
        coarse = random.integers(0, 256, (size // COARSE + 2,) * 2 + (3,), dtype=np.uint8)
        faded = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(faded, dtype=np.float32) + random.normal(0, GRAIN, (size, size, 1))
        found.append(pixels.clip(0, 255).astype(np.uint8))
    return found


def jpeg(bases: Sequence[UInt8[np.ndarray, "size size 3"]], number: int) -> bytes:
    """Return image `number` as a JPEG: one of the pictures with a patch of noise of its own."""
    pixels = bases[number % len(bases)].copy()
    corner = pixels[:PATCH, :PATCH]
    corner[:] = np.random.default_rng([1, number]).integers(0, 256, corner.shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write_class_images(folder: Path, count: int, size: int) -> int:
    """Write JPEGs of `size` pixels a side, of which no two are the same; return their bytes."""
    folder.mkdir(parents=True)
    bases, total = base_pictures(size), 0
    for number in range(count):
        total += (folder / f"{number:06}.jpg").write_bytes(jpeg(bases, number))
    return total


def check_disk(count: int, size: int, folder: Path) -> None:
    """Say how much of the disk the images take; raise a `UserError` if `folder` has less."""
    of_one = [len(jpeg(base_pictures(size), number)) for number in range(BASES)]
    needed, free = SPARE * count * sum(of_one) / BASES, shutil.disk_usage(folder).free
    said = f"{count} class images need about {size_text(needed)} of the disk"
    if needed > free:
        raise UserError(
            f"--count {count}: {said}, and {folder.resolve()} has {size_text(free)}: "
            "give a smaller --count or --size, or work in another folder"
        )
    log.info("%s, in %s, until they are measured", said, folder.resolve())


def measure_start(
    folder: Path, notes: Path, size: int, threads: int, clock: str
) -> dict[str, float]:
    """Measure what a training does with its class images before its first step, in this process.

    Args:
        folder: of the images.
        notes: the folder for what a start notes of the images that it has decoded, in the place of
            the user's cache. Without any this is a first start.
        size: pixels of an image's side.
        clock: of `CLOCKS`.

    Returns:
        the seconds to open the folder, of the check, and of `EXAMPLES` examples after that; and
        `peak_bytes`, resident, beyond what the imported packages take.

    Raises:
        UserError: an image does not decode.
    """
    os.environ["XDG_CACHE_HOME"] = str(notes)
    torch.set_num_threads(threads)
    reg = to_plain(load_config([CONFIG]))["data"]["params"]["reg"]
    reg["params"] |= {"data_root": str(folder), "size": size}
    now, (before, _) = CLOCKS[clock], resident_bytes()
    times = [now()]
    data = DataModuleFromConfig(batch_size=1, reg=reg)
    times.append(now())
    data.setup("fit")
    times.append(now())
    stream = Stream(data.datasets["reg"], data.seed, "prior")
    for position in range(EXAMPLES):
        stream[position]
    times.append(now())
    opened, checked, examples = (after - earlier for earlier, after in pairwise(times))
    return {
        "open_seconds": opened,
        "check_seconds": checked,
        "examples_seconds": examples,
        "peak_bytes": resident_bytes()[1] - before,
    }


def measure_class_images(counts: Sequence[int], size: int, clock: str = "wall") -> dict[str, Any]:
    """Measure two starts for each number of class images, each start in a process of its own.

    The first start knows none of the images, the next one finds what the first has noted. The
    images and the notes lie in a folder in the working folder, and go with it. The images have just
    been written, so the system most often reads them from memory.

    Args:
        counts: how many images; each number is measured by itself.
        size: pixels of an image's side.
        clock: of `CLOCKS`.

    Returns:
        `rows`, one for each count, with its `bytes` of files and what `measure_start` returns of
        the `first` and the `next` start; and the facts of the `machine`.

    Raises:
        UserError: a number out of its range, or a disk that is too small.
    """
    for count in counts:
        if count < 1:
            raise UserError(f"--count {count}: expected at least 1")
    if size < SMALLEST:
        raise UserError(f"--size {size}: expected at least {SMALLEST}, so that no two are the same")
    check_disk(max(counts), size, Path())
    rows, threads = [], torch.get_num_threads()
    for count in counts:
        with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark") as made:
            log.info("writing %d class images", count)
            folder = Path(made) / "class_images"
            row: dict[str, Any] = {
                "count": count,
                "bytes": write_class_images(folder, count, size),
            }
            notes = Path(made).resolve() / "cache"
            for start in STARTS:
                log.info("measuring the %s start with them", start)
                row[start] = in_own_process(measure_start, folder, notes, size, threads, clock)
            rows.append(row)
    return {"rows": rows, "machine": machine()}


def report_class_images(measured: dict[str, Any]) -> str:
    """Describe the machine and show the table, for a person."""
    facts = measured["machine"]
    head = f"{facts['cpu']}, {facts['threads']} threads; Pillow {Image.__version__}"
    return f"{head}\n\n{in_columns([list(COLUMNS), *map(_cells, measured['rows'])])}"


def _cells(row: dict[str, Any]) -> list[str]:
    first, later = (row[start] for start in STARTS)
    seconds = [
        first["open_seconds"],
        first["check_seconds"],
        later["check_seconds"],
        first["examples_seconds"],
        later["examples_seconds"],
    ]
    return [
        f"{row['count']:,}",
        f"{row['bytes'] / MB:.4g}",
        *(f"{value:.3g}" for value in seconds),
        *(f"{start['peak_bytes'] / MB:.0f}" for start in (first, later)),
    ]
