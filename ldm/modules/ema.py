"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Shadow copies of a model's trainable parameters, in buffers, which a state dict holds.

    A buffer has the name of its parameter without the dots, as CompVis's `model_ema.*` keys.

    Args:
        decay: weight of the past after many updates.
        use_num_updates: start with a short memory, `(1 + n) / (10 + n)`, until it reaches `decay`.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer(
            "num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int)
        )
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._shadow_name = {name: name.replace(".", "") for name in trained}
        names = set(self._shadow_name.values())
        assert len(names) == len(self._shadow_name), "two parameters share an EMA name"
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_buffer(self._shadow_name[name], parameter.detach().clone())

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, *args: object
    ) -> None:
        """Load the EMA weights.

        `decay` stays the one that was asked for, not that of a checkpoint.
        """
        if f"{prefix}decay" in state_dict and not self.decay.is_meta:
            state_dict[f"{prefix}decay"] = self.decay
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
        for name, parameter in model.named_parameters():
            if name in self._shadow_name:
                yield getattr(self, self._shadow_name[name]), parameter

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move every shadow towards its parameter by `1 - decay` of the way."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, parameter in self._pairs(model):
            shadow.sub_((1 - decay) * (shadow - parameter.to(shadow.dtype)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Replace the model's parameters by their EMA weights."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Give the model the EMA weights inside, and its own afterwards, also after an error."""
        kept = [p.detach().clone() for _, p in self._pairs(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), own in zip(self._pairs(model), kept):
                    parameter.copy_(own)
