"""LoRA files of other programs: how they name a layer, where they keep its scale, and which kinds
are not read.

| written by | a key |
|---|---|
| sd-scripts, LyCORIS | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`, `.alpha` |
| the same, with LDM's names | `lora_unet_middle_block_1_proj_in.lora_down.weight` |
| diffusers, at first | `unet.mid_block...attn1.processor.to_q_lora.down.weight` |
| diffusers | `unet.mid_block...attn1.to_q.lora_A.weight`; scales in the header |
| peft | `base_model.model.mid_block...attn1.to_q.lora_A.weight`; scales in `adapter_config.json` |

All of them become one form: a `LowRank` for each layer.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# A key of a low-rank difference: the layer, then which of its factors. peft adds the adapter's
# name.
FACTOR = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<kohya>down|up|mid)"
    r"|[._]lora(?:_linear_layer)?\.(?P<diffusers>down|up)"
    r"|\.lora_(?P<peft>[AB])(?:\.(?P<adapter>(?!weight$)[^.]+))?)"
    r"\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
PEFT_FACTORS = {"A": "down", "B": "up"}

# What the names of layers begin with, and the network that each beginning says. Several may follow
# each other.
PREFIXES = {
    "base_model.model.": None,
    "lycoris_": None,
    "lora_unet_": "unet",
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
}
# Attention layers of the text encoder had the UNet's names in diffusers' first files.
OLD_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out_0": "out_proj"}

MERGE_ELSEWHERE = (
    "merge it with the program that made it, and take the merged model as the checkpoint"
)
ANOTHER_MODEL = "this project has no model that it fits"
# Keys that say more than a low-rank difference: a pattern, the kind's name, the way out. The first
# that fits counts.
NOT_READ = (
    (r"\.base_layer\.", "a LoRA run's checkpoint",
     "write its LoRA file first: scripts/convert.py --adapters"),
    (r"^lora_te[123]_|^text_encoder_[23]\.|add_embedding|label_emb",
     "a LoRA of Stable Diffusion XL",
     ANOTHER_MODEL),
    (r"(double|single|joint)_(transformer_)?blocks|^transformer\.|^lora_transformer_",
     "a LoRA of Flux or SD 3", ANOTHER_MODEL),
    (r"\.hada_", "a LoHa", MERGE_ELSEWHERE),
    (r"\.lokr_", "a LoKr", MERGE_ELSEWHERE),
    (r"\.dora_scale|lora_magnitude_vector", "a DoRA", MERGE_ELSEWHERE),
    (r"\.on_input$|\.ia3_l", "an (IA)3", MERGE_ELSEWHERE),
    (r"\.b?oft_", "an OFT", MERGE_ELSEWHERE),
    (r"\.[ab][12]\.weight$", "a GLoRA", MERGE_ELSEWHERE),
    (r"\.[wb]_norm$", "a LyCORIS file with differences of norms", MERGE_ELSEWHERE),
    (r"\.diff(_b)?$", "a LyCORIS file with differences of whole layers", MERGE_ELSEWHERE),
    (r"^bundle_emb\.", "a LoRA with embeddings inside", MERGE_ELSEWHERE),
    (r"\.lora_embedding_", "a LoRA of token embeddings", MERGE_ELSEWHERE),
    (r"\.modules_to_save\.|\.lora_[AB](\.[^.]+)?\.bias$", "a LoRA with trained layers or biases",
     MERGE_ELSEWHERE),
    (r"^(unet|text_encoder):\d", "a LoRA of cloneofsimo/lora", MERGE_ELSEWHERE),
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """One layer's difference, of low rank (Hu et al., 2106.09685).

    Args:
        layer: its name, as the file has it.
        down, up: (rank, n), (m, rank) of a linear layer; of a convolution (rank, n, h, w), (m,
        rank, 1, 1).
        mid: (rank, rank, h, w) of a convolution that was split into three; `down` is then (rank, n,
            1, 1).
        alpha: the difference is scaled by alpha / rank.
    """

    layer: str
    down: Tensor
    up: Tensor
    mid: Tensor | None
    alpha: float

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the difference: (m, n), of a convolution (m, n, h, w)."""
        kernel = self.down if self.mid is None else self.mid
        return torch.Size([len(self.up), self.down.shape[1], *kernel.shape[2:]])

    def difference(self) -> Tensor:
        """Return what the layer's weight gains: (m, n), of a convolution (m, n, h, w)."""
        down, up = self.down.float(), self.up.float().flatten(1)
        if self.mid is None:
            product = (up @ down.flatten(1)).unflatten(1, down.shape[1:])
        else:
            product = torch.einsum("os,srhw,ri->oihw", up, self.mid.float(), down.flatten(1))
        return product * (self.alpha / len(down))


