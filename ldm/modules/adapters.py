"""Low-rank adapters on attention (LoRA; Hu et al., 2106.09685): what `model.params.lora` puts into
a model, with peft.

An adapted layer computes W x + up down x · alpha / rank. `up` starts at zero, so that the model
starts as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ldm.errors import ParameterError
from ldm.rng import generator
from ldm.util import check_mapping, check_params

NAME = "lora"  # the parameter of `LatentDiffusion`
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names
# Names of the layers, as they end: of our `CrossAttention` and of transformers' CLIP.
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoraOptions:
    """The size of the adapters.

    Args:
        rank: of every layer's difference.
        alpha: the difference is scaled by alpha / rank; `rank` by default.

    Raises:
        UserError: one of them is not positive.
    """

    def __init__(self, rank: int = 8, alpha: float | None = None):
        if rank < 1:
            raise ParameterError(f"{NAME}.rank", f"expected 1 or more, got {rank}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ParameterError(f"{NAME}.alpha", f"expected a positive number, got {alpha}")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)


def lora_options(given: Mapping[str, Any]) -> LoraOptions:
    """Return the options of a config's `model.params.lora`; raises a `UserError` for wrong ones."""
    check_mapping(given, NAME)
    check_params(LoraOptions, given, NAME)
    return LoraOptions(**given)


def check_adaptable(text_encoder: nn.Module | None, use_ema: bool) -> None:
    """Raise a `UserError` if adapters cannot be trained.

    Args:
        text_encoder: the one that is to be trained, too.
    """
    if find_spec("peft") is None:
        raise ParameterError(NAME, "needs the package 'peft': pip install peft")
    if use_ema:
        raise ParameterError(NAME, "adapters have no EMA weights: set use_ema: false")
    if text_encoder is not None and not _has_layers(text_encoder, TEXT_LAYERS):
        raise ParameterError(
            NAME,
            f"the attention of {type(text_encoder).__name__} takes no adapters: "
            "set model.params.cond_stage_trainable: false",
        )


def _has_layers(module: nn.Module, endings: Sequence[str]) -> bool:
    names = adaptable_weights(module, endings)
    for ending in endings:
        weight = f".{ending}.weight"
        if not any(name.endswith(weight) for name in names):
            return False
    return True


def adaptable_weights(module: nn.Module, endings: Sequence[str], prefix: str = "") -> list[str]:
    """Return the names, behind `prefix`, of the weights of a module's linear layers that end so."""
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return [
        f"{prefix}{name}.weight"
        for name in linear
        if name.endswith(tuple(f".{ending}" for ending in endings))
    ]


def add_adapters(module: nn.Module, layers: Sequence[str], options: LoraOptions) -> None:
    """Put trainable adapters on a module's linear layers of these names.

    How they start is a function of torch's seed and of each one's name. What was drawn before, such
    as for class images or by the processes of a group at their start, does not change it.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # peft's annotation says int; it divides by it.
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules=list(layers),
    )
    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if name.endswith(DOWN):
            _draw(parameter, generator(NAME, torch.initial_seed(), name))


@torch.no_grad()
def _draw(down: nn.Parameter, chance: torch.Generator) -> None:
    """Draw a matrix (r, d) as peft and PyTorch's own linear layers do: evenly in ±1 / sqrt(d)."""
    bound = 1 / math.sqrt(down.shape[1])
    down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=chance))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Compute as if a module had no adapters, inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    # Not peft's `enable_adapters`: that sets which parameters train, which `freeze` has settled.
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before):
            layer._disable_adapters = was
