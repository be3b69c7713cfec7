"""The published encoders, with fixed random weights: their arithmetic, files and preprocessing."""

import json
import random

import lpips
import numpy as np
import open_clip
import pytest
import timm
import torch
import torchmetrics.functional as tmf
from PIL import Image
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.evaluation.encoders import HALF, IMAGENET, OPENAI, Clip, Dino, Lpips, preprocess
from ldm.evaluation.metrics import similarity
from ldm.evaluation.protocols import PROTOCOLS, Preprocessing

VIT = "vit_tiny_patch16_224"  # ViT-S/16 of a third of the width


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures of odd sizes, wide and high."""
    generator = np.random.default_rng(0)
    sizes = [(301, 226), (224, 224), (97, 180), (640, 333), (255, 257)]
    coarse = [generator.integers(0, 255, (6, 5, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(a).resize(size, 3) for a, size in zip(coarse, sizes)]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(VIT, num_classes=0).eval()


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A CLIP of open_clip's, registered under a name, and its file in a hub's layout."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1,
        },
    }  # fmt: skip
    (folder / "clip-of-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "clip-of-tests.json")
    torch.manual_seed(1)
    network = open_clip.create_model("clip-of-tests").eval()
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return network, folder


def by_hand(picture, pixels, mean, std):
    """The published preprocessing, written with Pillow alone."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(pixels.resize * long / short)
    size = (pixels.resize, other) if width <= height else (other, pixels.resize)
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - pixels.crop) / 2.0) for side in size)
    cut = np.asarray(scaled.crop((left, top, left + pixels.crop, top + pixels.crop)))
    tensor = torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 255
    return (tensor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_preprocessing_is_the_published_one_to_the_bit(pictures):
    of_timm = timm.data.create_transform(
        (3, 224, 224),
        interpolation="bicubic",
        crop_pct=224 / 256,
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
    of_open_clip = open_clip.image_transform(224, is_train=False, mean=OPENAI[0], std=OPENAI[1])
    of_dino, of_clip = Preprocessing(256, 224), Preprocessing(224, 224)
    for picture in pictures:
        dino = preprocess(of_dino, *IMAGENET)(picture)
        assert torch.equal(dino, by_hand(picture, of_dino, *IMAGENET))
        assert torch.equal(dino, of_timm(picture))
        clip = preprocess(of_clip, *OPENAI)(picture)
        assert torch.equal(clip, by_hand(picture, of_clip, *OPENAI))
        assert torch.equal(clip, of_open_clip(picture))


def test_the_protocols_pin_the_published_preprocessing():
    for name in ("paper", "kosmos-g", "dreambench++"):
        found = PROTOCOLS[name]
        assert (found.dino_pixels, found.clip_pixels) == (
            Preprocessing(256, 224),
            Preprocessing(224, 224),
        )
    assert timm.get_pretrained_cfg(PROTOCOLS["paper"].dino).mean == IMAGENET[0]
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["mean"] == OPENAI[0]


def test_dino_of_a_file_is_timms(tmp_path, vit, pictures):
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    found = Dino(VIT, tmp_path / "dino.pth")(pictures[:3])
    ready = torch.stack([by_hand(p, Preprocessing(256, 224), *IMAGENET) for p in pictures[:3]])
    with torch.no_grad():
        expected = vit.forward_features(ready)[:, 0]  # the class token behind the last norm
    norms = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, norms, rtol=1e-4, atol=1e-5)
    pairs = tmf.pairwise_cosine_similarity(expected[:1], expected[1:]).mean()
    assert similarity(found[:1], found[1:]) == pytest.approx(float(pairs), abs=1e-5)


def test_a_hash_is_of_the_weights_and_not_of_their_file(tmp_path, vit):
    """Of a plain file, of a hub's folder, and of a training with a head beside the encoder."""
    state = vit.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    prefixed = {f"module.backbone.{key}": value for key, value in state.items()}
    training = {"teacher": prefixed | {"module.head.mlp.0.weight": torch.zeros(1)}}
    torch.save(training, tmp_path / "training.pth")
    changed = {**state, "norm.bias": state["norm.bias"] + 1}
    torch.save(changed, tmp_path / "other.pth")
    found = [Dino(VIT, tmp_path / name).hash for name in ("", "training.pth", "other.pth")]
    assert found[0] == found[1] != found[2]


def test_scores_do_not_depend_on_batches_or_order(monkeypatch, tmp_path, vit, pictures):
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    encoder = Dino(VIT, tmp_path / "dino.pth")
    together = encoder(pictures)
    monkeypatch.setattr("ldm.evaluation.encoders.BATCH", 2)
    order = random.Random(0).sample(range(len(pictures)), len(pictures))
    shuffled = encoder([pictures[number] for number in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    real = together[:2]
    assert similarity(shuffled, real) == pytest.approx(similarity(together, real), abs=1e-6)


def test_clip_of_a_hub_folder_is_open_clips(small_clip, pictures):
    network, folder = small_clip
    encoder = Clip("clip-of-tests/openai", folder)
    transform = open_clip.image_transform(224, is_train=False, mean=OPENAI[0], std=OPENAI[1])
    texts = ["a dog in the snow", "a red vase"]
    with torch.no_grad():
        shown = network.encode_image(torch.stack([transform(p) for p in pictures[:2]]))
        said = network.encode_text(open_clip.get_tokenizer("clip-of-tests")(texts))
    found = (encoder(pictures[:2]) * encoder.text(texts)).sum(1)
    # CLIPScore (torchmetrics) is 100 times this cosine.
    expected = torch.nn.functional.cosine_similarity(shown, said)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lpips_of_a_file_is_lpips(tmp_path, pictures):
    torch.manual_seed(2)
    expected = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    features = {f"features.{k.partition('.')[2]}": v for k, v in expected.net.state_dict().items()}
    torch.save(features, tmp_path / "alexnet.pth")
    encoder = Lpips("alex", tmp_path / "alexnet.pth")
    squares = [picture.resize((256, 256)) for picture in pictures[:4]]
    tensors = [by_hand(p, Preprocessing(256, 256), *HALF)[None] for p in squares]
    with torch.no_grad():
        pairs = [expected(tensors[i], tensors[i + 2]).item() for i in range(2)]
    found = encoder(squares[:2], squares[2:])
    torch.testing.assert_close(found, torch.tensor(pairs), rtol=1e-4, atol=1e-6)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the backbone of LPIPS"):
        Lpips("alex", tmp_path / "other.pth")


def test_an_encoder_that_is_not_there_is_one_line(tmp_path, vit, small_clip):
    with pytest.raises(UserError, match="--dino FILE") as found:
        Dino("dino_vits16")  # the tests are offline
    assert "DINO vit_small_patch16_224.dino: not on this machine" in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="--clip FILE"):
        Clip("ViT-B-32-quickgelu/laion400m_e32")
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"dino\.pth: not the weights of CLIP"):
        Clip("clip-of-tests/openai", tmp_path / "dino.pth")
    with pytest.raises(UserError, match="not the weights of the DINO encoder"):
        Dino("vit_small_patch16_224", tmp_path / "dino.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights in this folder"):
        Dino(VIT, tmp_path / "empty")
