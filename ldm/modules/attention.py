"""Attention and the spatial transformer that lets the UNet read the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.layers import Conv2d, Linear


def attention(
    q: Float[Tensor, "b n c"], k: Float[Tensor, "b m c"], v: Float[Tensor, "b m c"], heads: int = 1
) -> Float[Tensor, "b n c"]:
    """Compute scaled dot-product attention; channels are `heads` groups of `c / heads`."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class CrossAttention(nn.Module):
    """Attention from a sequence to `context`, or to itself when there is none."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.to_q = Linear(query_dim, inner_dim, bias=False)
        self.to_k = Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_v = Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.reads_text = context_dim is not None
        self._read: KeysAndValues | None = None  # where `texts_read_once` keeps them

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"] | None = None
    ) -> Float[Tensor, "b n c"]:
        k, v = self._keys_and_values(x if context is None else context)
        return self.to_out(attention(self.to_q(x), k, v, self.heads))

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context, those of before where it is the same text."""
        if self._read is not None and context in self._read:
            return self._read[context]
        found = self.to_k(context), self.to_v(context)
        if self._read is not None:
            # Guidance at some noise levels alone shows two texts in turn. A caller that makes a
            # new tensor at every step must not fill the memory.
            if len(self._read) == TEXTS_KEPT:
                self._read.clear()
            self._read[context] = found
        return found


TEXTS_KEPT = 2
# Text embedding -> its keys and values. A tensor is its own key, by identity.
KeysAndValues = dict[Tensor, tuple[Tensor, Tensor]]


@contextmanager
def texts_read_once(network: nn.Module) -> Iterator[None]:
    """Compute the keys and values of each text once inside, for as many steps as there are.

    They are a function of the text alone, and sampling shows the same text to every step. Inside,
    texts must not be changed in place and weights must not change.
    """
    readers = [m for m in network.modules() if isinstance(m, CrossAttention) and m.reads_text]
    for reader in readers:
        reader._read = {}
    try:
        yield
    finally:
        for reader in readers:
            reader._read = None


class GEGLU(nn.Module):
    """x W * gelu(x V) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers around a GEGLU of four times the width."""

    def __init__(self, dim: int, dropout: float = 0.0, mult: int = 4):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, dim * mult), nn.Dropout(dropout), Linear(dim * mult, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with a norm and a skip.

    With `text_alone` the first attention reads the text, too, as Stable Diffusion's upscaler does.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        text_alone: bool = False,
    ):
        super().__init__()
        self.text_alone = text_alone
        own = context_dim if text_alone else None
        self.attn1 = CrossAttention(dim, own, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.use_checkpoint = use_checkpoint

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"] | None = None
    ) -> Float[Tensor, "b n c"]:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, use_reentrant=False)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = self.attn1(self.norm1(x), context if self.text_alone else None) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    `use_linear` makes the projections linear layers (Stable Diffusion 2), not 1x1 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_linear: bool = False,
        use_checkpoint: bool = False,
        text_alone: bool = False,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = (
            Linear(in_channels, inner_dim) if use_linear else Conv2d(in_channels, inner_dim, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim, heads, dim_head, context_dim, dropout, use_checkpoint, text_alone
            )
            for _ in range(depth)
        )
        proj_out = (
            Linear(inner_dim, in_channels) if use_linear else Conv2d(inner_dim, in_channels, 1)
        )
        # Zero at the start, so that a new block is the identity.
        for parameter in proj_out.parameters():
            nn.init.zeros_(parameter)
        self.proj_out = proj_out

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m e"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        height = x.shape[-2]
        h = self.norm(x)
        h = h if self.use_linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.use_linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.use_linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.use_linear else self.proj_out(h)
        return h + x
