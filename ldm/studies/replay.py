"""Do a run again from the recipe that it left, and compare the two."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.export import sha256
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.config import RunConfig, save_yaml
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.encoders import HASH_DIGITS
from ldm.files import write_atomically
from ldm.host import environment
from ldm.reports.runs import read_run
from ldm.studies.training import LAST, trained
from ldm.training.run import Run
from ldm.training.saved import first_config

log = logging.getLogger(__name__)

NAME = "replay"


@dataclass(frozen=True)
class Comparison:
    """What came of a replay.

    Args:
        first, again: digests of what was there and of what was made.
        difference: the largest one, in words; "" where there is none.
    """

    first: str
    again: str
    difference: str

    @property
    def same(self) -> bool:
        return self.first == self.again

    def __str__(self) -> str:
        verdict = "the same" if self.same else f"not the same: {self.difference}"
        return f"{self.first} before, {self.again} now: {verdict}"


def replay_run(folder: Path, outdir: Path, weights: Path | None = None) -> Comparison:
    """Train again as a run's config says, and compare its last checkpoint's weights.

    Args:
        folder: of the run.
        outdir: where the new run's folder goes.
        weights: what the run started from, where it did.

    Raises:
        UserError: the run has no config or checkpoint, or started from other weights.
    """
    checkpoint = folder / LAST
    if not checkpoint.is_file():
        raise UserError(f"{folder}: no {LAST} in it: it is no run's folder")
    run = Run(folder, "")
    if not run.saved_configs():
        raise UserError(f"{folder}: no configs in it, which say how it was trained")
    stamps = {path.name.rpartition("-")[0] for path in run.saved_configs()}
    if len(stamps) > 1:
        log.warning("%s: was gone on with; replayed is what its first start asked for", folder)
    config = first_config(run)
    arguments = _start(config, folder, weights)
    for line in changes_since(read_run(folder).summary.get("environment", {})):
        log.info("%s", line)
    # The whole recipe in one file, as it was at the run's first start.
    recipe = outdir / f"{NAME}.yaml"
    content = {key: value for key, value in config.content.items() if key != "run"}
    asked = {key: config.get(f"run.{key}") for key in ("seed", "scale_lr", "export")}
    content["run"] = {key: value for key, value in asked.items() if value is not None}
    write_atomically(recipe, lambda path: save_yaml(content, path))
    again = trained(
        NAME, outdir.resolve(), ["--base", str(recipe), *arguments], outdir / f"{NAME}.run"
    )
    return compare_weights(checkpoint, again / LAST)


def _start(config: RunConfig, folder: Path, weights: Path | None) -> list[str]:
    """Return the flags for what a run started from, after a look whether that is it."""
    base: Mapping[str, Any] = config.get("run.base_model") or {}
    if not base:
        if weights is not None:
            raise UserError(f"--ckpt {weights}: {folder} started from no weights; leave it out")
        return []
    if weights is None:
        raise UserError(f"{folder}: it started from {base.get('file')}; give that with --ckpt FILE")
    recorded = base.get("sha256")
    if recorded and (not weights.is_file() or sha256(weights) != recorded):
        raise UserError(
            f"--ckpt {weights}: not the weights that {folder} started from, which are "
            f"{base.get('file')} with the SHA-256 {recorded}"
        )
    return ["--actual_resume", str(weights)]


def changes_since(then: Mapping[str, str]) -> list[str]:
    """Say what of the machine and the packages is not as it was."""
    if not then:
        return ["it is not recorded on what machine this was made"]
    now = environment()
    names = dict.fromkeys([*then, *now])
    lines = [
        f"{name}: {then.get(name, 'none')} then, {now.get(name, 'none')} now"
        for name in names
        if then.get(name) != now.get(name)
    ]
    return lines or ["the machine and the packages are the same as then"]


def compare_weights(first: Path, again: Path) -> Comparison:
    """Compare two checkpoints' weights, whatever else the files hold."""
    states = [state_dict_of(read_checkpoint(path), path) for path in (first, again)]
    digests = [_digest(state) for state in states]
    return Comparison(digests[0], digests[1], _difference(*states))


def _digest(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(bits.numpy().tobytes())
    return found.hexdigest()[:HASH_DIGITS]


def _difference(first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> str:
    """Name the tensor that differs most."""
    if first.keys() != again.keys():
        only = sorted(first.keys() ^ again.keys())
        return f"{len(only)} tensors are in one alone, such as {only[0]}"
    largest, where = 0.0, ""
    for name, value in first.items():
        other = again[name]
        if value.shape != other.shape:
            return f"{name} has another shape"
        if value.numel():
            gap = float((value.double() - other.double()).abs().max())
            if gap > largest:
                largest, where = gap, name
    return f"{where} differs by up to {largest:.3g}" if where else ""


def compare_pictures(first: Path, again: Path) -> Comparison:
    """Compare two pictures' pixels, whatever else the files hold."""
    images = [load_image(path) for path in (first, again)]
    digests = [_pixels(image) for image in images]
    if images[0].size != images[1].size:
        return Comparison(digests[0], digests[1], f"{images[0].size} and {images[1].size} pixels")
    arrays = [np.asarray(image, np.int16) for image in images]
    gaps = np.abs(arrays[0] - arrays[1])
    share = float((gaps > 0).mean())
    text = f"{share:.1%} of the values differ, by up to {int(gaps.max())} of 255"
    return Comparison(digests[0], digests[1], text)


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:HASH_DIGITS]
