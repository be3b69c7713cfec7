"""The resolutions of a UNet: their widths, blocks and attention, from its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.errors import ParameterError


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet: its channels, blocks, and whether they attend, to text alone."""

    width: int
    blocks: int
    attends: bool
    text_alone: bool = False


def plan(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
) -> list[Level]:
    """Return the resolutions, the first one first; raise a `UserError` if numbers do not fit."""
    blocks = (
        [num_res_blocks] * len(channel_mult)
        if isinstance(num_res_blocks, int)
        else list(num_res_blocks)
    )
    if len(blocks) != len(channel_mult):
        raise ParameterError(
            "num_res_blocks", f"has {len(blocks)} entries for {len(channel_mult)} in channel_mult"
        )
    if min(blocks) < 1:
        raise ParameterError("num_res_blocks", f"expected 1 or more, got {min(blocks)}")
    return [
        Level(mult * model_channels, number, 2**index in attention_resolutions)
        for index, (mult, number) in enumerate(zip(channel_mult, blocks))
    ]


def with_text_alone(levels: list[Level], disabled: Sequence[bool]) -> list[Level]:
    """Return the levels with what `disable_self_attentions` says of each."""
    if len(disabled) != len(levels):
        problem = f"has {len(disabled)} entries for {len(levels)} in channel_mult"
        raise ParameterError("disable_self_attentions", problem)
    return [replace(level, text_alone=bool(off)) for level, off in zip(levels, disabled)]


def check_widths(widths: Sequence[int], num_heads: int, num_head_channels: int) -> None:
    """Raise a `UserError` for a width that 32 norm groups or the heads do not divide."""
    if num_heads < 1 and num_head_channels < 1:
        raise ParameterError("num_heads", "give it or num_head_channels")
    for width in widths:
        if width % 32:
            raise ParameterError(
                "model_channels",
                f"a width of {width} channels is not a multiple of the 32 norm groups",
            )
        if width % (num_heads if num_head_channels == -1 else num_head_channels):
            raise ParameterError(
                "num_heads", f"{width} channels cannot be split into attention heads evenly"
            )
