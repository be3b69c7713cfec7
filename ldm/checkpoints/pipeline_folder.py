"""Diffusers pipeline folders: read in every form that people have them in, and written.

A folder has a part for each network (`unet/`, `vae/`, `text_encoder/`), the tokenizer's files, the
schedule and `model_index.json`. Which name a tensor has there says `diffusers_format`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.diffusers_format import (
    BETA_SCHEDULES,
    PREDICTIONS,
    from_diffusers,
    scheduler_config,
    text_config,
    to_diffusers,
    unet_config,
    vae_config,
)
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.layouts import with_our_names
from ldm.checkpoints.other_folders import of_folder, read_json
from ldm.checkpoints.reading import is_shard, is_shard_index, read_checkpoint, state_dict_of
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.files import first_line, give_usual_permissions, tensor_bytes
from ldm.modules.encoders import tokenizer
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

State = dict[str, Tensor]

WEIGHTS_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
OLD_TEXT_FILE = "pytorch_model"  # what transformers called a .bin file
VERSION = {"_diffusers_version": "0.30.0"}  # of the format; pipelines ask how old a folder is
LIBRARIES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
}

# ---- reading -------------------------------------------------------------------------------------


def open_pipeline(
    folder: Path, given: Mapping[str, object] | None
) -> tuple[State, Mapping[str, Any]]:
    """Read a pipeline folder: the weights under our names, and the config that they fit.

    Args:
        given: the config; by default that of the folder's family, with the folder's schedule.

    Raises:
        UserError: it is no pipeline of Stable Diffusion, its weights do not fit, or a config has to
            be given.
    """
    if what := of_folder(folder):
        raise UserError(f"{folder}: {what}")
    # All of the files are found before the first of them is read.
    for name in WEIGHTS_FILES:
        weights_file(folder, name)
    if given:
        config = given
        _warn_of_another_schedule(folder, given)
    else:
        config = _with_schedule_of(folder, to_plain(load_config([config_of_pipeline(folder)])))
    with torch.device("meta"):
        model = instantiate_from_config(_target(config), "model")
    return read_pipeline(folder, model.state_dict()), config


def _target(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's model for names alone, without what only trainings need."""
    params = {key: value for key, value in config["model"]["params"].items() if key != "lora"}
    return {"target": config["model"]["target"], "params": params}


def read_pipeline(folder: str | Path, ours: Iterable[str]) -> State:
    """Return a pipeline folder's weights under our keys; `ours` are the keys of the config's model.

    Raises:
        UserError: a part or its weights are missing, or do not fit.
    """
    folder = Path(folder)
    files = {name: weights_file(folder, name) for name in WEIGHTS_FILES}
    parts = {name: read_part(file) for name, file in files.items()}
    try:
        return from_diffusers(parts, ours)
    except KeyError as error:
        raise UserError(f"{folder}: a tensor of its text encoder is missing: {error}") from error


def read_part(file: Path) -> State:
    """Return the tensors of one network's file, or of all those that an index names."""
    return with_our_names(state_dict_of(read_checkpoint(file), file), file)


def weights_file(folder: Path, name: str) -> Path:
    """Return the file of a part's weights, or the index of several: the most exact that there is.

    Variants such as `model.fp16.safetensors` come after the plain file, `.bin` after
    `.safetensors`.

    Raises:
        UserError: there is none.
    """
    found = part_file(folder / name, WEIGHTS_FILES[name])
    if found is None:
        expected = f"{WEIGHTS_FILES[name]}.safetensors"
        raise UserError(f"{folder}: not a diffusers pipeline: {name}/ has no weights ({expected})")
    return found


