"""The reference implementation's numbers (tests/data) and the rule that gives its weights."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.util import LEGACY


def _without_legacy(params: dict[str, Any], target: str) -> dict[str, Any]:
    """The params of a target without those that have no effect here, also inside: what a
    constructor takes.
    """
    kept = {key: value for key, value in params.items() if key not in LEGACY.get(target, {})}
    for key, value in kept.items():
        if isinstance(value, dict) and "target" in value:
            kept[key] = {
                **value,
                "params": _without_legacy(value.get("params", {}), value["target"]),
            }
    return kept


DATA = Path(__file__).parents[1] / "data"
META: dict[str, Any] = json.loads((DATA / "tiny_meta.json").read_text())
_SETUP: dict[str, Any] = json.loads((DATA / "tiny_config.json").read_text())
TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
RECORDED: dict[str, Any] = _SETUP["config"]  # the reference's params
CONFIG: dict[str, Any] = _without_legacy(RECORDED, TARGET)
TEXT_CONFIG: dict[str, Any] = _SETUP["clip_text"]

# What float32 rounds, here and in the recording: the noise floors between library versions are
# 2e-6, 3e-6, 5e-6 and 9e-6, and parity is a few times that. With twice the rounding of real kernels
# (OTHER_ROUNDING) they hold as well.
FORWARD, GRADIENT, SAMPLE, PRED_X0 = 6e-6, 1e-5, 1.5e-5, 3e-5


@cache
def io() -> dict[str, np.ndarray]:
    """All recorded arrays by name."""
    with np.load(DATA / "tiny_io.npz") as arrays:
        return dict(arrays)


def tensor(name: str) -> Tensor:
    """A recorded array, as a new tensor."""
    return torch.tensor(io()[name])


@cache
def init_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the parameter `key`, float32: a function of its name and shape. Copy them
    before you change them.
    """
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("embedding.weight"):
        x = 0.3 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif key.endswith(".weight"):
        x = 1 + 0.2 * x
    else:
        x = 0.1 * x
    return np.asarray(x, np.float32)


@torch.no_grad()
def load_golden_weights(module: nn.Module, prefix: str = "") -> None:
    """Fill every parameter of `module`; `prefix` goes before its name."""
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.from_numpy(init_array(prefix + name, tuple(parameter.shape))))


def rel(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def latent_diffusion() -> nn.Module:
    """The `LatentDiffusion` that was recorded, with its weights, in training mode."""
    from ldm.models.diffusion.ddpm import LatentDiffusion

    text = {"target": CONFIG["cond_stage_config"]["target"], "params": {"text_config": TEXT_CONFIG}}
    model = LatentDiffusion(**{**CONFIG, "cond_stage_config": text})
    load_golden_weights(model)
    return model.train()
