"""Our weights and configs under the names that diffusers has for them, and back.

The weights are the same tensors under other names; a 1x1 convolution of the autoencoder's attention
is a linear layer there. Folders with them are read and written by `pipeline_folder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoints.layouts import UNET, VAE
from ldm.errors import UserError
from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.names import count, open_clip_to_transformers, transformers_to_open_clip

State = dict[str, Tensor]

CLIP_TEXT, OPEN_CLIP_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
# What diffusers called these before 0.17, in folders that are still around.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# ---- the UNet ------------------------------------------------------------------------------------


def unet_modules(keys: Iterable[str]) -> dict[str, str]:
    """Our name of every module that has a name of its own in diffusers -> that name; from a UNet's
    keys alone.
    """
    keys = set(keys)
    modules = {**UNET_ENDS}
    modules |= {
        f"middle_block.{n}": f"mid_block.{name}"
        for n, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }

    level = block = 0
    for n in range(1, count(keys, "input_blocks")):
        if f"input_blocks.{n}.0.op.weight" in keys:
            modules[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            level, block = level + 1, 0
            continue
        modules[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{block}"
        modules[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{block}"
        block += 1

    level = block = 0
    for n in range(count(keys, "output_blocks")):
        modules[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{block}"
        modules[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{block}"
        block += 1
        for place in (1, 2):  # after the attention, where there is one
            if f"output_blocks.{n}.{place}.conv.weight" in keys:
                modules[f"output_blocks.{n}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
                level, block = level + 1, 0
    return modules


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Our key of every tensor of a UNet -> diffusers' key."""
    keys = list(keys)
    modules = unet_modules(keys)
    return {key: _renamed(key, modules, RESNET) for key in keys}


