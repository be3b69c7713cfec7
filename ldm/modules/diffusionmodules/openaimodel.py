"""The denoising UNet of latent diffusion (Dhariwal & Nichol's UNet with spatial transformers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ParameterError, check_counts, check_share
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.levels import Level, check_widths, plan, with_text_alone
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module
from ldm.modules.layers import Conv2d, Linear


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions with a skip; the time embedding is added between them.

    With `use_scale_shift_norm` it scales and shifts what the second norm gives (2102.09672, section
    2). A norm of one channel a group, at a width of 32, would take away what is added before it.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        use_scale_shift_norm: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b o h w"]:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, emb = self.in_layers(x), self.emb_layers(emb)[:, :, None, None]
        if not self.use_scale_shift_norm:
            return self.skip_connection(x) + self.out_layers(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class TimestepEmbedSequential(nn.Sequential):
    """A sequence whose layers get the time embedding or the text, as each needs."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predicts noise (or v, or x0) from a noisy latent, its time step and the text's embedding.

    Args:
        in_channels: latent channels (plus `c_concat` channels, for inpainting).
        model_channels: width of the first level; level i has `channel_mult[i]` times as many.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which levels attend.
        num_res_blocks: residual blocks a level, one number or one for each level.
        num_heads: heads of every attention; or give `num_head_channels`, the width of a head.
        context_dim: width of the text embedding.
        use_scale_shift_norm: the time embedding scales and shifts norms, see `ResBlock`.
        use_linear_in_transformer: linear projections (Stable Diffusion 2), not 1x1 convolutions.
        use_checkpoint: recompute activations in the backward pass instead of keeping them; with
            `attention`, only those of the transformer blocks, which keep most for their work. With
            `auto` the training command chooses by the memory; elsewhere nothing is recomputed.
        num_classes: how many classes, or noise levels of a small image, the UNet is told of.
        disable_self_attentions: for each level, whether its transformers read the text in place of
            their own pixels, which large pictures have too many of.
        disable_middle_self_attn: the same of the middle block.
        channels_last: weights and activations with their channels innermost, which is faster on
            some GPUs.
        compile: train the forward and backward pass that `torch.compile` makes, with its arguments
            if a mapping.

    Raises:
        UserError: a width that 32 norm groups or the heads do not divide, or no transformer.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_spatial_transformer: bool = True,
        use_linear_in_transformer: bool = False,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool | str = False,
        channels_last: bool = False,
        compile: bool | Mapping[str, object] = False,
        num_classes: int | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        disable_middle_self_attn: bool = False,
    ):
        super().__init__()
        if not use_spatial_transformer:
            raise ParameterError(
                "use_spatial_transformer", "must be true: the text is read by cross-attention"
            )
        _check_recomputed(use_checkpoint)
        check_counts(
            in_channels=in_channels, out_channels=out_channels, model_channels=model_channels
        )
        check_counts(transformer_depth=transformer_depth, channel_mult=min(channel_mult, default=0))
        if context_dim is not None:
            check_counts(context_dim=context_dim)
        check_share("dropout", dropout)
        levels = plan(model_channels, channel_mult, num_res_blocks, attention_resolutions)
        if disable_self_attentions is not None:
            levels = with_text_alone(levels, disable_self_attentions)
        check_widths([level.width for level in levels], num_heads, num_head_channels)
        make = BlockFactory(
            emb_channels=4 * model_channels,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            depth=transformer_depth,
            context_dim=context_dim,
            dropout=dropout,
            use_linear=use_linear_in_transformer,
            scales_norms=use_scale_shift_norm,
        )
        self.channels_last = channels_last
        self._compiled = self._compile(compile) if compile else None
        self._sampled: Any = None  # what `compile_for_sampling` makes
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.context_dim = context_dim
        self.time_embed = nn.Sequential(
            Linear(model_channels, make.emb_channels),
            nn.SiLU(),
            Linear(make.emb_channels, make.emb_channels),
        )
        self.num_classes = num_classes
        if num_classes is not None:
            check_counts(num_classes=num_classes)
            self.label_emb = nn.Embedding(num_classes, make.emb_channels)
        conv_in = TimestepEmbedSequential(Conv2d(in_channels, model_channels, 3, padding=1))
        down, skips = _way_down(make, levels, model_channels)
        self.input_blocks = nn.ModuleList([conv_in, *down])
        width = levels[-1].width
        self.middle_block = TimestepEmbedSequential(
            make.res_block(width, width),
            make.transformer(width, disable_middle_self_attn),
            make.res_block(width, width),
        )
        self.output_blocks = nn.ModuleList(_way_up(make, levels, skips))
        width = levels[0].width
        self.out = nn.Sequential(
            nn.GroupNorm(32, width),
            nn.SiLU(),
            zero_module(Conv2d(width, out_channels, 3, padding=1)),
        )
        self.recompute(use_checkpoint)

    def recompute(self, use_checkpoint: bool | str) -> None:
        """Set what is computed again in the backward pass, as the constructor's `use_checkpoint`.

        It may change between steps.
        """
        _check_recomputed(use_checkpoint)
        for module in self.modules():
            if isinstance(module, BasicTransformerBlock):
                module.use_checkpoint = use_checkpoint in (True, "attention")
            elif isinstance(module, ResBlock):
                module.use_checkpoint = use_checkpoint is True

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"] | Float[Tensor, " b"],
        context: Float[Tensor, "b n e"] | None = None,
        y: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Return the output for noisy latents at time steps, of class `y`, reading `context`."""
        if context is None and self.context_dim is not None:
            # Attention would take the pixels for the text.
            raise ValueError(
                f"the UNet reads a text embedding of width {self.context_dim}, and got none"
            )
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"the UNet is told of {self.num_classes} classes, and y is {y}")
        # Sampling has other batch sizes at every turn, so what is made for training is not for it.
        compiled = self._compiled if torch.is_grad_enabled() else self._sampled
        return (compiled or self._forward)(x, timesteps, context, y)

    @property
    def dtype(self) -> torch.dtype:
        """Return the weights' precision; code that runs the blocks itself casts its input to it."""
        return next(self.time_embed.parameters()).dtype

    def compile_for_sampling(self, options: bool | Mapping[str, object] = True) -> None:
        """Let `torch.compile` make the forward pass of sampling, with its arguments if a mapping.

        The first call of each size takes minutes; those after it take less time.
        """
        self._sampled = self._compile(options)

    @property
    def is_compiled_for_sampling(self) -> bool:
        """Return whether `compile_for_sampling` was called."""
        return self._sampled is not None

    def _compile(self, options: bool | Mapping[str, Any]) -> Any:
        try:
            return torch.compile(
                self._forward, **({} if isinstance(options, bool) else dict(options))
            )
        except (TypeError, RuntimeError) as error:
            raise ParameterError("compile", " ".join(str(error).split())) from error

    def use_memory_format(self, channels_last: bool | None = None) -> None:
        """Give the weights the layout of `channels_last`, in place, once they have their values.

        Args:
            channels_last: as the constructor's; None keeps what that said.
        """
        if channels_last is not None:
            self.channels_last = channels_last
        if not self.channels_last:
            return
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None
    ) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y).to(emb.dtype)
        # Down, keeping what each block gives; then up, where each block also reads what was kept.
        skips, h = [], x
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


