"""A stranger's weights are recognised from keys and shapes, and an error names the config that
fits.
"""

import pytest
import torch

from ldm.checkpoints.families import CONFIGS, FAMILIES, config_for, recognise
from ldm.checkpoints.loading import compare
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.util import instantiate_from_config
from tests.support import golden

every_config = pytest.mark.parametrize(
    "name", [name for family in FAMILIES for name in family.configs]
)


def on_meta(name):
    """The model of a config, without memory for its weights."""
    config = to_plain(load_config([CONFIGS / name]))["model"]
    with torch.device("meta"):
        return instantiate_from_config({key: config[key] for key in ("target", "params")}, "model")


@every_config
def test_every_config_is_recognised_from_its_weights(name):
    state = on_meta(name).state_dict()
    family = recognise(state)
    assert family is not None and name in family.configs
    if len(family.configs) == 1:
        assert config_for(state, "model.ckpt") == CONFIGS / name


def test_noise_or_velocity_is_not_guessed():
    with pytest.raises(
        UserError, match=r"v2-inference\.yaml or .*v2-inference-v\.yaml.* give --config"
    ):
        config_for(on_meta("v2-inference.yaml").state_dict(), "v2.ckpt")


def test_weights_of_no_family():
    state = golden.latent_diffusion().state_dict()
    assert recognise(state) is None and recognise({"weight": torch.zeros(1)}) is None
    with pytest.raises(UserError, match=r"x\.ckpt: it does not say which config .* give --config"):
        config_for(state, "x.ckpt")


def test_a_config_that_does_not_fit_names_the_one_that_does():
    v1, inpainting = (
        on_meta("v1-inference.yaml"),
        on_meta("v1-inpainting-inference.yaml").state_dict(),
    )
    with pytest.raises(
        UserError, match=r"inpainting \(configs/stable-diffusion/v1-inpainting-inference\.yaml\)"
    ):
        compare(v1, inpainting, "inpainting.ckpt")
    with pytest.raises(
        UserError, match=r"the file is Stable Diffusion 1 \(configs/.*/v1-inference\.yaml\)"
    ):
        compare(on_meta("v2-inference.yaml"), v1.state_dict(), "v1.ckpt")


# The text encoder of v2

TEXT = {"width": 32, "heads": 2, "layers": 3}


def test_the_last_layer_is_what_open_clip_pools():
    embedder = FrozenOpenCLIPEmbedder(text_config=TEXT, layer="last")
    captions = ["a photo of a sks dog", ""]
    ends = embedder.tokenize(captions).argmax(1)
    pooled = embedder(captions)[torch.arange(2), ends] @ embedder.model.text_projection
    torch.testing.assert_close(pooled, embedder.model.encode_text(embedder.tokenize(captions)))


def test_the_penultimate_layer_leaves_the_last_block_out():
    penultimate, last = (
        FrozenOpenCLIPEmbedder(text_config=TEXT, layer=layer) for layer in ("penultimate", "last")
    )
    last.load_state_dict(penultimate.state_dict())
    expected = penultimate(["a dog"])
    assert not torch.allclose(last(["a dog"]), expected)
    del last.model.transformer.resblocks[-1]
    torch.testing.assert_close(last(["a dog"]), expected)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    embedder = FrozenOpenCLIPEmbedder(text_config=TEXT)
    for recompute in (False, True):
        embedder.model.transformer.grad_checkpointing = recompute
        embedder.zero_grad()
        embedder(["a photo of a dog"]).square().sum().backward()
        gradients.append(embedder.token_embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_padding_is_zero_as_open_clip_pads():
    from open_clip import get_tokenizer

    texts = ["a photo of a sks dog", "word " * 100]
    assert torch.equal(
        FrozenOpenCLIPEmbedder(text_config=TEXT).tokenize(texts), get_tokenizer("ViT-H-14")(texts)
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layer": "first"}, "layer: unknown 'first'.*accepted: last, penultimate"),
        ({"arch": "ViT-H-114"}, "open_clip has no 'ViT-H-114'.*did you mean 'ViT-H-14'"),
        ({"text_config": {"widht": 3}}, "text_config: .*widht"),
        ({"text_config": {"layers": 0}}, r"text_config\.layers: expected 1 or more, got 0"),
        ({"text_config": {**TEXT, "layers": 1}}, "layer: penultimate of 1 leaves no layer to read"),
        ({"text_config": {**TEXT, "heads": 5}}, "text_config: embed_dim must be divisible by"),
        ({"text_config": {**TEXT, "vocab_size": 9}}, "vocab_size: 9 is below CLIP's 49408"),
        ({"max_length": 78, "text_config": TEXT}, "max_length: 78 exceeds context_length 77"),
    ],
)
def test_text_encoders_that_cannot_be_built(wrong, message):
    with pytest.raises(UserError, match=message):
        FrozenOpenCLIPEmbedder(**wrong)
