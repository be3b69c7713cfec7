"""The same text transformer under open_clip's names and under transformers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def count(keys: Iterable[str], name: str) -> int:
    """Count how many `name.0.`, `name.1.`, ... the keys begin with."""
    numbered = re.compile(rf"{re.escape(name)}\.(\d+)\.")
    matches = [numbered.match(key) for key in keys]
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def open_clip_to_transformers(state: Mapping[str, Tensor], leave_out: int = 0) -> State:
    """Rename open_clip's text tower as transformers does, without the last `leave_out` blocks."""
    blocks = count(state, "transformer.resblocks") - leave_out
    out: State = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        out[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    for number in range(blocks):
        ours, theirs = f"transformer.resblocks.{number}.", f"text_model.encoder.layers.{number}."
        for kind in ("weight", "bias"):
            for name, new in OPEN_CLIP_BLOCK.items():
                out[f"{theirs}{new}.{kind}"] = state[f"{ours}{name}.{kind}"]
            for part, piece in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3)):
                out[f"{theirs}self_attn.{part}_proj.{kind}"] = piece.contiguous()
    return out


def transformers_to_open_clip(state: Mapping[str, Tensor]) -> State:
    """Rename it back; blocks that transformers' model does not have stay missing."""
    prefix = "text_model."
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    out: State = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
    for number in range(count(state, "encoder.layers")):
        ours, theirs = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            for name, new in OPEN_CLIP_BLOCK.items():
                out[f"{ours}{name}.{kind}"] = state[f"{theirs}{new}.{kind}"]
            out[f"{ours}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    return out
