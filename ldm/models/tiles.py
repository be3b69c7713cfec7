"""A large picture in tiles, so that an autoencoder's memory does not grow with it.

Neighbouring tiles overlap, and are blended there: no border shows. The group norms of an
autoencoder would take each tile's own mean and spread for the whole picture's, and change its
colours. They get those of the whole picture at a smaller size. So the result is close to that of
one pass, not equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OVERLAP = 4  # a tile shares a quarter of its side with the next one


def tiled(
    network: nn.Module,
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    grid: tuple[int, int],
    tile: int,
    out_factor: int = 1,
) -> Tensor:
    """Return `compute(x)` as `in_tiles` does, with norms of the whole picture.

    Args:
        network: whose group norms `compute` runs through.
    """
    # All of the picture at once, as small as a tile.
    factor = x.shape[2] // grid[0]
    scale = tile / max(grid)
    small = [max(1, round(side * scale)) * factor for side in grid]
    with recorded(network) as statistics:
        compute(F.interpolate(x, small, mode="nearest-exact"))
    with imposed(network, statistics):
        return in_tiles(compute, x, grid, tile, out_factor)


Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def recorded(network: nn.Module) -> Iterator[Statistics]:
    """Note each group norm's mean and 1 / spread of each sample and group, while it runs inside."""
    found: Statistics = {}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, nn.GroupNorm)
        grouped = inputs[0].float().reshape(len(inputs[0]), norm.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
        found[norm] = mean, (variance + norm.eps).rsqrt()

    hooks = [norm.register_forward_hook(note) for norm in _norms(network)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def imposed(network: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Let group norms use given statistics instead of those of what they get, inside."""

    def replace(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)
        mean, inverse = (value[:, :, None] for value in statistics[norm])
        x = inputs[0]
        grouped = (x.float().reshape(len(x), norm.num_groups, -1) - mean) * inverse
        scale, shift = (value.float()[:, None, None] for value in (norm.weight, norm.bias))
        return (grouped.reshape(x.shape) * scale + shift).to(output.dtype)

    hooks = [norm.register_forward_hook(replace) for norm in _norms(network)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.GroupNorm)]


def in_tiles(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    grid: tuple[int, int],
    tile: int,
    out_factor: int = 1,
) -> Tensor:
    """Return `compute(x)`, computed tile by tile and blended, in float32.

    Args:
        compute: keeps the proportions of what it gets.
        x: (b, c, h, w).
        grid: height and width of x as latents; h and w are multiples of them.
        tile: side of a tile, in latents.
        out_factor: pixels of the result's side for one latent.
    """
    in_factor = x.shape[2] // grid[0]
    places = [starts(side, tile) for side in grid]
    sizes = [min(side, tile) for side in grid]
    total: Tensor | None = None
    weights = torch.zeros(1, 1, *(side * out_factor for side in grid), device=x.device)
    for top in places[0]:
        for left in places[1]:
            # One tile at a time: only its activations are in memory.
            rows = slice(top * in_factor, (top + sizes[0]) * in_factor)
            columns = slice(left * in_factor, (left + sizes[1]) * in_factor)
            part = compute(x[:, :, rows, columns]).float()
            if total is None:
                total = part.new_zeros(*part.shape[:2], *weights.shape[2:])

            # It counts less towards the borders that it shares with others.
            down = ramp(sizes[0], top > 0, top + sizes[0] < grid[0], tile, out_factor)
            across = ramp(sizes[1], left > 0, left + sizes[1] < grid[1], tile, out_factor)
            weight = (down[:, None] * across).to(x.device)
            rows = slice(top * out_factor, (top + sizes[0]) * out_factor)
            columns = slice(left * out_factor, (left + sizes[1]) * out_factor)
            total[:, :, rows, columns] += weight * part
            weights[:, :, rows, columns] += weight
    assert total is not None, "an empty picture"
    return total / weights


def starts(side: int, tile: int) -> list[int]:
    """Return where tiles begin along a side: evenly, from one border to the other."""
    if side <= tile:
        return [0]
    step = tile - tile // OVERLAP
    count = 1 + math.ceil((side - tile) / step)
    return [round(number * (side - tile) / (count - 1)) for number in range(count)]


def ramp(size: int, before: bool, after: bool, tile: int, factor: int) -> Tensor:
    """Return the weights along a tile's side, which rise and fall where a neighbour overlaps."""
    length, overlap = size * factor, max(1, tile // OVERLAP * factor)
    rising = torch.arange(1, length + 1, dtype=torch.float32) / (overlap + 1)
    weights = torch.ones(length)
    if before:
        weights = torch.minimum(weights, rising)
    if after:
        weights = torch.minimum(weights, rising.flip(0))
    return weights
