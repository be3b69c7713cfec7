"""Text encoders: a list of strings becomes the sequence of embeddings that the UNet reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ParameterError, nearest
from ldm.modules.encoders.tokenizer import END, START, tokenize

CLIP_VIT_L_14 = "openai/clip-vit-large-patch14"
# The text tower of CLIP ViT-L/14: the fields of transformers' CLIPTextConfig.
CLIP_VIT_L_14_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's text transformer; its last hidden state after the final norm is the conditioning.

    The name is CompVis's; whether it is frozen is up to `LatentDiffusion.cond_stage_trainable`.

    Args:
        version: the default builds CLIP ViT-L/14's tower without weights, which a Stable Diffusion
            checkpoint then fills. A local folder or another hub name is loaded by transformers.
        text_config: fields of transformers' `CLIPTextConfig` that replace ViT-L/14's.
        max_length: tokens a text is padded or cut to.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
        ckpt_path: a file of initial weights, for who builds the model (`ldm.checkpoints.parts.load_parts`).
    """

    def __init__(
        self,
        version: str = CLIP_VIT_L_14,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        use_checkpoint: bool = False,
        ckpt_path: str | None = None,
    ):
        super().__init__()
        self.max_length = max_length
        self.added_words: dict[str, list[int]] = {}  # beside the vocabulary's: the ids that each stands for
        text_model = _build_text_model(version, text_config)
        if max_length > (limit := text_model.config.max_position_embeddings):
            raise ParameterError("max_length", f"{max_length} exceeds max_position_embeddings {limit}")
        if text_model.config.vocab_size <= END:
            raise ParameterError("vocab_size", f"{text_model.config.vocab_size} is below CLIP's {END + 1}")
        if use_checkpoint:
            recompute_activations(text_model)
        # Checkpoints hold the ids as a buffer; transformers stopped saving it.
        text_model.embeddings.register_buffer("position_ids", text_model.embeddings.position_ids, persistent=True)
        # transformers 5 has no `text_model` level any more; the checkpoint's keys do.
        self.transformer = nn.Module()
        self.transformer.text_model = text_model
        self.ckpt_path = ckpt_path

    def tokenize(self, text: Sequence[str]) -> Int[Tensor, "b n"]:
        """Token ids of the texts, on the CPU."""
        return tokenize(text, self.max_length, added=self.added_words)

    def forward(self, text: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Embeddings of the texts, (b, max_length, hidden_size)."""
        text_model: Any = self.transformer.text_model
        tokens = self.tokenize(text).to(text_model.embeddings.position_ids.device)
        return text_model(input_ids=tokens).last_hidden_state

    encode = forward

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.transformer.text_model.embeddings.token_embedding  # type: ignore[union-attr,return-value]


LAYERS = {"last": 0, "penultimate": 1}  # blocks at the end that are left out


class FrozenOpenCLIPEmbedder(nn.Module):
    """The text transformer of an open_clip model, as Stable Diffusion 2 reads it: ViT-H's penultimate layer.

    Args:
        arch: a model that open_clip has a config of. Nothing is downloaded: a checkpoint fills the weights.
        layer: last, or penultimate, whose output goes through the final norm, too.
        max_length: tokens a text is padded (with 0) or cut to.
        text_config: open_clip's text fields that replace those of `arch`.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        arch: str = "ViT-H-14",
        max_length: int = 77,
        layer: str = "penultimate",
        text_config: Mapping[str, Any] | None = None,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if layer not in LAYERS:
            hint = nearest(layer, list(LAYERS))
            raise ParameterError("layer", f"unknown '{layer}'{hint}; accepted: {', '.join(LAYERS)}")
        self.max_length, self.blocks_left_out = max_length, LAYERS[layer]
        self.added_words: dict[str, list[int]] = {}  # as above
        self.model = _build_open_clip_text(arch, text_config)
        blocks = range(len(self.model.transformer.resblocks))
        left_out = [f"model.transformer.resblocks.{n}." for n in blocks[len(blocks) - self.blocks_left_out :]]
        # Weights that are there for other programs, and that nothing here reads.
        self.optional_keys = ("model.text_projection", "model.logit_scale", *left_out)
        if max_length > (limit := self.model.context_length):
            raise ParameterError("max_length", f"{max_length} exceeds context_length {limit}")
        self.model.transformer.grad_checkpointing = use_checkpoint

    def tokenize(self, text: Sequence[str]) -> Int[Tensor, "b n"]:
        """Token ids of the texts, on the CPU."""
        return tokenize(text, self.max_length, pad=0, added=self.added_words)

    def forward(self, text: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Embeddings of the texts, (b, max_length, width)."""
        model: Any = self.model
        tokens = self.tokenize(text).to(model.positional_embedding.device)
        n = tokens.shape[1]
        x = model.token_embedding(tokens) + model.positional_embedding[:n]
        mask = model.attn_mask[:n, :n].to(x.dtype)
        blocks = model.transformer.resblocks
        for block in blocks[: len(blocks) - self.blocks_left_out]:
            if model.transformer.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return model.ln_final(x)

    encode = forward

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.model.token_embedding


def recompute_activations(text_model: Any) -> None:
    """Make a text encoder of transformers recompute its activations in the backward pass instead of keeping them."""
    # transformers is renaming this method.
    enable = getattr(text_model, "activation_checkpointing_enable", None)
    if enable is None:
        text_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        enable()


def _build_text_model(version: str, text_config: Mapping[str, Any] | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    if version != CLIP_VIT_L_14 and text_config is None:
        try:
            return CLIPTextModel.from_pretrained(version)
        except OSError as error:
            kind = "folder" if Path(version).exists() else "hub model or local folder"
            raise ParameterError("version", f"cannot load the {kind} '{version}': {error}") from error
    fields = dict(text_config or {})
    accepted = set(CLIPTextConfig().to_dict())
    for key in fields:
        if key not in accepted:
            raise ParameterError(f"text_config.{key}", f"unknown field{nearest(key, accepted)}")
    return CLIPTextModel(CLIPTextConfig(**{**CLIP_VIT_L_14_TEXT, **fields}))


def _build_open_clip_text(arch: str, text_config: Mapping[str, Any] | None) -> Any:
    from open_clip import get_model_config, list_models
    from open_clip.model import CLIP

    config = get_model_config(arch)
    if config is None:
        raise ParameterError("arch", f"open_clip has no '{arch}'{nearest(arch, list_models())}")
    fields = {**config["text_cfg"], **(text_config or {})}
    # Its image tower is not read: a small one stands in for it until it goes.
    vision = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64, "head_width": 32}
    try:
        model = CLIP(config["embed_dim"], vision, fields, quick_gelu=config.get("quick_gelu", False))
    except TypeError as error:
        raise ParameterError("text_config", str(error)) from error
    del model.visual
    return model