# ---- from keys to layers
# ------------------------------------------------------------


def check_kind(keys: Iterable[str], path: str | Path) -> None:
    """Raise a `UserError` that names the kind of a file which is more than low-rank differences."""
    keys = list(keys)
    for pattern, kind, way_out in NOT_READ:
        key = next((key for key in keys if re.search(pattern, key)), None)
        if key is not None:
            raise UserError(f"{path}: {kind} ('{key}'), which is not read: {way_out}")


def parse_lora(tensors: Mapping[str, Tensor], path: str | Path = "the LoRA file") -> list[LowRank]:
    """Return the differences that a LoRA file's tensors stand for.

    Raises:
        UserError: a kind that is not read, a key that belongs to no difference, factors that do not
            fit together.
    """
    check_kind(tensors, path)
    factors, alphas, others = sort_keys(tensors)
    if not factors:
        kind = (
            "a whole model; "
            if any(key.startswith("model.diffusion_model.") for key in tensors)
            else ""
        )
        raise UserError(f"{path}: {kind}it holds no `lora_up` and `lora_down`")
    others += [key for layer, key in alphas.items() if layer not in factors]
    if others:
        raise UserError(
            f"{path}: {len(others)} keys are of no kind that is read, first '{others[0]}'"
        )
    found = []
    for layer, keys in factors.items():
        parts = {factor: tensors[key] for factor, key in keys.items()}
        check_factors(layer, parts, path)
        alpha = float(tensors[alphas[layer]]) if layer in alphas else float(len(parts["down"]))
        found.append(LowRank(layer, parts["down"], parts["up"], parts.get("mid"), alpha))
    return found


def sort_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Return the keys of factors by layer and factor, those of alphas by layer, and the others."""
    factors: dict[str, dict[str, str]] = {}
    alphas, others = {}, []
    for key in keys:
        if found := FACTOR.fullmatch(key):
            factor = found["kohya"] or found["diffusers"] or PEFT_FACTORS[found["peft"]]
            taken = factors.setdefault(found["layer"], {})
            if factor in taken:
                others.append(key)  # another adapter's
            taken.setdefault(factor, key)
        elif found := ALPHA.fullmatch(key):
            alphas[found["layer"]] = key
        else:
            others.append(key)
    return factors, alphas, others


def check_factors(layer: str, parts: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a `UserError` if a layer's factors are not a low-rank difference."""
    for factor in ("down", "up"):
        if factor not in parts:
            raise UserError(f"{path}: '{layer}' has no {factor}: the file is not whole")
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank = len(down) if down.ndim else 0
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and rank > 0 and up.shape[1] == rank
    fits = fits and math.prod(up.shape[2:]) == 1
    if mid is not None:
        fits = (
            fits
            and mid.ndim == 4
            and mid.shape[:2] == (rank, rank)
            and math.prod(down.shape[2:]) == 1
        )
    if not fits:
        shapes = ", ".join(f"{factor} {list(value.shape)}" for factor, value in parts.items())
        raise UserError(f"{path}: '{layer}': its factors do not fit together: {shapes}")
    if not all(value.isfinite().all() for value in parts.values()):
        raise UserError(f"{path}: '{layer}' has values that are not finite")


def place(layer: str) -> tuple[str | None, str]:
    """Return the network that a layer's name says, None if it says none, and the rest with
    underscores for dots.
    """
    network = None
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None):
        layer = layer.removeprefix(prefix)
        network = PREFIXES[prefix] or network
    name = layer.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    if name.endswith("_to_out"):
        name += "_0"
    head, _, last = name.rpartition("_self_attn_")
    if last in OLD_TEXT_LAYERS:
        name = f"{head}_self_attn_{OLD_TEXT_LAYERS[last]}"
    return network, name


