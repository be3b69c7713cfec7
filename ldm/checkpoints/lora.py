"""Low-rank differences: trained, or of two checkpoints, in the format that kohya's scripts, web UIs
and diffusers load.

A layer W of the fine-tuned model is W_base + up @ down x alpha / rank (Hu et al., 2106.09685). The
names are those of diffusers' modules with underscores for dots:
`lora_unet_{module}.lora_down.weight`, `lora_te_{module}...`. What other programs call them is in
`lora_formats`.

The checkpoints of a LoRA run have peft's names: an adapted layer's own weights are under
`{layer}.base_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.diffusers_format import (
    CLIP_TEXT,
    OPEN_CLIP_TEXT,
    UNET,
    VAE,
    part,
    to_diffusers,
    unet_names,
)
from ldm.checkpoints.lora_formats import LowRank, parse_lora, place
from ldm.errors import UserError
from ldm.modules.adapters import DOWN, UP
from ldm.modules.encoders.names import open_clip_to_transformers

State = dict[str, Tensor]
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
TEXT_WIDTHS = {768: "1", 1024: "2", 2048: "XL"}

# ---- extracting
# -----------------------------------------------------------------------------------------------


def lora_layers(parts: Mapping[str, State]) -> Iterator[tuple[str, str]]:
    """Yield part and key of every weight that can get a difference: linear layers and
    convolutions.
    """
    for part_name in PREFIXES:
        for key, value in parts[part_name].items():
            if key.endswith(".weight") and value.ndim in (2, 4) and ".embeddings." not in key:
                yield part_name, key


def lora_name(part: str, key: str) -> str:
    """Return the name of a weight's difference."""
    return PREFIXES[part] + key.removesuffix(".weight").replace(".", "_")


@torch.no_grad()
def extract_lora(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int) -> State:
    """Return the best low-rank difference from `base` to `tuned` of every layer that differs.

    Args:
        base, tuned: CompVis state dicts of one kind of model.
        rank: of every layer, less where a layer is smaller.

    Raises:
        UserError: the two are of different kinds or the same, or the rank is not positive.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: expected 1 or more")
    before, after = to_diffusers(base), to_diffusers(tuned)
    lora: State = {}
    for part_name, key in lora_layers(after):
        old, new = before[part_name].get(key), after[part_name][key]
        if old is None or old.shape != new.shape:
            raise UserError(
                f"'{key}' is not the same layer in both checkpoints: they are different kinds "
                "of model"
            )
        if not differs(old, new):
            continue
        difference = new.float() - old.float()
        if not difference.isfinite().all():
            raise UserError(f"'{key}' has values that are no numbers: the weights are broken")
        down, up = factors(difference, rank)
        name = lora_name(part_name, key)
        lora |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(len(down))),
        }
    if not lora:
        raise UserError("no layer differs between the two checkpoints: there is no LoRA to extract")
    return lora


def differs(old: Tensor, new: Tensor) -> bool:
    """Return whether a weight has changed, other than by rounding to the precision of the new
    one.
    """
    return not torch.equal(old.to(new.dtype), new)


def not_in_lora(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[str]:
    """Return our keys of what differs between two checkpoints and has no place in a LoRA file.

    These are biases, norms and embeddings, and the whole autoencoder.
    """
    networks = (UNET, CLIP_TEXT, OPEN_CLIP_TEXT, VAE)
    changed = [
        key
        for key, new in tuned.items()
        if key.startswith(networks)
        and new.is_floating_point()
        and key in base
        and differs(base[key], new)
    ]
    return [key for key in changed if not _has_place(key, tuned[key])]


def _has_place(key: str, value: Tensor) -> bool:
    """Return whether a LoRA can hold a tensor's difference."""
    is_layer = key.endswith((".weight", ".in_proj_weight")) and value.ndim in (2, 4)
    return (
        is_layer
        and not key.startswith(VAE)
        and "token_embedding" not in key
        and "position_embedding" not in key
    )


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `down` and `up` whose product is the nearest of that rank to a difference.

    Args:
        difference: (m, n) of a linear layer, (m, n, h, w) of a convolution.

    Returns:
        `down` (rank, n) and `up` (m, rank); of a convolution (rank, n, h, w) and (m, rank, 1, 1).
    """
    u, s, v = _singular(difference.flatten(1))
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:rank], u[:, :rank] * root
    if difference.ndim == 4:
        down, up = down.unflatten(1, difference.shape[1:]), up[:, :, None, None]
    return down.contiguous(), up.contiguous()


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition u, s, v of a matrix (m, n): matrix = u @ diag(s) @
    v.
    """
    m, n = matrix.shape
    if n < 4 * m:
        return torch.linalg.svd(matrix, full_matrices=False)
    # A convolution's matrix is wide. u and s are then cheaper from the small matrix of its rows'
    # products, in float64, in which the squares of the singular values keep the digits of float32.
    matrix = matrix.double()
    squares, u = torch.linalg.eigh(matrix @ matrix.T)
    squares, u = squares.flip(0).clamp(min=0), u.flip(1)
    s = squares.sqrt()
    v = (u.T @ matrix) / s.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return u.float(), s.float(), v.float()


