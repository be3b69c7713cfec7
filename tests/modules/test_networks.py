"""The UNet and the text encoders."""

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.attention import CrossAttention, texts_read_once
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from tests.support import golden
from tests.support.golden import rel
from tests.support.models import UNET, unet_inputs


@pytest.mark.parametrize("wrong, message", [
    ({"model_channels": 48}, "48 channels is not a multiple of the 32"),
    ({"num_heads": 5}, "32 channels cannot be split into attention heads"),
    ({"num_heads": -1, "num_head_channels": 24}, "32 channels cannot be split into "
                                                 "attention heads"),
    ({"num_heads": -1}, "num_heads: give it or num_head_channels"),
    ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks: has 3 entries for 2 in channel_mult"),
    ({"use_spatial_transformer": False}, "use_spatial_transformer: must be true"),
])  # fmt: skip
def test_unet_with_impossible_widths(wrong, message):
    with pytest.raises(UserError, match=message):
        UNetModel(**{**UNET, **wrong})


@torch.no_grad()
@pytest.mark.parametrize(
    "other", [{"num_heads": -1, "num_head_channels": 8}, {"num_res_blocks": [1, 1]}]
)
def test_two_ways_to_say_the_same_unet(other):
    # 8 channels a head are 4 heads at the first level and 8 at the second: only the keys are the
    # same there.
    first, second = UNetModel(**UNET), UNetModel(**{**UNET, **other})
    second.load_state_dict(first.state_dict())
    heads = [m.heads for m in second.modules() if hasattr(m, "heads")]
    assert set(heads) == ({4, 8} if "num_head_channels" in other else {4})


@torch.no_grad()
def test_a_new_unet_predicts_zero_and_linear_projections_are_the_convolutions():
    x, t, c = unet_inputs()
    unet = UNetModel(**UNET)
    assert not unet(x, t, c).any()
    golden.load_golden_weights(unet)
    linear = UNetModel(**UNET, use_linear_in_transformer=True)
    state = {
        key: value[..., 0, 0] if "proj_in.weight" in key or "proj_out.weight" in key else value
        for key, value in unet.state_dict().items()
    }
    linear.load_state_dict(state)
    assert rel(linear(x, t, c), unet(x, t, c)) < 1e-5


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(golden_model):
    x, t, c = unet_inputs()
    together = golden_model.apply_model(x, t, c)
    alone = golden_model.apply_model(x[1:], t[1:], c[1:])
    assert rel(alone, together[1:]) < 1e-5


@pytest.mark.parametrize("params, message", [
    ({"text_config": golden.TEXT_CONFIG, "max_length": 78}, "max_length: 78 exceeds "
                                                            "max_position_embeddings 77"),
    ({"text_config": {**golden.TEXT_CONFIG, "vocab_size": 1000}}, "vocab_size: 1000 is below "
                                                                  "CLIP's 49408"),
    ({"text_config": {"hiden_size": 32}}, "text_config.hiden_size: unknown field .did you mean "
                                          "'hidden_size'"),
    ({"text_config": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers: expected 1 or "
                                                "more, got 0"),
    ({"text_config": {"attention_dropout": 3.0}}, "text_config.attention_dropout: expected a share "
                                                  "from 0 to 1, got 3.0"),
    ({"version": "no/such/folder/at/all"}, "cannot load the hub model or local folder "
                                           "'no/such/folder/at/all'"),
])  # fmt: skip
def test_text_encoders_that_cannot_be_built(params, message):
    with pytest.raises(UserError, match=message):
        FrozenCLIPEmbedder(**params)


@torch.no_grad()
def test_text_encoder_from_a_folder_of_transformers(golden_model, tmp_path):
    golden_model.cond_stage_model.transformer.text_model.save_pretrained(tmp_path)
    loaded = FrozenCLIPEmbedder(version=str(tmp_path))
    texts = ["photo of a sks dog", ""]
    assert rel(loaded(texts), golden_model.cond_stage_model(texts)) < 1e-6
    with pytest.raises(UserError, match="cannot load the folder"):
        FrozenCLIPEmbedder(version=str(tmp_path.parent))


@torch.no_grad()
def test_shorter_texts(golden_model):
    short = FrozenCLIPEmbedder(max_length=10, text_config=golden.TEXT_CONFIG)
    short.load_state_dict(golden_model.cond_stage_model.state_dict())
    out = short.encode(["photo of a sks dog"])
    assert out.shape == (1, 10, 32)
    # Attention is causal: what is cut off behind does not matter.
    assert rel(out, golden_model.get_learned_conditioning(["photo of a sks dog"])[:, :10]) < 1e-5


def test_a_text_is_read_once_however_often_it_is_shown():
    """`texts_read_once` changes no bit, reads each text once, and forgets it afterwards."""
    torch.manual_seed(0)
    layer = CrossAttention(query_dim=8, context_dim=6, heads=2, dim_head=4)
    itself = CrossAttention(query_dim=8, context_dim=None, heads=2, dim_head=4)
    network = nn.ModuleList([layer, itself])
    texts = [torch.randn(2, 5, 6) for _ in range(2)]
    steps = [torch.randn(2, 7, 8) for _ in range(3)]
    reads: list[nn.Module] = []
    for attention in (layer, itself):
        attention.to_k.register_forward_hook(lambda module, *_: reads.append(module))

    def shown() -> list[torch.Tensor]:
        return [layer(x, text) + itself(x) for x in steps for text in texts]

    with torch.no_grad():
        expected = shown()
        reads.clear()
        with texts_read_once(network):
            found = shown()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        # Pixels change from step to step: self-attention keeps nothing.
        assert reads.count(layer.to_k) == len(texts)
        assert reads.count(itself.to_k) == len(found)

        # Weights may change afterwards, and so may the text.
        reads.clear()
        assert torch.equal(layer(steps[0], texts[0]) + itself(steps[0]), expected[0])
        assert reads.count(layer.to_k) == 1