def part_file(folder: Path, stem: str) -> Path | None:
    """Return the file of the weights in a part's folder; None if there is none.

    Raises:
        UserError: there are pieces of a sharded file, without the index that names them.
    """
    stems = (stem, OLD_TEXT_FILE) if stem == "model" else (stem,)
    found: list[tuple[tuple[int, str, bool, bool], Path]] = []
    pieces = []
    for path in sorted(folder.glob("*")):
        matched = re.match(rf"({'|'.join(stems)})\b(.*)$", path.name)
        if matched is None or not path.is_file():
            continue
        if is_shard(path):
            pieces.append(path)
        elif is_shard_index(path) or path.suffix in (".safetensors", ".bin"):
            variant = re.sub(r"\.(safetensors|bin|index|json)\b", "", matched[2])
            rank = (
                ("", ".fp32", ".bf16", ".fp16").index(variant)
                if variant in ("", ".fp32", ".bf16", ".fp16")
                else 4
            )
            found.append(((rank, variant, ".bin" in path.name, is_shard_index(path)), path))
    if found:
        return min(found)[1]
    if pieces:
        raise UserError(
            f"{pieces[0]}: a piece of a sharded file, whose index (*.index.json) is not beside it"
        )
    return None


def config_of_pipeline(folder: str | Path) -> Path:
    """Return the file of our config that a pipeline folder fits, from its UNet's and scheduler's
    configs.

    Raises:
        UserError: it is no pipeline, or of none of the families that we have a config of.
    """
    folder = Path(folder)
    shape = read_json(folder / "unet" / "config.json")
    if not shape:
        raise UserError(f"{folder}: not a diffusers pipeline: no unet/config.json")
    width = (shape.get("block_out_channels") or [0])[0]
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    velocity = scheduler.get("prediction_type") == "v_prediction"
    for family in FAMILIES:
        same = (family.width, family.in_channels, family.context_dim)
        if same != (width, shape.get("in_channels"), shape.get("cross_attention_dim")):
            continue
        if not scheduler and len(family.paths) > 1:
            raise UserError(
                f"{folder}: {family}, and no scheduler/scheduler_config.json says which: give "
                "--config"
            )
        fitting = [path for path in family.paths if path.name.endswith("-v.yaml") == velocity]
        # A model of another family that was trained to predict the velocity: only its schedule's
        # keys differ.
        return fitting[0] if fitting else family.paths[0]
    raise UserError(
        f"{folder}: a pipeline of none of the kinds that come with a config: give --config"
    )


def schedule_of_pipeline(folder: Path) -> dict[str, Any]:
    """Return the keys of `model.params` that a folder's scheduler says, whichever class of
    scheduler it is.

    Raises:
        UserError: it is a schedule that ours cannot be.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if not scheduler:
        return {}
    name = scheduler.get("_class_name", "the scheduler")
    if scheduler.get("trained_betas") is not None or "FlowMatch" in str(name):
        raise UserError(
            f"{folder}: the schedule of its {name} is not one that Stable Diffusion 1 and 2 have"
        )
    ours = {theirs: name for name, theirs in BETA_SCHEDULES.items()}
    predictions = {theirs: name for name, theirs in PREDICTIONS.items()}
    shape = scheduler.get("beta_schedule", "linear")
    prediction = scheduler.get("prediction_type", "epsilon")
    if shape not in ours or prediction not in predictions:
        raise UserError(
            f"{folder}: its {name} has beta_schedule '{shape}' and prediction_type "
            f"'{prediction}': not read"
        )
    return {
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_schedule": ours[shape],
        "linear_start": scheduler.get("beta_start", 1e-4),
        "linear_end": scheduler.get("beta_end", 2e-2),
        "parameterization": predictions[prediction],
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr")),
    }


SCHEDULE_DEFAULTS = {
    "beta_schedule": "linear",
    "parameterization": "eps",
    "zero_terminal_snr": False,
}


def _differences(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a folder's schedule that a config says otherwise."""
    params = {**SCHEDULE_DEFAULTS, **config["model"]["params"]}
    theirs = schedule_of_pipeline(folder)
    found = {}
    for key, value in theirs.items():
        says_otherwise = key in params and params[key] != value
        if says_otherwise:
            found[key] = value
    return found


