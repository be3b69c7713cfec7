"""Linear layers and convolutions that take less time and memory on a CPU.

Elsewhere they are torch's own. Parameters, their names and their first values are always torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.host import onednn_is_faster

CPU, LAST = "cpu", torch.channels_last
_PLAIN = ContextVar("plain", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Let the layers be torch's own inside, as they are on a GPU."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


class Linear(nn.Linear):
    """A linear layer that keeps no copy of its weight for the backward pass.

    Under autocast torch casts the weight and keeps the copy, 2 bytes for each number. This one
    casts a large weight again in the backward pass. The numbers are the same. In float32 it takes
    the quicker of two libraries.
    """

    def forward(self, input: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        dtype = _cast_to(input, self.weight)
        if dtype is None and not _is_for_onednn(input, self.weight):
            return super().forward(input)
        found: Tensor = _Linear.apply(input.to(dtype or input.dtype), self.weight, self.bias)
        return found


class Conv2d(nn.Conv2d):
    """A convolution that keeps no copy of its weight, as `Linear`, and is quick on small images.

    There the weight is far larger than the image, and oneDNN takes most of its time to put the
    weight into another order. A product of matrices reads it as it lies, channels last.
    """

    def forward(self, input: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o _ _"]:
        if self.padding_mode != "zeros" or self.groups != 1 or isinstance(self.padding, str):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation)
        dtype = _cast_to(input, self.weight)
        is_same = input.dtype == self.weight.dtype and not _leaves_alone()
        if dtype is None and not (is_same and _is_product(input, self.weight, *settings)):
            return super().forward(input)
        cast = input.to(dtype or input.dtype)
        found: Tensor = _Conv2d.apply(cast, self.weight, self.bias, *settings)
        return found


# Numbers of a weight whose copy is worth a cast more. Of less, calling Python takes longer.
CAST_AGAIN = 2**20


def _cast_to(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the precision that autocast on the CPU computes in; None for a layer of torch's."""
    if input.device.type != CPU or not torch.is_autocast_enabled(CPU) or _leaves_alone():
        return None
    # A weight that is computed would be kept whole where its copy takes half the memory.
    if weight.dtype != torch.float32 or not weight.is_leaf or weight.numel() < CAST_AGAIN:
        return None
    return torch.get_autocast_dtype(CPU)


def _leaves_alone() -> bool:
    return _PLAIN.get() or torch.compiler.is_compiling()


# Multiplications from which on a product takes longer than the way to oneDNN.
WORTH_ONEDNN = 2**21


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN is to compute a product in float32, which torch leaves to MKL.

    MKL uses half the width of other makers' processors: 0.10 of the 0.21 TFLOP/s that oneDNN gets
    out of a core of an AMD EPYC (Zen 5).
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == CPU
        and x.numel() * len(weight) >= WORTH_ONEDNN
        and onednn_is_faster()
        and not torch.is_autocast_enabled(CPU)
        and not _leaves_alone()
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b."""
    if _is_for_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x W^T + b in the precision of x. W and b are in float32 and cast whenever they are read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = _multiply(rows, weight.to(x.dtype).t()).view_as(x)
        if needs_weight:
            grad_weight = _multiply(rows.t(), x.reshape(-1, x.shape[-1]).t())
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


class _Conv2d(torch.autograd.Function):
    """A convolution in the precision of x, with weights as those of `_Linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias_sizes = settings, None if bias is None else [len(bias)]
        low_bias = None if bias is None else bias.to(x.dtype)
        if _is_product(x, weight, *settings):
            return _product(x, weight.to(x.dtype), low_bias)
        stride, padding, dilation = settings
        return F.conv2d(x, weight.to(x.dtype), low_bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if _is_product(x, weight, *ctx.settings):
            found = _product_backward(grad, x, weight, needs)
        else:
            found = torch.ops.aten.convolution_backward(
                *(grad, x, weight.to(x.dtype), ctx.bias_sizes, *ctx.settings),
                *(False, [0, 0], 1, needs),
            )
        return (*found, None, None, None)


# From this size of a weight on, and up to so many pixels of a batch, the product is faster. Forward
# and backward pass of 1280 channels to 1280 on an AMD EPYC (Zen 5), in ms: 47 as a convolution and
# 12 as a product of 32 pixels, 63 and 31 of 128, 129 and 109 of 512. With 640 channels
# at 512 pixels both take 29.
LARGE_WEIGHT = 2**20
FEW_PIXELS = {torch.bfloat16: 512, torch.float32: 128}


def _is_product(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> bool:
    """Return whether a convolution that keeps the image's size is to be a product of matrices."""
    side, pixels = weight.shape[-1], len(x) * x.shape[-2] * x.shape[-1]
    keeps_size = weight.shape[-2] == side and side % 2 == 1 and padding == (side // 2, side // 2)
    if x.device.type != CPU or not keeps_size or not stride == dilation == (1, 1):
        return False
    if not weight.is_contiguous(memory_format=LAST):
        return False
    is_float32 = x.dtype == torch.float32
    if is_float32 and not (onednn_is_faster() and x.is_contiguous(memory_format=LAST)):
        return False
    # A kernel of one pixel is a product as it is.
    if is_float32 and side == 1:
        return _is_for_onednn(x, weight)
    return weight.numel() >= LARGE_WEIGHT and pixels <= FEW_PIXELS.get(x.dtype, 0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a convolution as a product of the image's windows and the weight as it lies."""
    height, width = x.shape[-2:]
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    found = _multiply(_windows(x, weight.shape[-1]), matrix, bias)
    return found.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, of the weight and of the bias, as far as they are needed."""
    found: list[Tensor | None] = [None, None, None]
    wide, narrow, side = weight.shape[:3]
    if needs[0]:
        # A pixel gets the gradients around it, each through the tap that led there: the kernel
        # turned round.
        taps = _windows(grad, side).unflatten(1, (side * side, wide)).flip(1).flatten(1)
        matrix = x.new_empty(side, side, wide, narrow).copy_(weight.permute(2, 3, 0, 1))
        pixels = _multiply(taps, matrix.flatten(0, 2).t())
        found[0] = pixels.view(len(x), *x.shape[-2:], narrow).permute(0, 3, 1, 2)
    if needs[1]:
        rows = grad.permute(0, 2, 3, 1).reshape(-1, wide)
        matrix = _multiply(rows.t(), _windows(x, side).t())
        found[1] = matrix.view(wide, side, side, narrow).permute(0, 3, 1, 2)
    if needs[2]:
        found[2] = grad.sum((0, 2, 3))
    return found


def _windows(x: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "pixels taps"]:
    """Return the square of pixels around each pixel, with zeros behind the border."""
    batch, channels, height, width = x.shape
    if side == 1:
        return x.permute(0, 2, 3, 1).reshape(-1, channels)
    border = side // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, border, border, border, border)).contiguous()
    strides = padded.stride()
    windows = padded.as_strided(
        (batch, height, width, side, side, channels), (*strides[:3], *strides[1:])
    )
    return windows.reshape(batch * height * width, -1)
