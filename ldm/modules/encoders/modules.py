"""Text encoders: a list of strings becomes the sequence of embeddings that the UNet reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.errors import UserError, nearest
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
        ckpt_path: initial weights, from a training of `ldm.models.clip.CLIP`.
        device: accepted for older configs, without effect: the module follows its parent.
    """

    def __init__(
        self,
        version: str = CLIP_VIT_L_14,
        device: str | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        use_checkpoint: bool = False,
        ckpt_path: str | None = None,
    ):
        super().__init__()
        self.max_length = max_length
        text_model = _build_text_model(version, text_config)
        if max_length > (limit := text_model.config.max_position_embeddings):
            raise UserError(f"cond_stage_config: max_length {max_length} exceeds max_position_embeddings {limit}")
        if text_model.config.vocab_size <= END:
            raise UserError(f"cond_stage_config: vocab_size {text_model.config.vocab_size} is below CLIP's {END + 1}")
        if use_checkpoint:
            _checkpoint_activations(text_model)
        # Checkpoints hold the ids as a buffer; transformers stopped saving it.
        text_model.embeddings.register_buffer("position_ids", text_model.embeddings.position_ids, persistent=True)
        # transformers 5 has no `text_model` level any more; the checkpoint's keys do.
        self.transformer = nn.Module()
        self.transformer.text_model = text_model
        if ckpt_path is not None:
            from ldm.checkpoint import load_state, read_checkpoint, state_dict_of
            from ldm.models.clip import text_tower

            state = state_dict_of(read_checkpoint(ckpt_path), ckpt_path)
            load_state(self, text_tower(state, ckpt_path), ckpt_path)

    def tokenize(self, text: Sequence[str]) -> Int[Tensor, "b n"]:
        """Token ids of the texts, on the CPU."""
        return tokenize(text, self.max_length)

    def forward(self, text: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Embeddings of the texts, (b, max_length, hidden_size)."""
        text_model: Any = self.transformer.text_model
        tokens = self.tokenize(text).to(text_model.embeddings.position_ids.device)
        return text_model(input_ids=tokens).last_hidden_state

    encode = forward


def _checkpoint_activations(text_model: Any) -> None:
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
            raise UserError(f"cond_stage_config.version: cannot load the {kind} '{version}': {error}") from error
    fields = dict(text_config or {})
    accepted = set(CLIPTextConfig().to_dict())
    for key in fields:
        if key not in accepted:
            raise UserError(f"cond_stage_config.text_config.{key}: unknown field{nearest(key, accepted)}")
    return CLIPTextModel(CLIPTextConfig(**{**CLIP_VIT_L_14_TEXT, **fields}))