def _with_schedule_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose schedule and prediction are those of the folder's scheduler."""
    model = config["model"]
    params = {**model["params"], **_differences(folder, config)}
    return {**config, "model": {**model, "params": params}}


def _warn_of_another_schedule(folder: Path, config: Mapping[str, Any]) -> None:
    for key, value in _differences(folder, config).items():
        ours = {**SCHEDULE_DEFAULTS, **config["model"]["params"]}[key]
        log.warning("%s: was trained with %s %s; the config's %s is used", folder, key, value, ours)


# ---- writing -------------------------------------------------------------------------------------


def check_new_folder(folder: Path) -> None:
    """Raise a `UserError` if there is something where a folder is to be written."""
    if folder.exists():
        raise UserError(f"{folder}: is there already, and is not overwritten")


def save_pipeline(model: LatentDiffusion, params: Mapping[str, Any], folder: str | Path) -> None:
    """Write a `LatentDiffusion` as a folder that `StableDiffusionPipeline.from_pretrained` opens.

    Args:
        params: its `model.params`.
        folder: does not exist yet; it appears when it is whole.

    Raises:
        UserError: the folder is there, the disk is too small, or diffusers has no such model.
    """
    folder = Path(folder)
    check_new_folder(folder)
    if params.get("conditioning_key") == "hybrid-adm" or model.downsampling == 1:
        raise UserError(
            f"{folder}: no diffusers folder is written of a model in pixels or of one that "
            "enlarges pictures: name a .safetensors or .ckpt file"
        )
    embedder = model.cond_stage_model
    parts = to_diffusers(model.state_dict(), getattr(embedder, "blocks_left_out", 0))
    unet = params["unet_config"]["params"]
    inpainting = unet["in_channels"] > unet["out_channels"]
    configs = {
        "unet": unet_config(unet, model.image_size),
        "vae": vae_config(params["first_stage_config"]["params"], model.scale_factor),
        "text_encoder": text_config(embedder),
        "scheduler": scheduler_config(params),
    }
    pipeline = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    index = {"_class_name": pipeline, **VERSION, "requires_safety_checker": False, **LIBRARIES}
    pad = embedder.pad
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        needed = tensor_bytes(parts)
        if needed > free:
            raise UserError(
                f"{folder}: not written: it needs {needed / 1e9:.2f} GB, the disk has "
                f"{free / 1e9:.2f} GB free"
            )
        # Everything is made in a temporary folder beside it, which then gets the name.
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}.") as temporary:
            root = Path(temporary) / folder.name
            root.mkdir()
            (root / "model_index.json").write_text(json.dumps(index, indent=2))
            _write_configs(root, configs)
            _write_weights(root, parts)
            save_tokenizer(root / "tokenizer", embedder.max_length, pad)
            os.replace(root, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: not written: {first_line(error)}") from error


def _write_configs(root: Path, configs: Mapping[str, dict[str, object]]) -> None:
    for name, config in configs.items():
        (root / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        if "_class_name" in config:
            config = {**config, **VERSION}
        (root / name / file).write_text(json.dumps(config, indent=2))


def _write_weights(root: Path, parts: Mapping[str, State]) -> None:
    for name, state in parts.items():
        weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        file = root / name / f"{WEIGHTS_FILES[name]}.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        give_usual_permissions(file)


def save_tokenizer(folder: Path, max_length: int, pad: int) -> None:
    """Write the files of transformers' `CLIPTokenizer`, from the vocabulary of open_clip."""
    vocabulary, merges = tokenizer.vocabulary()
    words = {number: word for word, number in vocabulary.items()}
    special = {
        "bos_token": words[tokenizer.START],
        "eos_token": words[tokenizer.END],
        "unk_token": words[tokenizer.END],
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "pad_token": words[pad],
        **special,
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
