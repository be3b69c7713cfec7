"""Text encoders: a list of strings becomes the sequence of embeddings that the UNet reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ParameterError, UserError, check_counts, check_share, nearest, under
from ldm.modules.encoders.tokenizer import (
    END,
    START,
    VOCABULARY,
    tokenize,
    transformers_tokenizer,
)
from ldm.modules.named_weights import NamedWeights
from ldm.rng import sent
from ldm.util import moved

# Of each kind of text encoder: the fields that count or measure something.
CLIP_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPEN_CLIP_COUNTS = ("width", "heads", "layers")
SHORTEST = 3  # tokens: the start, a word, the end
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


def __getattr__(name: str) -> Any:
    return moved(__name__, name)


class TextEncoder(nn.Module):
    """Turns texts into the embeddings that the UNet reads; the base of all text encoders.

    A subclass sets `max_length`, and gives `embed` and `token_embedding`.
    """

    max_length: int
    added_words: dict[str, list[int]]  # beside the vocabulary's: the ids that each stands for
    pad = END  # the token that fills a text up to `max_length`
    blocks_left_out = 0  # of the network's last ones, which nothing reads
    optional_keys: tuple[str, ...] = ()  # beginnings of keys that a checkpoint need not have

    def __init__(self) -> None:
        super().__init__()
        self.added_words = {}

    def forward(self, text: Sequence[str] | str) -> Float[Tensor, "b n d"]:
        """Return embeddings of the texts, (b, max_length, width)."""
        return self.embed(self.tokenize(text))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return embeddings of token ids, which may be on any device."""
        raise NotImplementedError

    def encode(self, text: Sequence[str] | str) -> Float[Tensor, "b n d"]:
        """Return embeddings of the texts."""
        return self(text)

    def tokenize(self, text: Sequence[str] | str) -> Int[Tensor, "b n"]:
        """Return token ids of the texts, on the CPU."""
        texts = [text] if isinstance(text, str) else text
        return tokenize(texts, self.max_length, self.pad, self.all_added_words())

    def all_added_words(self) -> dict[str, list[int]]:
        """Return `added_words`, and those that a script has added to `tokenizer`, if any."""
        used = vars(self).get("tokenizer")
        theirs = {} if used is None else used.get_added_vocab()
        return self.added_words | {
            word.lower(): [number] for word, number in theirs.items() if number >= VOCABULARY
        }

    @cached_property
    def tokenizer(self) -> Any:
        """Return transformers' `CLIPTokenizer`, for scripts.

        Words that they add to it are read, too.
        """
        return transformers_tokenizer(self.max_length, self.pad)

    @property
    def token_embedding(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        raise NotImplementedError

    def replace_token_embedding(self, layer: nn.Embedding) -> None:
        """Look tokens up in another layer from now on; raise a `UserError` if that cannot be."""
        raise UserError(f"{type(self).__name__}: this text encoder takes no new words")

    @property
    def device(self) -> torch.device:
        """Return where the weights are.

        Scripts set it, without effect: tokens follow the weights.
        """
        return self.token_embedding.weight.device

    @device.setter
    def device(self, device: torch.device | str) -> None:
        pass

    def freeze(self) -> None:
        """Leave the weights as they are, as scripts do that use the network alone."""
        self.eval().requires_grad_(False)


def embed_distinct(
    encode: Callable[[Sequence[str]], Float[Tensor, "n m d"]], texts: Sequence[str]
) -> Float[Tensor, "b m d"]:
    """Return embeddings of texts. Most of a batch are the same: each distinct one is read once."""
    distinct = list(dict.fromkeys(texts))
    embeddings = encode(distinct)
    rows = [distinct.index(text) for text in texts]
    return embeddings[torch.tensor(rows, device=embeddings.device)]


class TextTransformer(nn.Module):
    """CLIP's text model, one level down: a checkpoint's keys have that level, transformers 5
    not.
    """

    text_model: Any  # transformers' `CLIPTextModel`, whose import takes a second

    def __init__(self, text_model: nn.Module):
        super().__init__()
        self.text_model = text_model

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.text_model(*args, **kwargs)

    @property
    def config(self) -> Any:
        """Return the text model's `CLIPTextConfig`."""
        return self.text_model.config

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.text_model.device

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        return self.text_model.get_input_embeddings()


class FrozenCLIPEmbedder(TextEncoder):
    """CLIP's text transformer; its last hidden state after the final norm is the conditioning.

    The name is CompVis's; whether it is frozen is up to `LatentDiffusion.cond_stage_trainable`.

    Args:
        version: the default builds CLIP ViT-L/14's tower without weights, which a Stable Diffusion
            checkpoint then fills. A local folder or another hub name is loaded by transformers.
        text_config: fields of transformers' `CLIPTextConfig` that replace ViT-L/14's.
        max_length: tokens a text is padded or cut to.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
        ckpt_path: a file of initial weights, for who builds the model
            (`ldm.checkpoints.parts.load_parts`). Until then it refuses to compute.
    """

    def __init__(
        self,
        version: str = CLIP_VIT_L_14,
        max_length: int = 77,
        text_config: Mapping[str, object] | None = None,
        use_checkpoint: bool = False,
        ckpt_path: str | None = None,
    ):
        super().__init__()
        if max_length < SHORTEST:
            raise ParameterError("max_length", f"expected {SHORTEST} or more, got {max_length}")
        self.max_length = max_length
        text_model = _build_text_model(version, text_config)
        limit = text_model.config.max_position_embeddings
        if max_length > limit:
            raise ParameterError(
                "max_length", f"{max_length} exceeds max_position_embeddings {limit}"
            )
        check_vocabulary(text_model.config.vocab_size)
        if use_checkpoint:
            recompute_activations(text_model)
        # Checkpoints hold the ids as a buffer; transformers stopped saving it.
        text_model.embeddings.register_buffer(
            "position_ids", text_model.embeddings.position_ids, persistent=True
        )
        self.transformer = TextTransformer(text_model)
        self.ckpt_path = ckpt_path
        self.named_weights = NamedWeights(self, ckpt_path, (text_model,))

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return embeddings of token ids, (b, n, hidden_size)."""
        text_model: Any = self.transformer.text_model
        tokens = sent(tokens, text_model.embeddings.position_ids.device)
        return text_model(input_ids=tokens).last_hidden_state

    @property
    def token_embedding(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.transformer.text_model.embeddings.token_embedding

    def replace_token_embedding(self, layer: nn.Embedding) -> None:
        """Look tokens up in another layer from now on."""
        self.transformer.text_model.embeddings.token_embedding = layer


LAYERS = {"last": 0, "penultimate": 1}  # blocks at the end that are left out


class FrozenOpenCLIPEmbedder(TextEncoder):
    """The text transformer of an open_clip model, for Stable Diffusion 2: ViT-H's penultimate
    layer.

    Args:
        arch: a model that open_clip has a config of. No weights are downloaded: a checkpoint has
            them.
        layer: last, or penultimate, whose output goes through the final norm, too.
        max_length: tokens a text is padded (with 0) or cut to.
        text_config: open_clip's text fields that replace those of `arch`.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
    """

    pad = 0  # as Stable Diffusion 2 was trained; it is the token of "!"

    def __init__(
        self,
        arch: str = "ViT-H-14",
        max_length: int = 77,
        layer: str = "penultimate",
        text_config: Mapping[str, object] | None = None,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if layer not in LAYERS:
            hint = nearest(layer, list(LAYERS))
            raise ParameterError("layer", f"unknown '{layer}'{hint}; accepted: {', '.join(LAYERS)}")
        self.max_length, self.blocks_left_out = max_length, LAYERS[layer]
        self.model = _build_open_clip_text(arch, text_config)
        blocks = range(len(self.model.transformer.resblocks))
        left_out = [
            f"model.transformer.resblocks.{n}."
            for n in blocks[len(blocks) - self.blocks_left_out :]
        ]
        if len(blocks) <= self.blocks_left_out:
            raise ParameterError("layer", f"{layer} of {len(blocks)} leaves no layer to read")
        # Weights that are there for other programs, and that nothing here reads.
        self.optional_keys = ("model.text_projection", "model.logit_scale", *left_out)
        limit = self.model.context_length
        if max_length > limit:
            raise ParameterError("max_length", f"{max_length} exceeds context_length {limit}")
        check_vocabulary(self.model.token_embedding.num_embeddings)
        self.model.transformer.grad_checkpointing = use_checkpoint

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return embeddings of token ids, (b, n, width)."""
        model: Any = self.model
        tokens = sent(tokens, model.positional_embedding.device)
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

    @property
    def token_embedding(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.model.token_embedding

    def replace_token_embedding(self, layer: nn.Embedding) -> None:
        """Look tokens up in another layer from now on."""
        self.model.token_embedding = layer


def recompute_activations(text_model: Any) -> None:
    """Make transformers' text encoder recompute its activations in the backward pass."""
    # transformers is renaming this method.
    enable = getattr(text_model, "activation_checkpointing_enable", None)
    if enable is None:
        text_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        enable()


def check_text_config(
    fields: Mapping[str, object], counts: Sequence[str], dropout: str | None = None
) -> None:
    """Raise a `ParameterError` for a text encoder without layers or width, which libraries build.

    Args:
        counts: the fields that are 1 or more.
        dropout: the field that is a share.
    """
    with under("text_config"):
        check_counts(**{name: fields[name] for name in counts if name in fields})
        if dropout is not None and dropout in fields:
            check_share(dropout, fields[dropout])


def check_vocabulary(size: int) -> None:
    """Raise a `ParameterError` for a table of embeddings without a row for each of CLIP's words."""
    if size <= END:
        raise ParameterError("vocab_size", f"{size} is below CLIP's {END + 1}")


def _build_text_model(version: str, text_config: Mapping[str, Any] | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    if version != CLIP_VIT_L_14 and text_config is None:
        try:
            return CLIPTextModel.from_pretrained(version)
        except OSError as error:
            kind = "folder" if Path(version).exists() else "hub model or local folder"
            raise ParameterError(
                "version", f"cannot load the {kind} '{version}': {error}"
            ) from error
    fields = dict(text_config or {})
    accepted = set(CLIPTextConfig().to_dict())
    for key in fields:
        if key not in accepted:
            raise ParameterError(f"text_config.{key}", f"unknown field{nearest(key, accepted)}")
    fields = {**CLIP_VIT_L_14_TEXT, **fields}
    check_text_config(fields, CLIP_COUNTS, "attention_dropout")
    try:
        return CLIPTextModel(CLIPTextConfig(**fields))
    except Exception as error:  # transformers checks some fields, torch stumbles over others
        raise ParameterError("text_config", " ".join(str(error).split())) from error


def _build_open_clip_text(arch: str, text_config: Mapping[str, object] | None) -> Any:
    from open_clip import get_model_config, list_models
    from open_clip.model import CLIP

    config = get_model_config(arch)
    if config is None:
        raise ParameterError("arch", f"open_clip has no '{arch}'{nearest(arch, list_models())}")
    fields = {**config["text_cfg"], **(text_config or {})}
    check_text_config(fields, OPEN_CLIP_COUNTS)
    # Its image tower is not read: a small one stands in for it until it goes.
    vision = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64, "head_width": 32}
    try:
        model = CLIP(
            config["embed_dim"], vision, fields, quick_gelu=config.get("quick_gelu", False)
        )
    except Exception as error:  # open_clip checks nothing: Python and torch stumble over values
        raise ParameterError("text_config", " ".join(str(error).split())) from error
    del model.visual
    return model