@dataclass(frozen=True)
class BlockFactory:
    """Makes the UNet's blocks, which share these options."""

    emb_channels: int
    num_heads: int
    num_head_channels: int
    depth: int
    context_dim: int | None
    dropout: float
    use_linear: bool
    scales_norms: bool

    def res_block(self, channels: int, out_channels: int) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            out_channels,
            self.dropout,
            use_scale_shift_norm=self.scales_norms,
        )

    def transformer(self, channels: int, text_alone: bool = False) -> SpatialTransformer:
        heads = (
            self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        )
        return SpatialTransformer(
            channels,
            heads,
            channels // heads,
            self.depth,
            self.context_dim,
            self.dropout,
            self.use_linear,
            text_alone=text_alone,
        )


def _way_down(
    make: BlockFactory, levels: list[Level], channels: int
) -> tuple[list[nn.Module], list[int]]:
    """Make the input blocks; return also the width after each and after the first convolution."""
    modules: list[nn.Module] = []
    skips = [channels]
    for index, level in enumerate(levels):
        for _ in range(level.blocks):
            layers: list[nn.Module] = [make.res_block(skips[-1], level.width)]
            if level.attends:
                layers.append(make.transformer(level.width, level.text_alone))
            modules.append(TimestepEmbedSequential(*layers))
            skips.append(level.width)
        if index != len(levels) - 1:
            modules.append(TimestepEmbedSequential(Downsample(level.width)))
            skips.append(level.width)
    return modules, skips


def _way_up(make: BlockFactory, levels: list[Level], skips: list[int]) -> list[nn.Module]:
    """Make the output blocks, which take the skips from last to first."""
    modules: list[nn.Module] = []
    channels, skips = levels[-1].width, list(skips)
    for index, level in reversed(list(enumerate(levels))):
        for block in range(level.blocks + 1):
            layers: list[nn.Module] = [make.res_block(channels + skips.pop(), level.width)]
            channels = level.width
            if level.attends:
                layers.append(make.transformer(channels, level.text_alone))
            if index and block == level.blocks:
                layers.append(Upsample(channels))
            modules.append(TimestepEmbedSequential(*layers))
    return modules


def _check_recomputed(use_checkpoint: bool | str) -> None:
    """Raise a `UserError` for what `use_checkpoint` cannot be."""
    if use_checkpoint not in (True, False, "attention", "auto"):
        raise ParameterError(
            "use_checkpoint", f"expected true, false, attention or auto, got {use_checkpoint!r}"
        )
