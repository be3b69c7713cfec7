"""The miniature's own encoders, for the protocol `miniature`: its scores compare with nothing
else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.config import load_config, to_plain
from ldm.evaluation.encoders import Encoders, weights_hash
from ldm.evaluation.metrics import CLIPImages, EfficientNetLite0, features_of, to_tensor
from ldm.tiny.clip import CLIP
from ldm.tiny.miniature import CLIP_CONFIG, CLIP_IMAGES

log = logging.getLogger(__name__)

SIDE = 64
TEXT = "clip.text_projection"  # without it, a file of the CLIP has no text tower


def miniature_encoders(clip_file: str | Path | None = None) -> Encoders:
    """Load EfficientNet-Lite0 in DINO's and LPIPS's place, and the miniature's CLIP.

    Args:
        clip_file: a checkpoint of `ldm.tiny.clip.CLIP`; of the image tower alone, which is what
            ships, CLIP-T cannot be computed.
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
    said = _texts(state, config) if TEXT in state else None
    if said is None:
        log.info("%s: the image tower alone, so there is no CLIP-T", path)
    hashes = {
        "DINO": f"EfficientNet-Lite0 {weights_hash(efficient)}",
        "CLIP": f"miniature {weights_hash(images)}",
        "LPIPS": f"EfficientNet-Lite0 {weights_hash(efficient)}",
    }
    return Encoders(features, shown, said, distance, hashes)


def _texts(state: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """Return the text tower of a CLIP as a function of texts."""
    clip = CLIP(**config["params"])
    clip.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    clip.eval().requires_grad_(False)

    def said(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return clip.encode_text(texts)

    return said