# ---- merging
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_lora(
    state: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    strength: float = 1.0,
    path: str | Path = "the LoRA file",
) -> int:
    """Add a LoRA file's differences to a CompVis state dict, in place; return how many layers
    changed.

    Nothing changes unless all of the file fits.

    Raises:
        UserError: a file that is not read, a layer that the model does not have, or one of another
            shape; alphas that are all 0.
    """
    differences = parse_lora(lora, path)
    # Each difference is scaled by alpha / rank: the merged model would be the old one.
    if all(difference.alpha == 0 for difference in differences):
        raise UserError(
            f"{path}: alpha is 0 in every layer, so that this LoRA changes nothing; set it to the "
            "rank, or write the file again"
        )
    weights = weights_by_name(state)
    # Check every layer before the first one changes.
    targets = [find_weight(weights, difference, differences, path) for difference in differences]
    names = [difference.layer for difference in differences]
    if len({id(target) for target in targets}) < len(targets):
        raise UserError(f"{path}: two differences of one layer: {', '.join(names[:3])}")
    for weight, difference in zip(targets, differences):
        change = strength * difference.difference()
        weight.copy_(weight.float() + change.reshape(weight.shape))
    return len(targets)


def weights_by_name(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of a model's layers by network and name, diffusers' and ours, underscores
    for dots.

    The tensors share the memory of the state dict's.
    """
    unet = part(state, UNET)
    spellings = [(ours, theirs) for ours, theirs in unet_names(unet).items()]
    named = [(name, unet[ours]) for ours, theirs in spellings for name in (theirs, ours)]
    text = part(state, CLIP_TEXT)
    if not text and (tower := part(state, OPEN_CLIP_TEXT)):
        text = open_clip_to_transformers(tower)
    return {"unet": _layers(named), "text_encoder": _layers(text.items())}


def _layers(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of linear layers and convolutions, by the names of their layers."""
    return {
        place(key.removesuffix(".weight"))[1]: value
        for key, value in named
        if key.endswith(".weight") and value.ndim in (2, 4) and ".embeddings." not in key
    }


def find_weight(
    weights: Mapping[str, Mapping[str, Tensor]],
    wanted: LowRank,
    all_of_it: Sequence[LowRank],
    path: str | Path,
) -> Tensor:
    """Return the weight that a difference is of; raises a `UserError` if the model has none of
    that name and shape.
    """
    network, name = place(wanted.layer)
    candidates = [weights[network]] if network else list(weights.values())
    weight = next((layers[name] for layers in candidates if name in layers), None)
    if weight is None:
        raise UserError(
            f"{path}: '{wanted.layer}' of the LoRA is no layer of this model{_made_for(all_of_it)}"
        )
    shape = wanted.shape
    if weight.shape[:2] != shape[:2] or weight.shape[2:].numel() != shape[2:].numel():
        raise UserError(
            f"{path}: '{wanted.layer}' of the LoRA is no layer of this model: it is {list(shape)}, "
            f"the model's {list(weight.shape)}{_made_for(all_of_it)}"
        )
    return weight


def _made_for(differences: Sequence[LowRank]) -> str:
    """Return which Stable Diffusion a LoRA is for, as the width of the text that its attention
    reads says.
    """
    widths = {
        d.down.shape[1]
        for d in differences
        if re.search(r"attn2[._](processor\.)?to_[kv]$", d.layer)
    }
    kinds = [TEXT_WIDTHS[width] for width in widths if width in TEXT_WIDTHS]
    return f" (the file is for Stable Diffusion {kinds[0]})" if len(kinds) == 1 else ""


# ---- the adapters of a LoRA run
# -------------------------------------------------------------------------------


def adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Return the layers that have adapters; none in a plain model's state dict."""
    return [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]


@torch.no_grad()
def merge_adapters(state: Mapping[str, Tensor], alpha: float) -> State:
    """Return a LoRA run's state dict as that of a plain model, its adapters added to the
    weights; the old one stays.
    """
    merged = {
        key.replace(".base_layer.", "."): value
        for key, value in state.items()
        if ".lora_" not in key
    }
    for layer in adapted_layers(state):
        down, up, weight = (
            state[layer + DOWN].float(),
            state[layer + UP].float(),
            merged[f"{layer}.weight"],
        )
        merged[f"{layer}.weight"] = (weight.float() + up @ down * (alpha / len(down))).to(weight)
    return merged


def adapters_alone(state: Mapping[str, Tensor], alpha: float) -> State:
    """Return the adapters of a LoRA run's state dict as a LoRA file's tensors."""
    keys = [
        key.replace(".base_layer.", ".")
        for key in state
        if key.startswith(UNET) and ".lora_" not in key
    ]
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
