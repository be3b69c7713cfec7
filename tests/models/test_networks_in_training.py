"""How the networks compute a gradient changes none: recomputation, compilation, layouts,
autocast.
"""

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.support.models import (
    UNET,
    batch,
    build,
    gradients,
    step,
    unet_inputs,
)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(autocast, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    for module in ("ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"):
        monkeypatch.setattr(
            f"{module}.checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k)
        )
    models = [build({"use_checkpoint": on}, {"use_checkpoint": on}) for on in (False, True)]
    plain, expected = gradients(models[0], autocast)
    assert not calls
    loss, checkpointed = gradients(models[1], autocast)
    assert len(calls) == sum(hasattr(m, "use_checkpoint") for m in models[1].model.modules()) > 0
    assert any(
        getattr(m, "gradient_checkpointing", False) for m in models[1].cond_stage_model.modules()
    )
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert checkpointed.keys() == expected.keys()
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (checkpointed[name] - grad).abs().max() <= 1e-6 * scale, name


def test_attention_alone_is_checkpointed(monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    for module in ("ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"):
        monkeypatch.setattr(
            f"{module}.checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k)
        )
    plain, expected = gradients(build({"use_checkpoint": False}), False)
    assert not calls
    loss, found = gradients(build({"use_checkpoint": "attention"}), False)
    assert calls and all(isinstance(call.__self__, BasicTransformerBlock) for call in calls)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert all(
        torch.allclose(found[name], grad, rtol=1e-4, atol=1e-7) for name, grad in expected.items()
    )
    with pytest.raises(
        UserError, match="use_checkpoint: expected true, false, attention or auto, got 'attn'"
    ):
        UNetModel(**{**UNET, "use_checkpoint": "attn"})


@pytest.mark.parametrize("use_checkpoint", [True, "attention"])
def test_compiled_and_channels_last_change_no_gradient(use_checkpoint):
    plain, expected = gradients(build(), False)
    # torch's own backend for tests: the graphs are traced, and run as they are.
    changed = {
        "use_checkpoint": use_checkpoint,
        "channels_last": True,
        "compile": {"backend": "eager"},
    }
    model = build(changed)
    model.configure_model()
    weight = model.model.diffusion_model.middle_block[0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert model.state_dict().keys() == build().state_dict().keys()
    torch._dynamo.utils.counters.clear()
    loss, found = gradients(model, False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # sampling is not compiled
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        step(model, batch(1, 2, 3))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_unet_that_is_compiled_for_sampling_computes_the_same():
    model = build({"channel_mult": [1], "attention_resolutions": [1], "use_checkpoint": False})
    unet, inputs = model.model.diffusion_model, unet_inputs()
    with torch.no_grad():
        expected = unet(*inputs)
        unet.compile_for_sampling({"backend": "eager"})
        torch._dynamo.utils.counters.clear()
        found = unet(*inputs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_compile_options_that_torch_does_not_take():
    with pytest.raises(UserError, match=r"compile: .*bakend"):
        UNetModel(**{**UNET, "compile": {"bakend": "eager"}})


def test_autocast_is_close_to_full_precision():
    model = build()
    full, halved = gradients(model, False)[0], gradients(model, True)[0]
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, full, rtol=0.05, atol=0)


@pytest.mark.parametrize("pair", [False, True])
def test_seeds_stay_where_the_processor_draws_with_them(pair):
    """On their way back from a GPU they would make it wait, in each step."""
    given = {"image": torch.zeros(1, 8, 8, 3), "noise_seed": torch.tensor([3])}
    moved = build().transfer_batch_to_device(
        (given, given) if pair else given, torch.device("meta"), 0
    )
    for part in moved if pair else [moved]:
        assert part["image"].is_meta and part["noise_seed"].tolist() == [3]
    assert given["image"].device.type == "cpu"
