"""Low-rank differences: trained, or of two checkpoints, in the format that kohya's scripts, web UIs and diffusers load.

A layer W of the fine-tuned model is W_base + up @ down x alpha / rank (Hu et al., 2106.09685). The names are those of
diffusers' modules with underscores for dots: `lora_unet_{module}.lora_down.weight`, `lora_te_{module}...`.

The checkpoints of a LoRA run have peft's names: an adapted layer's own weights are under `{layer}.base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ldm.checkpoints.diffusers_format import CLIP_TEXT, UNET, to_diffusers, unet_names
from ldm.errors import UserError

State = dict[str, Tensor]
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


def lora_layers(parts: Mapping[str, State]) -> Iterator[tuple[str, str]]:
    """Part and key of every weight that gets a difference: the matrices of the transformers' attention and MLPs."""
    for part in PREFIXES:
        for key, value in parts[part].items():
            inside = ".transformer_blocks." in key or ".encoder.layers." in key
            if inside and key.endswith(".weight") and value.ndim == 2:
                yield part, key


def lora_name(part: str, key: str) -> str:
    """The name of a weight's difference."""
    return PREFIXES[part] + key.removesuffix(".weight").replace(".", "_")


@torch.no_grad()
def extract_lora(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int) -> State:
    """The best low-rank difference from `base` to `tuned`, by singular value decomposition.

    Args:
        base, tuned: CompVis state dicts of one kind of model.
        rank: of every layer, less where a layer is smaller.

    Raises:
        UserError: the two are of different kinds, or the rank is not positive.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: expected 1 or more")
    before, after = to_diffusers(base), to_diffusers(tuned)
    lora: State = {}
    for part, key in lora_layers(after):
        if key not in before[part] or before[part][key].shape != after[part][key].shape:
            raise UserError(f"'{key}' is not the same layer in both checkpoints: they are different kinds of model")
        down, up = factors(after[part][key].float() - before[part][key].float(), rank)
        name = lora_name(part, key)
        lora |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(len(down))),
        }
    return lora


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down (rank, n)` and `up (m, rank)` whose product is the nearest matrix of that rank to (m, n)."""
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


@torch.no_grad()
def merge_lora(state: Mapping[str, Tensor], lora: Mapping[str, Tensor], strength: float = 1.0) -> int:
    """Add a LoRA file's differences to a CompVis state dict, in place; how many layers it changed.

    Raises:
        UserError: a layer that the model does not have, or of another shape.
    """
    parts = to_diffusers(state)  # they share the memory of the weights
    weights = {lora_name(part, key): parts[part][key] for part, key in lora_layers(parts)}
    names = {key.rsplit(".lora_", 1)[0] for key in lora if ".lora_" in key}
    if not names:
        raise UserError("the LoRA file holds no `lora_up` and `lora_down`")
    for name in sorted(names):
        down, up = lora[f"{name}.lora_down.weight"].float(), lora[f"{name}.lora_up.weight"].float()
        if name not in weights or weights[name].shape != (len(up), down.shape[1]):
            raise UserError(f"'{name}' of the LoRA is no layer of this model")
        scale = strength * float(lora.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
        weights[name] += (scale * (up @ down)).to(weights[name])
    return len(names)


# ---- the adapters of a LoRA run -------------------------------------------------------------------------------


def adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """The layers that have adapters; none in a plain model's state dict."""
    return [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]


@torch.no_grad()
def merge_adapters(state: Mapping[str, Tensor], alpha: float) -> State:
    """A LoRA run's state dict as that of a plain model, whose weights have the adapters added; the old one stays."""
    merged = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    for layer in adapted_layers(state):
        down, up, weight = state[layer + DOWN].float(), state[layer + UP].float(), merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (weight.float() + up @ down * (alpha / len(down))).to(weight)
    return merged


def adapters_alone(state: Mapping[str, Tensor], alpha: float) -> State:
    """The adapters of a LoRA run's state dict as a LoRA file's tensors."""
    keys = [key.replace(".base_layer.", ".") for key in state if key.startswith(UNET) and ".lora_" not in key]
    unet, lora = unet_names(key.removeprefix(UNET) for key in keys), State()
    for layer in adapted_layers(state):
        ours = f"{layer}.weight"
        if layer.startswith(UNET):
            name = lora_name("unet", unet[ours.removeprefix(UNET)])
        else:
            name = lora_name("text_encoder", ours.removeprefix(CLIP_TEXT))
        lora |= {
            f"{name}.lora_down.weight": state[layer + DOWN],
            f"{name}.lora_up.weight": state[layer + UP],
            f"{name}.alpha": torch.tensor(alpha),
        }
    return lora
