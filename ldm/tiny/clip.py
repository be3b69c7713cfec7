"""A small CLIP, which this project trains by contrast.

Its text tower conditions the miniature, and its image tower measures the miniature's pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ldm.modules.encoders.names import transformers_to_open_clip
from ldm.modules.encoders.tokenizer import END, tokenize
from ldm.optim.registry import make_optimizer
from ldm.optim.schedules import with_schedule

# The prefixes of what the miniature's text encoder does not hold.
OF_CLIP_ALONE = ("clip.visual.", "clip.text_projection", "clip.logit_scale")
LEARNS_WITH_FROZEN_TEXT = tuple(prefix.removeprefix("clip.") for prefix in OF_CLIP_ALONE)

Images = Float[Tensor, "b 3 h w"]
Embeddings = Float[Tensor, "b d"]


class CLIP(pl.LightningModule):
    """Contrastive language-image pretraining (Radford et al., 2103.00020), with open_clip's towers
    and loss.

    Args:
        embed_dim: dimensions of the space that pictures and captions share.
        vision_cfg, text_cfg: open_clip's; a list of `layers` makes the image tower a ResNet.
        image_key, caption_key: a batch's entries for the images, (b, h, w, 3) in [-1, 1], and their
            captions.
        optimizer, scheduler_config: as of `LatentDiffusion`.
        monitor: the metric that names the best checkpoint.
        freeze_text: keep the text tower as it is; its projection still learns. For the tower of a
            text encoder that a model is conditioned by (`with_text_encoder`).

    The learning rate is the attribute `learning_rate`, which the training command sets.
    """

    learning_rate: float = 1e-3

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Mapping[str, object],
        text_cfg: Mapping[str, object],
        image_key: str = "image",
        caption_key: str = "caption",
        optimizer: str = "adamw",
        scheduler_config: Mapping[str, object] | None = None,
        monitor: str | None = None,
        freeze_text: bool = False,
    ):
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP as OpenCLIP

        vision = {
            key: list(value) if isinstance(value, Sequence) else value
            for key, value in vision_cfg.items()
        }
        self.clip = OpenCLIP(embed_dim, vision, dict(text_cfg), quick_gelu=True)
        self.loss = ClipLoss()
        self.context_length = self.clip.context_length
        self.image_key, self.caption_key, self.monitor = image_key, caption_key, monitor
        self.optimizer, self.scheduler_config = optimizer, scheduler_config
        if freeze_text:
            for name, weight in self.clip.named_parameters():
                weight.requires_grad_(name.startswith(LEARNS_WITH_FROZEN_TEXT))

    def encode_image(self, images: Images) -> Embeddings:
        """Return unit vectors of images in [-1, 1]."""
        return F.normalize(self.clip.encode_image(images), dim=-1)

    def encode_text(self, captions: Sequence[str]) -> Embeddings:
        """Return unit vectors of captions."""
        clip: Any = self.clip
        tokens = tokenize(captions, self.context_length).to(self.device)
        # The attention is causal, so nothing reads what follows the first end token. Cut it off.
        ends = (tokens == END).int().argmax(1)
        n = int(ends.max()) + 1
        x = clip.token_embedding(tokens[:, :n]) + clip.positional_embedding[:n]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:n, :n]))
        return F.normalize(x[torch.arange(len(x)), ends] @ clip.text_projection, dim=-1)

    def shared_step(
        self, batch: Mapping[str, Any], prefix: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the symmetric contrastive loss of a batch, and what to log of it.

        The accuracy is how often the nearest caption to a picture is its own.
        """
        images = rearrange(batch[self.image_key], "b h w c -> b c h w").contiguous()
        captions = list(batch[self.caption_key])
        image, text = self.encode_image(images), self.encode_text(captions)
        loss = self.loss(image, text, self.clip.logit_scale.exp())
        nearest = (image @ text.T).argmax(1).tolist()
        right = sum(captions[found] == caption for found, caption in zip(nearest, captions))
        accuracy = torch.tensor(right / len(captions))
        return loss, {f"{prefix}/loss": loss.detach(), f"{prefix}/accuracy": accuracy}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, logged = self.shared_step(batch, "train")
        self.log_dict(logged, prog_bar=True, batch_size=len(batch[self.caption_key]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        _, logged = self.shared_step(batch, "val")
        self.log_dict(logged, batch_size=len(batch[self.caption_key]), sync_dist=True)

    def on_train_batch_end(self, *args: object) -> None:
        # At most 100, as in the paper: beyond it the softmax is too sharp to learn from.
        self.clip.logit_scale.data.clamp_(max=4.6052)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer, [self.clip], self.learning_rate)
        return with_schedule(optimizer, self.scheduler_config)


def with_text_encoder(
    state: Mapping[str, Tensor], diffusion: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return weights of `CLIP` with the text encoder of a diffusion model's weights as their tower.

    Args:
        state: weights of `CLIP`, of which the text tower may be missing.
        diffusion: weights of Stable Diffusion, with `cond_stage_model.transformer.*`.
    """
    prefix = "cond_stage_model.transformer."
    encoder = {
        key.removeprefix(prefix): value
        for key, value in diffusion.items()
        if key.startswith(prefix)
    }
    tower = transformers_to_open_clip(encoder)
    return {**state, **{f"clip.{key}": value for key, value in tower.items()}}
