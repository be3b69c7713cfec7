"""The miniature's own encoders, for the protocol `miniature`.

Its scores compare with each other alone: no paper measures with these encoders.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.checkpoint import find_config
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.config import PROJECT, RunConfig, load_config, to_plain
from ldm.errors import UserError
from ldm.evaluation.class_nouns import ImageText
from ldm.evaluation.encoders import Clip, Encoders, weights_hash
from ldm.evaluation.metrics import CLIPImages, EfficientNetLite0, features_of, to_tensor
from ldm.evaluation.protocols import PAPER
from ldm.tiny.clip import CLIP, with_text_encoder
from ldm.tiny.miniature import CLIP_CONFIG, CLIP_IMAGES, WEIGHTS

log = logging.getLogger(__name__)

SIDE = 64
WORLD_CONFIG = PROJECT / "configs/tiny/ldm.yaml"
MINIATURE = "miniature"  # names the CLIP that ships
TEXT = "clip.text_projection"  # without it, a file of the CLIP reads no words
TRANSFORMER = "clip.token_embedding.weight"


def miniature_encoders(clip_file: str | Path | None = None) -> Encoders:
    """Load EfficientNet-Lite0 in DINO's and LPIPS's place, and the miniature's CLIP.

    Args:
        clip_file: a checkpoint of `ldm.tiny.clip.CLIP`, by default the one that ships. With an
            image tower alone, CLIP-T cannot be computed.
    """
    path = Path(clip_file or CLIP_IMAGES)
    config = to_plain(load_config([CLIP_CONFIG]))["model"]
    efficient, images = EfficientNetLite0(SIDE), CLIPImages(path, config)

    def features(pictures: Sequence[Image.Image]) -> Tensor:
        return features_of(efficient, to_tensor(pictures, SIDE))

    def shown(pictures: Sequence[Image.Image]) -> Tensor:
        return features_of(images, to_tensor(pictures, SIDE))

    def distance(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        return (features(first) - features(second)).norm(dim=-1)

    state = state_dict_of(read_checkpoint(path), path)
    clip = _with_words(state, config) if TEXT in state else None
    if clip is None:
        log.info("%s: the image tower alone, so there is no CLIP-T", path)
    hashes = {
        "DINO": f"EfficientNet-Lite0 {weights_hash(efficient)}",
        "CLIP": f"miniature {weights_hash(clip or images)}",
        "LPIPS": f"EfficientNet-Lite0 {weights_hash(efficient)}",
    }
    return Encoders(features, shown, clip.encode_text if clip else None, distance, hashes)


def image_tower(given: str | None, side: int, device: torch.device | str = "cpu") -> Any:
    """Return a CLIP's image tower, as a function of pictures.

    Args:
        given: a CLIP as `read_clip` takes it. None chooses by the pictures: the miniature's for
            small ones, the paper's for larger ones.
        side: of the pictures, in pixels.
    """
    if given is not None:
        return read_clip(given, device).images
    if side > SIDE:
        return Clip(PAPER.clip, device=device)
    images = CLIPImages(CLIP_IMAGES, to_plain(load_config([CLIP_CONFIG]))["model"])
    return lambda pictures: features_of(images, to_tensor(pictures, SIDE))


def read_clip(given: str | Path, device: torch.device | str = "cpu") -> ImageText:
    """Return the towers of a CLIP.

    Args:
        given: `miniature` for the one that ships, another checkpoint of the miniature's CLIP, a
            file of open_clip's ViT-B-32, or a name that open_clip knows, `architecture/weights`.
            These weights may be a file, too.

    Raises:
        UserError: it is not there, or has no text tower.
    """
    path = CLIP_IMAGES if given == MINIATURE else Path(given)
    if not path.exists():
        return _towers(Clip(str(given), device=device))
    content = read_checkpoint(path) if path.is_file() else {}
    state = state_dict_of(content, path) if content else {}
    if not any(key.startswith("clip.visual.") for key in state):
        return _towers(Clip(PAPER.clip, path, device=device))
    if TEXT not in state:
        raise UserError(
            f"{path}: the image tower of the miniature's CLIP alone, which reads no words: give "
            "'miniature', the checkpoint that its training wrote, or a CLIP of open_clip's"
        )
    config = (find_config(content, path) or to_plain(load_config([CLIP_CONFIG])))["model"]
    images = CLIPImages(path, config)

    def shown(pictures: Sequence[Image.Image]) -> Tensor:
        return features_of(images, to_tensor(pictures, SIDE))

    scale = float(state["clip.logit_scale"].exp())
    return ImageText(shown, _with_words(state, config).encode_text, scale, miniature_nouns())


def _towers(clip: Clip) -> ImageText:
    """Return both towers of one of open_clip's models."""
    network: Any = clip.network
    return ImageText(clip, clip.text, float(network.logit_scale.exp()))


def miniature_nouns() -> list[str]:
    """Return the classes that the miniature was trained on. Its CLIP knows no other nouns."""
    classes = "data.params.train.params.dataset.params.classes"
    return list(RunConfig(to_plain(load_config([WORLD_CONFIG]))).get(classes))


def _with_words(state: dict[str, Tensor], config: dict[str, Any]) -> CLIP:
    """Return a CLIP whose weights hold at least its image tower and the projection of texts.

    Weights without the text tower's transformer were trained with that of the miniature, which does
    not ship twice.
    """
    if TRANSFORMER not in state:
        state = with_text_encoder(state, state_dict_of(read_checkpoint(WEIGHTS), WEIGHTS))
    clip = CLIP(**config["params"])
    clip.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    return clip.eval().requires_grad_(False)
