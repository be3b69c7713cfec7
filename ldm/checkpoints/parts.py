"""One network out of any file: an autoencoder or a text encoder, as people share them and as whole
models have them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.diffusers_format import CLIP_TEXT, OPEN_CLIP_TEXT, part, vae_from_diffusers
from ldm.checkpoints.export import target_of
from ldm.checkpoints.layouts import VAE, with_our_names
from ldm.checkpoints.loading import LoadReport, load_state
from ldm.checkpoints.other_files import of_content, of_weights
from ldm.checkpoints.other_folders import of_folder, read_json
from ldm.checkpoints.pipeline_folder import part_file, read_part
from ldm.checkpoints.reading import read_checkpoint, refuse_single_shard, state_dict_of
from ldm.errors import UserError
from ldm.modules.encoders.names import open_clip_to_transformers
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

State = dict[str, Tensor]
VAE_STEM = "diffusion_pytorch_model"


def load_parts(model: nn.Module) -> None:
    """Load the weights that networks name as their `ckpt_path`.

    Who builds a model calls this, unless a checkpoint fills all of it: constructors read no files.
    """
    for module in model.modules():
        path = getattr(module, "ckpt_path", None)
        if path:
            load_part(module, path, getattr(module, "ignore_keys", ()))


def load_part(module: nn.Module, path: str | Path, ignore_keys: Iterable[str] = ()) -> LoadReport:
    """Load one network from a file of its own or of a whole model, and return a report of what
    fitted.

    Args:
        ignore_keys: tensors whose names start with one of these stay as they are.

    Raises:
        UserError: the file has no such network, or one of another shape.
    """
    ours = module.state_dict()
    if any(key.startswith("transformer.text_model.") for key in ours):
        state = read_text_encoder(path)
    else:
        state = read_autoencoder(path, ours)
    return load_state(module, state, path, ignore_keys)


def with_autoencoder(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return a model's weights with the autoencoder of another file or folder, or of one that is
    nothing else.

    Raises:
        UserError: there is none in it, or one of another shape.
    """
    checkpoint.refuse_other_kinds()
    ours = part(checkpoint.state, VAE)
    if not ours:  # as the files are that leave it out
        with torch.device("meta"):
            model = instantiate_from_config(
                target_of(checkpoint.for_sharing().fitting_config()), "model"
            )
        ours = part(model.state_dict(), VAE)
    params = checkpoint.config["model"].get("params") if checkpoint.config else None
    other = read_autoencoder(path, ours, (params or {}).get("scale_factor"))
    wrong = [
        key for key, value in ours.items() if key not in other or other[key].shape != value.shape
    ]
    if wrong:
        raise UserError(
            f"{path}: no autoencoder of this model's shape in it: '{wrong[0]}' is missing or "
            "different"
        )
    return checkpoint.with_state({**checkpoint.state, **{VAE + key: other[key] for key in ours}})


def read_autoencoder(
    path: str | Path, ours: Iterable[str], scale_factor: float | None = None
) -> State:
    """Return an autoencoder's tensors under the names of `AutoencoderKL`.

    It may be a file of its own or in a whole model, by our names or by diffusers', or in a
    pipeline's folder.

    Args:
        ours: the names that are wanted.
        scale_factor: of the latents that the model knows; a folder says which its autoencoder is
            for.

    Raises:
        UserError: there is none, or one for other latents.
    """
    path = Path(path)
    if path.is_dir():
        path = _autoencoder_in(path)
    _check_scale(path, scale_factor)
    refuse_single_shard(path)
    content = read_checkpoint(path)
    if what := of_content(content):
        raise UserError(f"{path}: no autoencoder in it: {what}")
    state = with_our_names(state_dict_of(content, path), path)
    inside = part(state, VAE)
    other = of_weights(state)
    if other and not other.is_part:
        raise UserError(f"{path}: no autoencoder that is read in it: {other}")
    return vae_from_diffusers(inside or state, ours)


def _autoencoder_in(folder: Path) -> Path:
    """Return the file of the autoencoder in a pipeline's folder, or in its `vae/`."""
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    kind = str(read_json(inner / "config.json").get("_class_name", "AutoencoderKL"))
    if not kind.startswith("Autoencoder"):
        raise UserError(f"{folder}: no autoencoder in it: it is a {kind}; give the folder vae/")
    found = part_file(inner, VAE_STEM)
    if found is None:
        raise UserError(
            f"{folder}: no autoencoder in it: {of_folder(folder) or 'vae/ has no weights'}"
        )
    return found


def _check_scale(file: Path, scale_factor: float | None) -> None:
    """Raise a `UserError` if the config beside a file says that its autoencoder is for other
    latents.
    """
    theirs = read_json(file.parent / "config.json").get("scaling_factor")
    if theirs is None or scale_factor is None or abs(theirs - scale_factor) < 1e-3 * scale_factor:
        return
    raise UserError(
        f"{file}: an autoencoder whose latents are scaled by {theirs}, and this model's by "
        f"{scale_factor}: it is of "
        "another kind of model (Stable Diffusion XL's has 0.13025)"
    )


def read_text_encoder(path: str | Path) -> State:
    """Return a text encoder's tensors under the names of `FrozenCLIPEmbedder`.

    It may be in a training's checkpoint of `ldm.tiny.clip.CLIP`, in a whole model, or a file of
    transformers' own.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        path = part_file(inner, "model") or path
    state = read_part(path)
    for prefix in (CLIP_TEXT, "transformer.", ""):
        found = part(state, prefix + "text_model.")
        if found:
            return {f"transformer.text_model.{key}": value for key, value in found.items()}
    if "embeddings.token_embedding.weight" in state:  # transformers without the level
        return {f"transformer.text_model.{key}": value for key, value in state.items()}
    for prefix in ("clip.", OPEN_CLIP_TEXT, "model.", ""):
        found = part(state, prefix) if prefix else state
        if "token_embedding.weight" in found:
            return {
                f"transformer.{key}": value
                for key, value in open_clip_to_transformers(found).items()
            }
    raise UserError(
        f"{path}: no text tower in it; expected a checkpoint of CLIP, or of a whole model"
    )