def _renamed(key: str, modules: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """The key with its longest known beginning replaced, and what is inside a residual block."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (head := modules.get(".".join(parts[:n]))) is not None:
            rest = ".".join(parts[n:])
            if ".resnets." in head:
                module, _, kind = rest.rpartition(".")
                rest = f"{inside.get(module, module)}.{kind}"
            return f"{head}.{rest}"
    raise UserError(f"'{key}': not a tensor of a Stable Diffusion UNet or autoencoder")


# ---- the autoencoder -----------------------------------------------------------------------------


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Our key of every tensor of an autoencoder -> diffusers' key."""
    keys = list(keys)
    levels = count((key.removeprefix("decoder.") for key in keys), "up")
    return {key: _vae_name(key, levels) for key in keys}


def _vae_name(key: str, levels: int) -> str:
    key = re.sub(r"^encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_blocks.\1.resnets.\2", key)
    key = re.sub(
        r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", key
    )

    def up(part: str) -> Any:  # levels are counted from the latents there, from the pixels here
        return lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.{part}"

    key = re.sub(r"^decoder\.up\.(\d+)\.block\.", up("resnets."), key)
    key = re.sub(r"^decoder\.up\.(\d+)\.upsample\.", up("upsamplers.0."), key)
    key = re.sub(r"\.mid\.block_(\d)", lambda found: f".mid_block.resnets.{int(found[1]) - 1}", key)
    key = re.sub(
        r"\.mid\.attn_1\.(\w+)",
        lambda found: f".mid_block.attentions.0.{VAE_ATTENTION[found[1]]}",
        key,
    )
    key = key.replace(".nin_shortcut.", ".conv_shortcut.")
    return re.sub(r"^(encoder|decoder)\.norm_out", r"\1.conv_norm_out", key)


def _is_matrix(key: str, value: Tensor) -> bool:
    """Whether a tensor of diffusers' autoencoder is a matrix of its attention, a 1x1 convolution
    here.
    """
    return (
        ".mid_block.attentions.0." in key
        and key.endswith("weight")
        and "group_norm" not in key
        and value.ndim == 2
    )


# ---- whole models --------------------------------------------------------------------------------


def to_diffusers(state: Mapping[str, Tensor], layer_left_out: int = 1) -> dict[str, State]:
    """A CompVis state dict as the parts `unet`, `vae` and `text_encoder` of a pipeline.

    Args:
        layer_left_out: blocks at the end of an open_clip text tower that are not read (1 for
            "penultimate").

    Raises:
        UserError: a tensor that a Stable Diffusion model does not have.
    """
    unet, vae = part(state, UNET), part(state, VAE)
    names = unet_names(unet)
    parts = {"unet": {names[key]: value for key, value in unet.items()}}
    names, parts["vae"] = vae_names(vae), {}
    for key, value in vae.items():
        value = value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value
        parts["vae"][names[key]] = value
    if text := part(state, CLIP_TEXT):
        parts["text_encoder"] = {
            key: value for key, value in text.items() if not key.endswith("position_ids")
        }
    else:
        parts["text_encoder"] = open_clip_to_transformers(
            part(state, OPEN_CLIP_TEXT), layer_left_out
        )
    return parts


def from_diffusers(parts: Mapping[str, State], ours: Iterable[str]) -> State:
    """The parts of a pipeline under our keys.

    Args:
        ours: the keys of our model, which say what the names stand for.

    Raises:
        UserError: a tensor that our model does not have.
    """
    ours = list(ours)
    unet, vae = ([key.removeprefix(p) for key in ours if key.startswith(p)] for p in (UNET, VAE))
    out = _back(parts["unet"], unet_names(unet), UNET)
    modern = {_modern(key): value for key, value in parts["vae"].items()}
    convolutions = {
        key: value[..., None, None] if _is_matrix(key, value) else value
        for key, value in modern.items()
    }
    out |= _back(convolutions, vae_names(vae), VAE)
    text = {
        key: value
        for key, value in parts["text_encoder"].items()
        if not key.endswith("position_ids")
    }
    if any(key.startswith(CLIP_TEXT) for key in ours):
        text = {
            key if key.startswith("text_model.") else f"text_model.{key}": value
            for key, value in text.items()
        }
        return out | {CLIP_TEXT + key: value for key, value in text.items()}
    return out | {
        OPEN_CLIP_TEXT + key: value for key, value in transformers_to_open_clip(text).items()
    }


def with_names_of_text_encoder(
    state: Mapping[str, Tensor], wanted: Iterable[str]
) -> Mapping[str, Tensor]:
    """Return a model's tensors with its text encoder under the names that are `wanted`: open_clip's
    or transformers'.

    Some programs write Stable Diffusion 2 with transformers' names.
    """
    wanted = list(wanted)
    text, open_clip_text = part(state, CLIP_TEXT), part(state, OPEN_CLIP_TEXT)
    rest = {
        key: value
        for key, value in state.items()
        if not key.startswith((CLIP_TEXT, OPEN_CLIP_TEXT))
    }
    wants_open_clip = any(key.startswith(OPEN_CLIP_TEXT) for key in wanted)
    wants_transformers = any(key.startswith(CLIP_TEXT) for key in wanted)
    if (
        wants_open_clip
        and "text_model.embeddings.token_embedding.weight" in text
        and not open_clip_text
    ):
        renamed = transformers_to_open_clip(text)
        return rest | {OPEN_CLIP_TEXT + key: value for key, value in renamed.items()}
    if wants_transformers and "token_embedding.weight" in open_clip_text and not text:
        renamed = open_clip_to_transformers(open_clip_text)
        return rest | {CLIP_TEXT + key: value for key, value in renamed.items()}
    return state


def vae_from_diffusers(state: Mapping[str, Tensor], ours: Iterable[str]) -> State:
    """Return an autoencoder's tensors under our names; one that has them already as it is.

    Args:
        ours: the names of our autoencoder's tensors, which say what theirs stand for.
    """
    if not any(".down_blocks." in key or ".up_blocks." in key for key in state):
        return dict(state)
    networks = [
        key
        for key in ours
        if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    ]
    names = {theirs: key for key, theirs in vae_names(networks).items()}
    modern = {_modern(key): value for key, value in state.items()}
    return {
        names.get(key, key): value[..., None, None] if _is_matrix(key, value) else value
        for key, value in modern.items()
    }


def _back(theirs: State, names: Mapping[str, str], prefix: str) -> State:
    ours = {new: key for key, new in names.items()}
    for key in theirs:
        if key not in ours:
            raise UserError(f"'{key}' of the pipeline has no place in this config's model")
    return {prefix + ours[key]: value for key, value in theirs.items()}


def part(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose keys start with `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _modern(key: str) -> str:
    if "mid_block.attentions.0." not in key:
        return key
    head, name, kind = key.rsplit(".", 2)
    return f"{head}.{OLD_VAE_ATTENTION[name]}.{kind}" if name in OLD_VAE_ATTENTION else key


# ---- configs -------------------------------------------------------------------------------------


def unet_config(params: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """`unet/config.json` of a `UNetModel`'s params."""
    widths = [mult * params["model_channels"] for mult in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    head = params.get("num_head_channels", -1)
    heads = params["num_heads"] if head == -1 else [width // head for width in widths]
    scales = params.get("use_scale_shift_norm", False)
    return {
        **({"resnet_time_scale_shift": "scale_shift"} if scales else {}),
        "_class_name": "UNet2DConditionModel",
        "sample_size": image_size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "transformer_layers_per_block": params.get("transformer_depth", 1),
        "cross_attention_dim": params["context_dim"],
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "use_linear_projection": params.get("use_linear_in_transformer", False),
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "center_input_sample": False,
    }


def vae_config(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """`vae/config.json` of an `AutoencoderKL`'s params."""
    dd = params["ddconfig"]
    if dd.get("attn_resolutions"):
        raise UserError(
            "first_stage_config: diffusers' AutoencoderKL attends in the middle only "
            "(attn_resolutions: [])"
        )
    widths = [mult * dd["ch"] for mult in dd["ch_mult"]]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": dd["resolution"],
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "latent_channels": params["embed_dim"],
        "block_out_channels": widths,
        "layers_per_block": dd["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": scale_factor,
    }


def text_config(embedder: Any) -> dict[str, Any]:
    """`text_encoder/config.json` of one of our text encoders."""
    if isinstance(embedder, FrozenCLIPEmbedder):
        return {
            **embedder.transformer.text_model.config.to_dict(),
            "architectures": ["CLIPTextModel"],
        }
    model, left_out = embedder.model, embedder.blocks_left_out
    block = model.transformer.resblocks[0]
    width = model.ln_final.normalized_shape[0]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": model.token_embedding.num_embeddings,
        "hidden_size": width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": model.text_projection.shape[1],
        "num_hidden_layers": len(model.transformer.resblocks) - left_out,
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": model.context_length,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.START,
        "eos_token_id": tokenizer.END,
        "pad_token_id": 1,
    }


# Our names and theirs; our linear is linear in sqrt(beta).
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `scheduler/scheduler_config.json`: DDIM at our steps, with our ends."""
    name = params.get("beta_schedule", "linear")
    if name not in BETA_SCHEDULES:
        raise UserError(f"beta_schedule: diffusers has no counterpart of '{name}'")
    terminal = bool(params.get("zero_terminal_snr"))
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
        "beta_schedule": BETA_SCHEDULES[name],
        "prediction_type": PREDICTIONS[params.get("parameterization", "eps")],
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "timestep_spacing": "trailing" if terminal else "leading",
        **({"rescale_betas_zero_snr": True} if terminal else {}),
    }
