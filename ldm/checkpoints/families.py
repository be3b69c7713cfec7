"""The Stable Diffusion families: which of our configs a stranger's weights fit, from their keys and
shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.config import PROJECT
from ldm.errors import UserError

CONFIGS = PROJECT / "configs" / "stable-diffusion"

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_AVERAGE = "model_ema.diffusion_modelinput_blocks00weight"
# The first attention to the text: the upscaler has none at the first of its resolutions.
CROSS = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
CROSSES = (CROSS.format(1), CROSS.format(4))


@dataclass(frozen=True)
class Family:
    """A kind of Stable Diffusion: the UNet's input channels, the width of its text, and the configs
    that fit.
    """

    name: str
    in_channels: int
    context_dim: int
    configs: tuple[str, ...]
    width: int = 320

    @property
    def paths(self) -> list[Path]:
        """The configs' files."""
        return [CONFIGS / name for name in self.configs]

    def __str__(self) -> str:
        configs = " or ".join(f"configs/stable-diffusion/{name}" for name in self.configs)
        return f"{self.name} ({configs})"


FAMILIES = (
    Family("Stable Diffusion 1", 4, 768, ("v1-inference.yaml",)),
    Family("Stable Diffusion 1 for inpainting", 9, 768, ("v1-inpainting-inference.yaml",)),
    Family("Stable Diffusion 2", 4, 1024, ("v2-inference.yaml", "v2-inference-v.yaml")),
    Family("Stable Diffusion 2 for inpainting", 9, 1024, ("v2-inpainting-inference.yaml",)),
    Family(
        "Stable Diffusion 2's x4 upscaler", 7, 1024, ("x4-upscaling-inference.yaml",), width=256
    ),
)


def recognise(state: Mapping[str, Tensor]) -> Family | None:
    """The family of a checkpoint's tensors, None if it is none of these."""
    crosses = [state[key] for key in CROSSES if key in state]
    if FIRST not in state or not crosses:
        return None
    width, in_channels = state[FIRST].shape[:2]
    context_dim = crosses[0].shape[1]
    found = (
        f
        for f in FAMILIES
        if (f.width, f.in_channels, f.context_dim) == (width, in_channels, context_dim)
    )
    return next(found, None)


def widened(state: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Return the weights of a UNet that reads `channels` input channels; the new ones weigh 0.

    The widened model computes what the given one does, whatever the new channels hold. So a model
    that inpaints starts from one that does not, as in the training of Stable Diffusion's.
    """
    wide = dict(state)
    for key in (FIRST, FIRST_AVERAGE):
        if key in state and state[key].shape[1] < channels:
            weight = state[key]
            wide[key] = weight.new_zeros((len(weight), channels, *weight.shape[2:]))
            wide[key][:, : weight.shape[1]] = weight
    return wide


def config_for(state: Mapping[str, Tensor], path: str | Path) -> Path:
    """The config that a checkpoint without one fits.

    Raises:
        UserError: it is of no family, or of one with several configs, which keys and shapes do not
            tell apart.
    """
    family = recognise(state)
    if family is None:
        raise UserError(f"{path}: it does not say which config it was made with: give --config")
    if len(family.paths) > 1:
        raise UserError(
            f"{path}: {family}: models at 512 pixels (2-base) predict the noise, those at 768 "
            "(2, 2.1) the velocity, "
            "and the weights do not say which: give --config"
        )
    return family.paths[0]
