"""Folders that cannot be read as a diffusers pipeline: named in one line, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.checkpoints.other_files import OTHER_CASCADE, SUPPORTED, WEIGHT_SUFFIXES

NO_PIPELINE = "a folder, and no diffusers pipeline (model_index.json, unet/, vae/, text_encoder/)"
PIPELINE_PARTS = ("unet", "vae", "text_encoder")


def of_folder(folder: Path) -> str | None:
    """Return what a folder is that cannot be read as a pipeline; None for a pipeline of Stable
    Diffusion.
    """
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name", ""))
    if (folder / "transformer").is_dir() or (folder / "text_encoder_2").is_dir() or "XL" in name:
        return f"a pipeline of another kind ({name or 'no Stable Diffusion 1 or 2'}): {SUPPORTED}"
    if name.startswith("IF"):
        return f"a pipeline of a DeepFloyd IF model ({name}): {OTHER_CASCADE}"
    if (folder / "unet").is_dir():
        return None
    if (folder / "prior").is_dir() or (index and "unet" not in index):
        return f"a pipeline of another kind ({name}): {SUPPORTED}"
    return _part_of_pipeline(folder) or _folder_of_files(folder)


def _part_of_pipeline(folder: Path) -> str | None:
    """Return the way out where a folder is one part of a pipeline."""
    kind = str(read_json(folder / "config.json").get("_class_name", ""))
    is_part = folder.name in PIPELINE_PARTS or kind in ("UNet2DConditionModel", "AutoencoderKL")
    if not is_part or not (folder / "config.json").exists():
        return None
    parent = folder.resolve().parent
    whole = all((parent / name).is_dir() for name in PIPELINE_PARTS)
    way_out = (
        f"give the whole pipeline, {parent}"
        if whole
        else "a whole model is needed, give the pipeline's folder"
    )
    return f"one part of a diffusers pipeline ({kind or folder.name}): {way_out}"


def _folder_of_files(folder: Path) -> str:
    """Return what else a folder is, with the file in it that was probably meant."""
    if (folder / "zero_to_fp32.py").exists() or (folder / "latest").exists():
        return (
            "a DeepSpeed checkpoint folder: make one file of it with the zero_to_fp32.py in it, "
            "and give that"
        )
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        return (
            "a distributed checkpoint folder: make one file of it with "
            "'python -m torch.distributed.checkpoint.format_utils dcp_to_torch', and give that"
        )
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"))
    if snapshots:
        return (
            f"a folder of the Hugging Face cache: give the pipeline in it, {snapshots[-1].parent}"
        )
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        return f"a run's folder: give the checkpoint in it, {last}"
    inside = [path for suffix in WEIGHT_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if inside:
        return f"{NO_PIPELINE}: give the file in it, such as {inside[0]}"
    pipelines = sorted(folder.glob("*/model_index.json"))
    if pipelines:
        return f"{NO_PIPELINE}: give the pipeline in it, {pipelines[0].parent}"
    return f"{NO_PIPELINE}: give a file of weights, or a pipeline's folder"


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
