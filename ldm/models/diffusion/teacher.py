"""The teacher: the model as it was before the training, whose predictions are to be kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import as_mapping
from ldm.models.diffusion.schedule import Latent, Steps
from ldm.modules.adapters import adapters_off
from ldm.modules.encoders.modules import TextEncoder, embed_distinct

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PRECISIONS = ("fp32", "bf16")  # of a copy; fp32 stands for the model's own
STATE = "teacher"  # a run's checkpoint has the copy's weights under this key


@runtime_checkable
class Teacher(Protocol):
    """Predicts as a model did before its training."""

    def predict(
        self, model: LatentDiffusion, captions: Sequence[str], x_noisy: Latent, t: Steps
    ) -> Latent:
        """Return the UNet's output, without gradients."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to have the same teacher."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""


class AdaptersOff:
    """The model itself without its adapters, which a LoRA run alone trains."""

    @torch.no_grad()
    def predict(
        self, model: LatentDiffusion, captions: Sequence[str], x_noisy: Latent, t: Steps
    ) -> Latent:
        """Return the UNet's output, without gradients."""
        # Without dropout: what is kept is what sampling would see.
        mode = model.training
        model.train(False)
        try:
            with adapters_off(model.model), adapters_off(model.cond_stage_model):
                # Each distinct caption is read once, as in the training step.
                cond = embed_distinct(model.cond_stage_model, captions)
                return model.apply_model(x_noisy, t, cond)
        finally:
            model.train(mode)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the weights below the adapters are the model's own."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over nothing."""


class FrozenCopy:
    """A second copy of the UNet's weights and, if it trains, of the text encoder's.

    It is no submodule of the model: no optimizer, average or export knows it.

    Args:
        model: with the weights that the training starts from.
        precision: fp32 keeps the model's own numbers; bf16 rounds them.
    """

    def __init__(self, model: LatentDiffusion, precision: str = PRECISIONS[0]):
        # Copy what will train: the rest is the same before and after.
        self.rounded = precision == "bf16"
        parts: dict[str, nn.Module] = {"model": model.model}
        if any(parameter.requires_grad for parameter in model.cond_stage_model.parameters()):
            parts["cond_stage_model"] = model.cond_stage_model
        self.networks = nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})
        # It predicts, and never learns.
        self.networks.requires_grad_(False).eval()
        if self.rounded:
            self.networks.bfloat16()

    @torch.no_grad()
    def predict(
        self, model: LatentDiffusion, captions: Sequence[str], x_noisy: Latent, t: Steps
    ) -> Latent:
        """Return the UNet's output, without gradients."""
        # The copy follows the model to its device, and to a precision that a whole run has.
        weight = next(model.model.parameters())
        self.networks.to(weight.device, torch.bfloat16 if self.rounded else weight.dtype)
        # A text encoder that does not train is the model's own.
        encoder = dict(self.networks.items()).get("cond_stage_model", model.cond_stage_model)
        key = model.model.conditioning_key
        with torch.autocast(weight.device.type, torch.bfloat16) if self.rounded else nullcontext():
            cond = embed_distinct(cast(TextEncoder, encoder), captions)
            return self.networks["model"](x_noisy, t, **as_mapping(cond, key))

    def state(self) -> dict[str, Tensor]:
        """Return the copy's weights."""
        return self.networks.state_dict()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights that the run's first start had."""
        # A copy of the weights of now would be a teacher that has learned the subject.
        if not state:
            raise UserError(
                "the checkpoint to go on from has no copy of the weights before the training, "
                "which model.params.preservation compares with: leave preservation as it was, "
                "or start a new run with --actual_resume"
            )
        self.networks.load_state_dict(state)
