"""Large pictures: in tiles and one by one, the autoencoder's memory does not grow with them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ldm.models.tiles import in_tiles, starts
from ldm.sampling.first_stage import decode, encode, save_memory
from ldm.sampling.text_to_image import load_model
from tests.support.families import noise


@pytest.fixture(scope="module")
def model():
    return load_model("models/tiny/sd-tiny.safetensors")


@pytest.fixture
def memory_saved(model):
    save_memory(model, tiling=True)
    yield model
    save_memory(model)


@pytest.mark.parametrize("side, tile", [(8, 8), (5, 8), (9, 8), (20, 8), (64, 16), (3, 1), (7, 2)])
def test_tiles_cover_a_side_from_border_to_border(side, tile):
    found = starts(side, tile)
    assert found[0] == 0 and found[-1] == max(0, side - tile)
    assert found == sorted(set(found))
    overlap = tile // 4
    assert all(after - before <= tile - overlap for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("grid", [(20, 12), (8, 30), (8, 8), (5, 5)])
def test_what_does_not_look_around_is_the_same_in_tiles(grid):
    x = noise(2, 3, *grid)
    enlarged = in_tiles(lambda z: F.interpolate(z, scale_factor=4), x, grid, 8, 4)
    torch.testing.assert_close(enlarged, F.interpolate(x, scale_factor=4), rtol=0, atol=1e-6)
    pooled = in_tiles(lambda z: F.avg_pool2d(z, 4), enlarged, grid, 8)
    torch.testing.assert_close(pooled, x, rtol=0, atol=1e-6)


def largest_of(module, sizes):
    return module.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))


def test_a_tiled_picture_is_close_to_the_untiled_one_in_bounded_memory(memory_saved):
    model, side = memory_saved, memory_saved.image_size
    z = encode(model, smooth(2, 3 * side * model.downsampling))
    sizes: list[tuple[int, ...]] = []
    hook = largest_of(model.first_stage_model.decoder, sizes)
    tiled = decode(model, z)
    # One picture and one tile at a time, whatever the picture's size.
    assert max(shape[0] * shape[2] * shape[3] for shape in sizes) == side * side
    hook.remove()

    save_memory(model)
    whole = decode(model, z)
    assert tiled.shape == whole.shape
    # No border of a tile shows: the largest step from pixel to pixel is that of the untiled.
    for axis in (2, 3):
        assert tiled.diff(dim=axis).abs().max() < 1.1 * whole.diff(dim=axis).abs().max() + 0.05


def test_the_colours_of_a_tiled_picture_are_those_of_the_picture(memory_saved):
    """Group norms of a tile alone would change them: the error would be three times as large."""
    model = memory_saved
    images = smooth(1, 3 * model.image_size * model.downsampling)
    assert (decode(model, encode(model, images)) - images).abs().mean() < 0.06


def test_tiles_are_close_to_one_pass_where_no_attention_looks_further(memory_saved, monkeypatch):
    model = memory_saved
    for network in (model.first_stage_model.encoder, model.first_stage_model.decoder):
        monkeypatch.setattr(network.mid.attn_1, "forward", lambda x: x)
    images = smooth(1, 3 * model.image_size * model.downsampling)
    z = encode(model, images)
    tiled = decode(model, z)
    save_memory(model)
    whole = decode(model, z)
    assert (tiled - whole).abs().mean() < 0.3 * whole.std()
    assert (z - encode(model, images)).abs().mean() < 0.2 * z.abs().mean()


def smooth(count, side):
    """Pictures without borders of their own."""
    return F.interpolate(noise(count, 3, 4, 4).tanh(), (side, side), mode="bicubic").clamp(-1, 1)


def test_slices_are_the_same_pictures(model):
    z = noise(3, 4, 8, 8)
    together = decode(model, z)
    sizes: list[tuple[int, ...]] = []
    hook = largest_of(model.first_stage_model.decoder, sizes)
    save_memory(model, slicing=True)
    try:
        torch.testing.assert_close(decode(model, z), together, rtol=0, atol=1e-4)
    finally:
        save_memory(model)
        hook.remove()
    assert [shape[0] for shape in sizes] == [1, 1, 1]


@pytest.fixture
def overflowing():
    """A model whose decoder makes values that half precision has not, and float32 has."""
    model = load_model("models/tiny/sd-tiny.safetensors")
    with torch.no_grad():
        model.first_stage_model.post_quant_conv.weight *= 1e6
    return model


def test_an_overflow_in_half_precision_is_decoded_in_full(overflowing, caplog):
    z = noise(1, 4, 8, 8)
    expected = decode(overflowing, z)
    assert torch.isfinite(expected).all()
    for again in (False, True):
        with torch.autocast("cpu", torch.float16):
            found = decode(overflowing, z)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        # It is said once, and the second time half precision is not tried.
        assert caplog.text.count("half precision overflows") == 1, again


def test_latents_that_are_no_numbers_are_not_mended_by_precision(overflowing, caplog):
    with torch.autocast("cpu", torch.float16):
        found = decode(overflowing, torch.full((1, 4, 8, 8), float("nan")))
    assert not torch.isfinite(found).any() and not caplog.text
