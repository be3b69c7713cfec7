"""Weights alone, for other programs: in what precision, and with which facts about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import __version__
from ldm.checkpoints.finite import first_not_finite
from ldm.checkpoints.headers import header, save_with_hash
from ldm.config import PATHS, RunConfig
from ldm.data.prompts import captions_from_templates
from ldm.errors import UserError
from ldm.files import save_checkpoint, tensor_bytes, write_atomically

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SUFFIXES = (".safetensors", ".ckpt")

# Keys of a model's params that a model to sample from does without.
TRAINING_ONLY = ("ckpt_path", "lora", "freeze", "text_encoder_lr", "text_encoder_stop")

State = dict[str, Tensor]


def sha256(path: Path) -> str:
    """Return a file's SHA-256, the digest that web UIs name models by."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> State:
    """Return matrices and convolutions in a precision; vectors stay, the schedule needs the
    digits.
    """
    return {
        key: value.to(dtype) if dtype and value.is_floating_point() and value.ndim > 1 else value
        for key, value in state.items()
    }


def shared_config(config: Mapping[str, object] | None, keeps_words: bool = False) -> dict[str, Any]:
    """Return the model's config without what only its training needs; empty if there is none.

    Args:
        keeps_words: the weights have rows of new words, which prompts may hold.
    """
    model = RunConfig(config or {}).section("model")
    if not model:
        return {}
    params = {
        key: value for key, value in model.get("params", {}).items() if key not in TRAINING_ONLY
    }
    if not keeps_words:
        params.pop("personalization_config", None)
    if "use_ema" in params:
        params["use_ema"] = False
    # Where a network's own weights came from is nobody else's affair.
    for name, network in params.items():
        if isinstance(network, Mapping) and "ckpt_path" in RunConfig(network).section("params"):
            kept = {key: value for key, value in network["params"].items() if key != "ckpt_path"}
            params[name] = {**network, "params": kept}
    return {"model": {**model, "params": params}}


def recipe_of(config: Mapping[str, object]) -> dict[str, Any]:
    """Return the config of a run without where its files are, which is nobody else's affair.

    `scripts/replay.py` trains again from it. What the run started from is not in it.
    """
    asked = RunConfig(config)
    recipe = {name: asked.section(name) for name in ("model", "data", "lightning")}
    chosen = {key: asked.get(f"run.{key}") for key in ("seed", "scale_lr", "export")}
    recipe["run"] = {key: value for key, value in chosen.items() if value is not None}
    return {name: without_places(section) for name, section in recipe.items() if section}


def without_places(value: Any) -> Any:
    """Return nested containers without the files and folders that they name."""
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, inner in value.items():
        if key not in PATHS or not isinstance(inner, str):
            kept[key] = without_places(inner)
        elif key == "latent_cache":
            kept[key] = True  # there was one, in a folder
    return kept


def target_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's model, for `instantiate_from_config`."""
    return {key: value for key, value in config["model"].items() if key != "base_learning_rate"}


def training_facts(
    config: Mapping[str, object] | None, steps: int | None, images: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return how weights were trained, from the config of the run; empty if they were not trained
    here.

    Args:
        images: how many there were, `subject_images` and `class_images`, where that is known.
    """
    if not config or "data" not in config or not steps:
        return {}
    asked = RunConfig(config)
    data, params = asked.section("data.params"), asked.section("model.params")
    subject = asked.section("data.params.train.params")
    fields = signature(captions_from_templates).parameters
    captions = {key: value for key, value in subject.items() if key in fields}
    is_dreambooth = "placeholder_token" in captions
    facts = {
        "identifier": captions.get("identifier", fields["identifier"].default)
        if is_dreambooth
        else None,
        "class_word": captions.get("placeholder_token"),
        "concepts": [
            {key: entry.get(key) for key in ("identifier", "class_word") if key in entry}
            for entry in asked.concepts
        ]
        or None,
        "prompts": captions_from_templates(**captions) if is_dreambooth else None,
        "steps": steps,
        "learning_rate": asked.get("model.base_learning_rate"),
        "batch_size": data.get("batch_size"),
        "resolution": subject.get("size"),
        **(images or {}),
        "reg_weight": params.get("reg_weight"),
        "text_encoder_trained": params.get("cond_stage_trainable"),
        "lora": params.get("lora"),
        "seed": asked.get("run.seed"),
        "base_model": asked.get("run.base_model"),
        "recipe": recipe_of(config),
        "software": f"dreambooth-ldm {__version__}",
    }
    return {key: value for key, value in facts.items() if value is not None}


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a `UserError` for tensors with values that are no numbers: no model works with them."""
    key = first_not_finite(state, state)
    if key is not None:
        raise UserError(
            f"{path}: not written: '{key}' has values that are no numbers: the weights were "
            "broken before, or are too large for this precision"
        )


def write_weights(
    path: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, object],
    facts: Mapping[str, object],
    title: str | None = None,
) -> None:
    """Write named tensors as `.safetensors`, or as a `.ckpt` with a `state_dict`, atomically.

    Args:
        config: of the model, goes along so that nobody has to say it again.
        facts: about its training, go along, too.
        title: of the weights, for people; by default the file's name.

    Raises:
        UserError: another suffix, values that are no numbers, or a disk that is too small.
    """
    state = {key: value.contiguous() for key, value in state.items()}
    check_finite(state, path)
    if path.suffix == ".ckpt":
        extra = {"config": dict(config)} if config else {}
        save_checkpoint(
            {"state_dict": state, **extra, **({"training": dict(facts)} if facts else {})}, path
        )
        return
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    entries = header(title or path.stem, state, config, facts)
    write_atomically(
        path, lambda temporary: save_with_hash(state, temporary, entries), tensor_bytes(state)
    )
