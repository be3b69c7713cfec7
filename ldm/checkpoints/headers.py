"""What the header of a safetensors file says about its weights, for other programs.

Three groups of entries: ours (`config`, `training`); `modelspec.*` of Stability AI's ModelSpec
1.0.1, which model managers show; and, of a LoRA file, sd-scripts' `ss_*`, from which web UIs know
what it is for. What is not known is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.diffusers_format import CLIP_TEXT, OPEN_CLIP_TEXT, UNET
from ldm.checkpoints.families import recognise
from ldm.checkpoints.layouts import works_in_pixels
from ldm.config import RunConfig, load_config, to_plain

SPEC = "1.0.1"
# By the version of Stable Diffusion, whether it inpaints, and what the UNet predicts.
ARCHITECTURES = {
    ("1", False, "eps"): "stable-diffusion-v1",
    ("1", True, "eps"): "stable-diffusion-v1-inpainting",
    ("2", False, "eps"): "stable-diffusion-v2-512",
    ("2", False, "v"): "stable-diffusion-v2-768-v",
    ("2", True, "eps"): "stable-diffusion-v2-inpainting",
}
PREDICTIONS = {"eps": "epsilon", "v": "v"}
# Whose names the tensors have.
OF_MODELS, OF_LORA = "https://github.com/Stability-AI/generative-models", "diffusers"
NO_HASH = "0x" + "0" * 64

Config = Mapping[str, Any]


def kind_of(state: Mapping[str, Tensor], config: Config) -> dict[str, Any]:
    """Return what is known of a model's kind: `version`, `inpaints`, `predicts`, `side`.

    Args:
        config: of the model; where it is empty, that of the family that the weights are of.
    """
    family = recognise(state)
    if not config and family and len(family.paths) == 1:
        config = to_plain(load_config(family.paths))
    params = RunConfig(config).section("model.params")
    found: dict[str, Any] = {}
    for version, text_encoder in (("1", CLIP_TEXT), ("2", OPEN_CLIP_TEXT)):
        if any(key.startswith(text_encoder) for key in state):
            found["version"] = version
    if params and any(key.startswith(UNET) for key in state):
        found["inpaints"] = params.get("conditioning_key") in ("concat", "hybrid")
        found["predicts"] = params.get("parameterization", "eps")
        found["side"] = side_of(params)
        # ModelSpec has no name for models in pixels, nor for those that enlarge pictures.
        if params.get("conditioning_key") == "hybrid-adm" or works_in_pixels(state):
            del found["version"]
    return {key: value for key, value in found.items() if value is not None}


def side_of(params: Mapping[str, object]) -> int | None:
    """Return the side in pixels of the images that a model's params are for; None if they do not
    say it.
    """
    levels = RunConfig(params).get("first_stage_config.params.ddconfig.ch_mult")
    latent_side = params.get("image_size")
    if not levels or not isinstance(latent_side, int):
        return None
    return latent_side * 2 ** (len(levels) - 1)


def header(
    title: str,
    state: Mapping[str, Tensor],
    config: Config,
    facts: Mapping[str, Any],
    now: datetime | None = None,
) -> dict[str, str]:
    """Return the entries of a safetensors header.

    Args:
        title: of the weights, for people.
        config: of the model; empty for a LoRA.
        facts: about the training; those of a LoRA also hold the `model` that it changes, see
            `kind_of`.
        now: when the weights were made.
    """
    is_lora = any(key.endswith(".lora_down.weight") for key in state)
    kind = facts.get("model", {}) if is_lora else kind_of(state, config)
    ours = {
        key: json.dumps(value) for key, value in (("config", config), ("training", facts)) if value
    }
    entries = {"format": "pt", **ours, **model_spec(title, kind, facts, is_lora, now)}
    if is_lora:
        entries |= sd_scripts(title, state, kind, facts)
    return entries


def model_spec(
    title: str,
    kind: Mapping[str, Any],
    facts: Mapping[str, Any],
    is_lora: bool,
    now: datetime | None = None,
) -> dict[str, str]:
    """Return ModelSpec's entries; none for weights that are no whole model and no LoRA."""
    if "version" not in kind:
        return {}
    now = now or datetime.now(timezone.utc)
    known: Mapping[Any, str] = ARCHITECTURES
    architecture = known.get((kind["version"], kind.get("inpaints"), kind.get("predicts")))
    side = facts.get("resolution", kind.get("side"))
    entries = {
        "sai_model_spec": SPEC,
        "architecture": f"{architecture}/lora" if architecture and is_lora else architecture,
        "implementation": OF_LORA if is_lora else OF_MODELS,
        "title": title,
        "resolution": f"{side}x{side}" if side else None,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hash_sha256": NO_HASH,  # replaced when the tensors are written
        "trigger_phrase": trigger_phrase(facts),
        "prediction_type": PREDICTIONS.get(kind.get("predicts", "")),
    }
    return {f"modelspec.{key}": value for key, value in entries.items() if value is not None}


