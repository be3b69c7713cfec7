"""Do a run again from the recipe that it left, and compare the two."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.embeddings import read_words
from ldm.checkpoints.export import sha256, without_places
from ldm.checkpoints.layouts import NEW_WORDS
from ldm.checkpoints.lora import adapters_alone
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
from ldm.training.saved import first_config, with_files_found

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


@dataclass(frozen=True)
class Recipe:
    """What a training was asked for, as its folder or one of its files says it.

    Args:
        where: it was found, for messages.
        config: the whole one.
        base: `file` and `sha256` of the weights that it started from; empty for none.
        steps: after which the weights in question were; None for the last ones.
        environment: the machine and the packages; empty where nothing says it.
    """

    where: Path
    config: RunConfig
    base: Mapping[str, Any]
    steps: int | None
    environment: Mapping[str, str]


def replay_run(
    folder: Path, outdir: Path, weights: Path | None = None, more: Sequence[str] = ()
) -> Comparison:
    """Train again as a run's config says, and compare its last checkpoint's weights.

    Args:
        folder: of the run.
        outdir: where the new run's folder goes.
        weights: what the run started from, where it did.
        more: words of the training command that say where the photos are now, if they have moved.

    Raises:
        UserError: the run has no config or checkpoint, or started from other weights.
    """
    checkpoint = folder / LAST
    if not checkpoint.is_file():
        raise UserError(f"{folder}: no {LAST} in it: it is no run's folder")
    return replay_weights(checkpoint, recipe_in_folder(folder), outdir, weights, more)


def replay_file(
    file: Path, outdir: Path, weights: Path | None = None, more: Sequence[str] = ()
) -> Comparison:
    """Train again as a weights file says, or the run's folder that it lies in, and compare.

    The file is a run's checkpoint, an export of it in any precision, the adapters or new words that
    it wrote, or what `scripts/convert.py` made of its checkpoint.

    Args:
        more: words of the training command that say where the photos are. An export keeps no
            folders to itself: it needs them.

    Raises:
        UserError: the file and its place say nothing of a training; or see `replay_run`.
    """
    recipe = recipe_in_file(file)
    in_run = file.resolve().parent.name == "checkpoints"
    if recipe is None and in_run:
        recipe = recipe_in_folder(file.resolve().parent.parent)
    if recipe is None:
        raise UserError(
            f"{file}: holds no recipe of a training, as what `main.py --export` and its LoRA write "
            "do: give the run's folder, or a .ckpt of it"
        )
    return replay_weights(file, recipe, outdir, weights, more)


def recipe_in_folder(folder: Path) -> Recipe:
    """Return what the first start of a run was asked for."""
    run = Run(folder, "")
    if not run.saved_configs():
        raise UserError(f"{folder}: no configs in it, which say how it was trained")
    stamps = {path.name.rpartition("-")[0] for path in run.saved_configs()}
    if len(stamps) > 1:
        log.warning("%s: was gone on with; replayed is what its first start asked for", folder)
    config = first_config(run)
    base: Mapping[str, Any] = config.get("run.base_model") or {}
    then = read_run(folder).summary.get("environment", {})
    return Recipe(folder, config, base, None, then)


def recipe_in_file(file: Path) -> Recipe | None:
    """Return what the training of a weights file was asked for; None where the file says nothing.

    Raises:
        UserError: the weights were mixed with others since.
    """
    content = read_checkpoint(file)
    own, facts = content.get("config"), content.get("training")
    if isinstance(own, Mapping) and "data" in own:  # a run's checkpoint
        config = with_files_found(RunConfig(own), file.resolve().parent.parent)
        base: Mapping[str, Any] = config.get("run.base_model") or {}
        then = content.get("environment", {})
        return Recipe(file, config, base, content.get("global_step"), then)
    if not isinstance(facts, Mapping) or "recipe" not in facts:
        return None
    if "mixed" in facts:
        raise UserError(f"{file}: was mixed with other weights after its training")
    base, then = facts.get("base_model", {}), facts.get("environment", {})
    return Recipe(file, RunConfig(facts["recipe"]), base, facts.get("steps"), then)


def replay_weights(
    file: Path, recipe: Recipe, outdir: Path, weights: Path | None, more: Sequence[str]
) -> Comparison:
    """Train again by a recipe, and compare a file with what came of it."""
    arguments = [*_start(recipe, weights), *more]
    config = recipe.config
    _check_images(recipe, more)
    for line in changes_since(recipe.environment):
        log.info("%s", line)
    # The whole recipe in one file. What the run was given beside it stands under `run`.
    path = outdir / f"{NAME}.yaml"
    content = {key: value for key, value in config.content.items() if key != "run"}
    if more:
        content = without_places(content)
    asked = {key: config.get(f"run.{key}") for key in ("seed", "scale_lr", "export")}
    content["run"] = {key: value for key, value in asked.items() if value is not None}
    last = config.get("lightning.trainer.max_steps")
    steps = recipe.steps
    if steps is not None and isinstance(last, int) and 0 < steps < last:
        # The rates may depend on the last step, so that all are made.
        arguments.append(f"lightning.modelcheckpoint.params.every_n_train_steps={steps}")
    _settle(outdir, json.dumps([content, arguments], default=str))
    write_atomically(path, lambda temporary: save_yaml(content, temporary))
    words = ["--base", str(path), *arguments]
    run = trained(NAME, outdir.resolve(), words, outdir / f"{NAME}.run")
    made = _checkpoint_of(run, steps)
    return compare_states(_tensors(file), _as_in(file, made))


def _settle(outdir: Path, asked: str) -> None:
    """Note what is asked for in a folder; raise a `UserError` where it has made something else,
    which would be taken for what came of this.
    """
    path = outdir / f"{NAME}.json"
    if path.is_file() and path.read_text(encoding="utf-8") != asked:
        raise UserError(f"--outdir {outdir}: holds another replay; choose another folder")
    write_atomically(path, lambda temporary: temporary.write_text(asked, encoding="utf-8"))


def _start(recipe: Recipe, weights: Path | None) -> list[str]:
    """Return the flags for what a run started from, after a look whether that is it."""
    where, base = recipe.where, recipe.base
    if not base:
        if weights is not None:
            raise UserError(f"--ckpt {weights}: {where} started from no weights; leave it out")
        return []
    if weights is None:
        raise UserError(f"{where}: it started from {base.get('file')}; give that with --ckpt FILE")
    recorded = base.get("sha256")
    if recorded and (not weights.is_file() or sha256(weights) != recorded):
        raise UserError(
            f"--ckpt {weights}: not the weights that {where} started from, which are "
            f"{base.get('file')} with the SHA-256 {recorded}"
        )
    return ["--actual_resume", str(weights)]


def _check_images(recipe: Recipe, more: Sequence[str]) -> None:
    """Raise a `UserError` if neither the recipe nor the words beside it say where the photos are.

    Those that are missing at the place that the recipe says are the training's to name.
    """
    if more or recipe.config.get("data.params.train.params.data_root"):
        return
    if any("data_root" in entry for entry in recipe.config.concepts):
        return
    if recipe.config.concepts:
        raise UserError(
            f"{recipe.where}: does not say where its subjects are: give the whole list, "
            "data.params.concepts=[{data_root: ...}, ...]"
        )
    reg = " and --reg_data_root DIR" if recipe.config.get("data.params.reg") else ""
    raise UserError(f"{recipe.where}: does not say where its photos are: give --data_root DIR{reg}")


def _checkpoint_of(run: Path, steps: int | None) -> Path:
    """Return the checkpoint of a run after so many steps; the last one for None."""
    found = [run / LAST, *sorted((run / LAST).parent.glob("*.ckpt"))]
    for path in found:
        if steps is None or read_checkpoint(path).get("global_step") == steps:
            return path
    raise UserError(f"{run}: has no checkpoint of step {steps}, from which the file is")


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a weights file, by the names that it gives them."""
    return state_dict_of(read_checkpoint(file), file)


def _as_in(file: Path, made: Path) -> Mapping[str, Tensor]:
    """Return what a checkpoint holds in the place of a file's tensors, in their precision."""
    theirs, is_checkpoint = _tensors(file), "optimizer_states" in read_checkpoint(file)
    checkpoint = Checkpoint.open(made)
    if is_checkpoint:
        found = _tensors(made)
    elif any(key.endswith(".lora_down.weight") for key in theirs):
        found = adapters_alone(checkpoint.state, checkpoint.alpha())
    elif any(key.startswith(NEW_WORDS) for key in checkpoint.state) and len(theirs) == 1:
        found = read_words(made)
    else:
        found = checkpoint.merged().for_sampling().state
    if not theirs.keys() <= found.keys():
        return found
    return {key: found[key].to(value.dtype) for key, value in theirs.items()}


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
    return compare_states(_tensors(first), _tensors(again))


def compare_states(first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> Comparison:
    """Compare tensors by their names."""
    return Comparison(_digest(first), _digest(again), _difference(first, again))


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
