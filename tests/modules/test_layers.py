"""Layers that need less time and memory in bfloat16 on a CPU: the numbers are torch's."""

import copy
from contextlib import nullcontext

import pytest
import torch

from ldm.benchmark.machine import counting_flops
from ldm.modules import layers
from ldm.modules.layers import Conv2d, Linear, plain_layers

LAST = torch.channels_last
BF16 = torch.bfloat16
CASES = {
    "linear": (lambda: Linear(24, 40), (2, 7, 24)),
    "linear without bias": (lambda: Linear(24, 40, bias=False), (2, 7, 24)),
    "rows": (lambda: Linear(24, 40), (3, 24)),
    "convolution": (lambda: Conv2d(16, 32, 3, padding=1), (2, 16, 6, 4)),
    "1x1": (lambda: Conv2d(16, 32, 1), (2, 16, 6, 4)),
    "strided": (lambda: Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 6, 4)),
    "groups": (lambda: Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 4)),
    "circular": (lambda: Conv2d(16, 32, 3, padding=1, padding_mode="circular"), (2, 16, 6, 4)),
    "same": (lambda: Conv2d(16, 32, 3, padding="same"), (2, 16, 6, 4)),
}


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(layers, "CAST_AGAIN", 1)


def made(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    return make(), torch.randn(shape)


def passes(layer, x, plain, dtype=BF16):
    """Return the output of a layer and all gradients, of torch's own layer or of ours, under
    autocast to `dtype`, if there is one.
    """
    layer.zero_grad()
    x = x.clone().requires_grad_()
    low = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with plain_layers() if plain else nullcontext(), low:
        output = layer(x)
    slope = torch.linspace(-1, 1, output.numel()).view(output.shape).to(BF16)
    output.backward(slope.to(output.dtype))
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_torch(name, last):
    layer, x = made(name)
    if last and x.dim() == 4:
        layer, x = layer.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    for ours, theirs in zip(passes(layer, x, False), passes(layer, x, True), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("name", CASES)
def test_outside_of_autocast_they_are_torch_s(name):
    layer, x = made(name)
    found = layer(x)
    with plain_layers():
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_no_copy_of_the_weight_is_kept(name):
    layer, x = made(name)
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keeping, torch.autocast("cpu", BF16):
        layer(x)
    of_weights = [tensor for tensor in kept if tensor.numel() == layer.weight.numel()]
    assert of_weights and all(t.data_ptr() == layer.weight.data_ptr() for t in of_weights)


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("last", [False, True])
def test_a_product_is_the_convolution(monkeypatch, side, last):
    monkeypatch.setattr(layers, "LARGE_WEIGHT", 1)
    torch.manual_seed(0)
    layer = Conv2d(16, 24, side, padding=side // 2).to(memory_format=LAST)
    x = torch.randn(2, 16, 6, 4)
    if last:
        x = x.contiguous(memory_format=LAST)
    products = []
    product = layers._product
    monkeypatch.setattr(layers, "_product", lambda *given: products.append(1) or product(*given))
    ours = passes(layer, x, False)
    assert products
    # The same of the rounded numbers, in double precision. A rounding to 8 bits is wrong by 2^-8 at
    # most. Kernels without bf16 instructions round sums on the way, too.
    exact = copy.deepcopy(layer).to(BF16).double()
    found = passes(exact, x.to(BF16).double(), True, None)
    for one, other in zip(ours, found, strict=True):
        assert (one - other).norm() < 2**-7 * other.norm()
    # A gradient of another layout than its weight would be laid out again.
    assert layer.weight.grad.is_contiguous(memory_format=LAST)
    # To sample from: in half precision all through.
    half = layer.to(BF16)
    count = len(products)
    with torch.no_grad():
        found = half(x.to(BF16))
        with plain_layers():
            plain = half(x.to(BF16))
    assert len(products) == count + 1
    assert (found - plain).norm() < 2**-7 * plain.norm()


ONEDNN = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here"
)


@ONEDNN
@pytest.mark.parametrize("name", ["linear", "linear without bias", "rows", "1x1", "convolution"])
def test_onednn_s_product_is_the_product(monkeypatch, name):
    """On an AMD processor with AVX512 float32 goes this way, and here every size."""
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(layers, "WORTH_ONEDNN", 1)
    monkeypatch.setattr(layers, "LARGE_WEIGHT", 1)
    layer, x = made(name)
    if x.dim() == 4:
        layer, x = layer.to(memory_format=LAST), x.contiguous(memory_format=LAST)

    def through(plain):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        with plain_layers() if plain else nullcontext(), counting_flops() as counter:
            output = layer(given)
            output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
        gradients = [given.grad, *(parameter.grad for parameter in layer.parameters())]
        return [output.detach(), *gradients], counter

    (ours, counted), (theirs, as_many) = through(False), through(True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    kernels = {str(kernel) for kernel in counted.get_flop_counts()["Global"]}
    assert "mkldnn._linear_pointwise" in kernels
    assert counted.get_total_flops() == as_many.get_total_flops()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs[0], rtol=1e-4, atol=1e-4)


def test_many_pixels_and_small_weights_stay_convolutions(monkeypatch):
    monkeypatch.setattr(layers, "_product", None)
    passes(Conv2d(16, 24, 3, padding=1).to(memory_format=LAST), torch.randn(2, 16, 6, 4), False)
    monkeypatch.setattr(layers, "LARGE_WEIGHT", 1)
    passes(Conv2d(16, 24, 3, padding=1).to(memory_format=LAST), torch.randn(3, 16, 16, 16), False)