def trigger_phrase(facts: Mapping[str, Any]) -> str | None:
    """Return the words that the subject's captions have in common: the identifier, mostly with
    the class word.
    """
    identifier = facts.get("identifier")
    if not identifier:
        return None
    phrase = f"{identifier} {facts.get('class_word', '')}".strip()
    in_all = all(phrase in prompt for prompt in facts.get("prompts", ()))
    return phrase if in_all else identifier


def sd_scripts(
    title: str, lora: Mapping[str, Tensor], kind: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, str]:
    """Return the entries by which programs know a LoRA file of sd-scripts."""
    version, side, base = (
        kind.get("version"),
        facts.get("resolution"),
        facts.get("base_model") or {},
    )
    entries = {
        "output_name": title,
        **network_of(lora),
        "v2": None if version is None else version == "2",
        "base_model_version": f"sd_v{version}{'_v' if kind.get('predicts') == 'v' else ''}"
        if version
        else None,
        "sd_model_name": base.get("file"),
        "new_sd_model_hash": base.get("sha256"),
        "resolution": (side, side) if side else None,
        "num_train_images": facts.get("subject_images"),
        "num_reg_images": facts.get("class_images"),
        "prior_loss_weight": facts.get("reg_weight"),
        "seed": facts.get("seed"),
        "learning_rate": facts.get("learning_rate"),
        "steps": facts.get("steps"),
    }
    return {f"ss_{key}": str(value) for key, value in entries.items() if value is not None}


def network_of(lora: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return sd-scripts' description of a LoRA: its module, and the rank and scale of its layers.

    Those of convolutions larger than one pixel stand in the module's arguments.
    """
    sizes: dict[bool, tuple[int, float]] = {}
    for key, down in lora.items():
        if key.endswith(".lora_down.weight"):
            scale = lora.get(key.replace(".lora_down.weight", ".alpha"))
            rank: float = len(down)
            size = (len(down), rank if scale is None else float(scale))
            is_convolution = down.shape[2:].numel() > 1
            sizes[is_convolution] = max(size, sizes.get(is_convolution, size))
    dim, alpha = sizes.get(False) or sizes[True]
    conv_dim, conv_alpha = sizes.get(True, (None, None))
    arguments = {"conv_dim": str(conv_dim), "conv_alpha": str(conv_alpha)} if conv_dim else {}
    return {
        "network_module": "networks.lora",
        "network_dim": dim,
        "network_alpha": alpha,
        "network_args": json.dumps(arguments),
    }


def save_with_hash(state: Mapping[str, Tensor], path: Path, entries: Mapping[str, str]) -> None:
    """Write a safetensors file whose header holds the digest of the tensors' bytes, where it has
    an entry for it.
    """
    save_file(dict(state), path, metadata=dict(entries))
    if NO_HASH not in entries.values():
        return
    # The order of the tensors in the file is the library's: the digest is taken of what it wrote,
    # and replaces as many letters in the header.
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
        file.seek(8)
        file.write(text.replace(NO_HASH.encode(), b"0x" + digest.hexdigest().encode(), 1))
