"""Other processors than this one, as far as this one can play them: what a test has to hold for.

PRETEND_BF16=1      the processor says that it computes in bfloat16, so `ldm.host` makes that the
default OTHER_ROUNDING=1    float32 results differ in their last bits; 2, 3, ... are one more such
processor each TEST_THREADS=2      torch computes on two threads instead of one
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

BF16 = Path(__file__).parent / "pretend_bf16"
THREADS = os.environ.get("TEST_THREADS", "1")

# Sums of products: their order is the kernel's own, may depend on the place, and so does what each
# addition rounds.
PRODUCTS = {
    "_linalg_svd", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "addmm", "addmv", "baddbmm", "bmm", "convolution",
    "convolution_backward", "dot", "embedding_dense_backward", "mm", "mv", "native_group_norm",
    "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward",
}  # fmt: skip
# Sums of terms.
SUMS = {
    "_foreach_norm", "_log_softmax", "_softmax", "_softmax_backward_data", "avg_pool2d", "cumsum",
    "linalg_vector_norm", "logsumexp", "mean", "mse_loss", "std", "sum", "upsample_bilinear2d", "var", "var_mean",
}  # fmt: skip
# Functions that each library approximates in its own way, to the last bit or nearly.
FUNCTIONS = {
    "cos", "erf", "exp", "expm1", "gelu", "gelu_backward", "log", "log1p", "pow", "rsqrt", "sigmoid",
    "sigmoid_backward", "silu", "silu_backward", "sin", "softplus", "tanh", "tanh_backward",
}  # fmt: skip


def pretend() -> None:
    """Take on, for this process and those that it starts, what the environment asks for."""
    torch.set_num_threads(int(THREADS))
    if os.environ.get("PRETEND_BF16"):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(BF16), os.environ.get("PYTHONPATH")])
        )
        spec = importlib.util.spec_from_file_location("pretend_bf16", BF16 / "sitecustomize.py")
        assert spec and spec.loader
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def rounding() -> AbstractContextManager[Any]:
    """Return the rounding that the environment asks for, to be entered."""
    seed = int(os.environ.get("OTHER_ROUNDING", "0"))
    return OtherRounding(seed) if seed else nullcontext()


class OtherRounding(TorchDispatchMode):
    """Round float32 as another processor might, in this process alone, the backward pass included.

    Before a sum each of its operands is moved to a neighbouring number or left; the result of a
    function is moved likewise. The moves are a function of the numbers (in a sum of products of
    their places, too) and of the seed, so that such a processor repeats its own results bit for
    bit. torch does not compile for it.

    The golden UNet's output then differs from its float64 value by 2e-6 to 4e-6, where real kernels
    (AVX2, AVX, SSE4.1; with and without FMA) make it differ by 1.1e-6 to 1.4e-6.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            args = tree_map(lambda value: self._move(value, by_place=True), args)
        elif name in SUMS:
            args = tree_map(self._move, args)
        result = func(*args, **(kwargs or {}))
        return tree_map(self._move, result) if name in FUNCTIONS else result

    def _move(self, value: Any, by_place: bool = False) -> Any:
        """Return a tensor whose numbers are at most one unit of their last place away; other values
        as they are.
        """
        if not is_float32(value):
            return value
        bits = value.detach().contiguous().view(torch.int32).flatten().long()
        mixed = bits + self.seed * 0x85EBCA6B
        if by_place:
            mixed = mixed + torch.arange(len(bits)) * 0x9E3779B1 + len(bits) * 7919
        for factor in (0xFF51AFD7ED558CC, 0x4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> 29)) * factor
        chance = ((mixed >> 32) & 0xFFFF).float() / 32767.5 - 1
        chance[(bits & 0xFFF) == 0] = (
            0  # numbers of few digits: what is computed of them is exact everywhere
        )
        return value + value * chance.view(value.shape) * 2**-23


def is_float32(value: Any) -> bool:
    """Return whether a value is a plain tensor of float32 in memory that this mode may move."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.dtype == torch.float32
        and value.device.type == "cpu"
    )