# ---- files
# ------------------------------------------------------------

WEIGHTS_FILES = tuple(
    stem + suffix
    for stem in ("adapter_model", "pytorch_lora_weights")
    for suffix in (".safetensors", ".bin")
)
PEFT_CONFIG = "adapter_config.json"
# The entry of a safetensors header in which diffusers writes peft's config, each key behind its
# network's name.
DIFFUSERS_HEADER = "lora_adapter_metadata"


def read_lora(path: str | Path) -> State:
    """Return the tensors of a LoRA file or folder, with the alphas that its header or config says.

    A folder is one of peft (`adapter_model.safetensors`, perhaps in `unet/` and `text_encoder/`) or
    of diffusers (`pytorch_lora_weights.safetensors`).

    Raises:
        UserError: there is none, or its config is of a kind that is not read.
    """
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    found: State = {}
    for folder, prefix in (
        (path, ""),
        (path / "unet", "unet."),
        (path / "text_encoder", "text_encoder."),
    ):
        file = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
        if file is not None:
            found |= {prefix + key: value for key, value in read_file(file).items()}
    if not found:
        raise UserError(
            f"{path}: a folder without LoRA weights: expected {' or '.join(WEIGHTS_FILES)} in it"
        )
    return found


def read_file(path: Path) -> State:
    """Return a LoRA file's tensors, with the alphas that its header or the config beside it
    says.
    """
    tensors = state_dict_of(read_checkpoint(path), path)
    check_kind(tensors, path)
    beside = path.with_name(PEFT_CONFIG)
    if path.stem.startswith("adapter_model") and beside.is_file():
        return tensors | alphas_of(tensors, {None: read_json(beside)}, beside)
    header = header_of(path).get(DIFFUSERS_HEADER)
    if header:
        return tensors | alphas_of(tensors, by_network(json.loads(header)), path)
    factors, alphas, _ = sort_keys(tensors)
    if any(layer.startswith("base_model.model.") and layer not in alphas for layer in factors):
        log.warning(
            "%s: no %s beside it says the scale of this LoRA of peft's: it is taken as it is "
            "(alpha = rank)",
            path, PEFT_CONFIG,
        )  # fmt: skip
    return tensors


def by_network(header: Mapping[str, object]) -> dict[str | None, dict[str, Any]]:
    """Return diffusers' header, `{"unet.r": 4, ...}`, as a config of peft's for each network."""
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in header.items():
        network = next(
            (name for name in ("unet", "text_encoder") if key.startswith(f"{name}.")), None
        )
        configs.setdefault(network, {})[key.removeprefix(f"{network}.")] = value
    return configs


def alphas_of(
    tensors: Mapping[str, Tensor], configs: Mapping[str | None, Mapping[str, Any]], path: str | Path
) -> State:
    """Return the alpha of every layer that has none in the file, as peft's config of its network
    says.

    Args:
        configs: for `unet` and `text_encoder`, or one for both under None.

    Raises:
        UserError: a config of another kind than LoRA.
    """
    for config in configs.values():
        check_peft_config(config, path)
    factors, alphas, _ = sort_keys(tensors)
    found = {}
    for layer, keys in factors.items():
        if layer in alphas or "down" not in keys:
            continue
        network, _ = place(layer)
        config = configs.get(network) or configs.get(None) or {}
        rank = len(tensors[keys["down"]])
        alpha = pattern_value(
            config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", rank)
        )
        # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski, 2312.03732).
        found[f"{layer}.alpha"] = torch.tensor(
            float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
        )
    return found


def check_peft_config(config: Mapping[str, object], path: str | Path) -> None:
    """Raise a `UserError` that names what a config of peft's asks for beyond plain LoRA."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind}, which is not read: {MERGE_ELSEWHERE}")
    for key in ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "megatron_config"):
        if config.get(key):
            raise UserError(f"{path}: {key}: {config[key]}, which is not read: {MERGE_ELSEWHERE}")


def pattern_value(patterns: Mapping[str, object], layer: str, default: object) -> Any:
    """Return what the first of peft's patterns says that fits the end of a layer's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; raises a `UserError` if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def header_of(path: Path) -> dict[str, str]:
    """Return the texts in a safetensors file's header; none of other files."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
