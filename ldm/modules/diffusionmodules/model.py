"""The autoencoder's encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ParameterError, check_counts, check_share
from ldm.modules.attention import attention


def normalize(channels: int) -> nn.GroupNorm:
    """Make the group norm in front of every convolution."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x), in the place of x where no gradient needs it: x must be new."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = conv3(channels, channels) if with_conv else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the resolution: a strided convolution, or an average."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        # The released weights expect the padding on one side only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two convolutions with a skip."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm1 = normalize(in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3(out_channels, out_channels)
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h w"]:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels, with a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalize(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        q, k, v = (
            rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v)
        )
        return x + self.proj_out(
            rearrange(attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[-2])
        )


class Level(nn.Module):
    """The blocks of one resolution, with attention if any, then the change of resolution."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        for name, module in resample.items():  # `downsample` or `upsample`
            self.add_module(name, module)
        self._resample = list(resample)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in self._resample:
            x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, use_checkpoint: bool):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, use_checkpoint)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout, use_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _check_widths(ch: int, ch_mult: Sequence[int]) -> list[int]:
    widths = [ch * mult for mult in ch_mult]
    if not widths or any(width < 1 or width % 32 for width in [ch, *widths]):
        raise ParameterError(
            "ch_mult",
            f"ch {ch} and ch_mult {list(ch_mult)} give widths {widths}; all must be multiples of "
            "the 32 norm groups",
        )
    return widths


class Encoder(nn.Module):
    """Images to the parameters of latents.

    Args:
        ch, ch_mult: level i has `ch * ch_mult[i]` channels; every level but the last halves the
            resolution.
        attn_resolutions: sides, in pixels of an image of side `resolution`, at which blocks attend.
        double_z: give means and log-variances.
        out_ch: the decoder's; so that both take the same `ddconfig`.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        out_ch: int = 3,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        widths = _check_widths(ch, ch_mult)
        check_counts(in_channels=in_channels, out_ch=out_ch, z_channels=z_channels)
        check_counts(num_res_blocks=num_res_blocks, resolution=resolution)
        check_share("dropout", dropout)
        self.conv_in = conv3(in_channels, ch)
        self.down = nn.ModuleList()
        channels = ch
        for level, width in enumerate(widths):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, width, dropout, use_checkpoint))
                channels = width
            attends = resolution // 2**level in set(attn_resolutions)
            attentions: list[nn.Module] = [AttnBlock(width) for _ in blocks] if attends else []
            last = level == len(widths) - 1
            resample = {} if last else {"downsample": Downsample(width, resamp_with_conv)}
            self.down.append(Level(blocks, attentions, **resample))
        self.mid = Middle(channels, dropout, use_checkpoint)
        self.norm_out = normalize(channels)
        self.conv_out = conv3(channels, 2 * z_channels if double_z else z_channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z _ _"]:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to images; the arguments are the encoder's."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        out_ch: int = 3,
        in_channels: int = 3,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        widths = _check_widths(ch, ch_mult)
        check_counts(in_channels=in_channels, out_ch=out_ch, z_channels=z_channels)
        check_counts(num_res_blocks=num_res_blocks, resolution=resolution)
        check_share("dropout", dropout)
        channels = widths[-1]
        self.conv_in = conv3(z_channels, channels)
        self.mid = Middle(channels, dropout, use_checkpoint)
        levels: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, width, dropout, use_checkpoint))
                channels = width
            attends = resolution // 2**level in set(attn_resolutions)
            attentions: list[nn.Module] = [AttnBlock(width) for _ in blocks] if attends else []
            resample = {"upsample": Upsample(width, resamp_with_conv)} if level else {}
            levels.append(Level(blocks, attentions, **resample))
        self.up = nn.ModuleList(reversed(levels))  # in the checkpoints, 0 is the highest resolution
        self.norm_out = normalize(channels)
        self.conv_out = conv3(channels, out_ch)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c _ _"]:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))
