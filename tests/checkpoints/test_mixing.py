"""`convert.py --mix`: trained weights interpolated with those that they were trained from."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoints.export import sha256, write_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import convert
from tests.support import families, golden

UNET = "model.diffusion_model.out.2.weight"
WORDS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
VAE = "first_stage_model.decoder.conv_in.weight"


def state_of(family="v1"):
    model = LatentDiffusion(**families.params(family))
    if family == "v1":
        golden.load_golden_weights(model)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, and the same with other weights everywhere and two further words."""
    folder = tmp_path_factory.mktemp("mixing")
    base = state_of()
    write_weights(folder / "base.safetensors", base, families.config(), {})
    random = torch.Generator().manual_seed(0)
    tuned = {
        key: value + torch.randn(value.shape, generator=random)
        if value.is_floating_point() and value.ndim > 1
        else value
        for key, value in base.items()
    }
    tuned[WORDS] = torch.cat([tuned[WORDS], torch.ones(2, tuned[WORDS].shape[1])])
    write_weights(folder / "tuned.safetensors", tuned, families.config(), {"steps": 7})
    return folder


def run(folder, output, share, *more, base="base.safetensors"):
    """Call the command; return its status."""
    flags = ["--ckpt", str(folder / "tuned.safetensors"), "--output", str(output)]
    return convert.main([*flags, "--mix", str(folder / base), share, *more])


def test_networks_are_interpolated_and_the_autoencoder_and_new_words_stay(files, tmp_path):
    assert run(files, tmp_path / "mix.safetensors", "0.3") == 0
    base, tuned, mix = (
        load_file(path)
        for path in (
            files / "base.safetensors",
            files / "tuned.safetensors",
            tmp_path / "mix.safetensors",
        )
    )
    assert mix.keys() == tuned.keys()
    rows = len(base[WORDS])
    for key, value in tuned.items():
        if key.startswith(("model.", "cond_stage_model.")) and value.is_floating_point():
            expected = 0.7 * value[: len(base[key])] + 0.3 * base[key]
            assert torch.allclose(mix[key][: len(base[key])], expected, atol=1e-6), key
        else:
            assert torch.equal(mix[key], value), key
    assert torch.equal(mix[WORDS][rows:], torch.ones_like(mix[WORDS][rows:]))
    with safe_open(tmp_path / "mix.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["training"])
    digest = sha256(files / "base.safetensors")
    assert facts["mixed"] == {"share": 0.3, "file": "base.safetensors", "sha256": digest}
    assert facts["steps"] == 7


def test_the_ends_are_the_two_models_bit_for_bit(files, tmp_path):
    base, tuned = (load_file(files / f"{name}.safetensors") for name in ("base", "tuned"))
    for share, expected in (("0", tuned), ("1", base)):
        assert run(files, tmp_path / f"{share}.safetensors", share) == 0
        mix = load_file(tmp_path / f"{share}.safetensors")
        assert torch.equal(mix[UNET], expected[UNET])
        assert torch.equal(mix[VAE], tuned[VAE])


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("v1-inpainting", {}, "'model.diffusion_model.input_blocks.0.0.weight' has the shape"),
        ("v1", {"parameterization": "v"}, "predicts is v, not eps"),
        ("v1", {"linear_end": 0.02}, "another noise schedule"),
        ("v1", {"scale_factor": 0.5}, "scale_factor is 0.5"),
        ("v1", {}, "the same weights"),
    ],
)
def test_another_kind_of_model_is_refused(files, tmp_path, caplog, family, change, reason):
    params = {**families.params(family), **change}
    config = {"model": {**families.config(family)["model"], "params": params}}
    if reason == "the same weights":
        other = load_file(files / "tuned.safetensors")
    else:
        other = LatentDiffusion(**params).state_dict()
    write_weights(tmp_path / "other.safetensors", other, config, {})
    status = run(files, tmp_path / "mix.safetensors", "0.3", base=tmp_path / "other.safetensors")
    assert status == 1
    assert reason in caplog.text and "other.safetensors" in caplog.text
    assert not (tmp_path / "mix.safetensors").exists()


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan", "much"])
def test_what_is_no_share_is_refused(files, tmp_path, caplog, share):
    assert run(files, tmp_path / "mix.safetensors", share) == 1
    assert f"{share}: expected a share from 0 to 1" in caplog.text


@pytest.mark.parametrize("flag", [["--keep_ema"], ["--only", "model."]])
def test_what_does_not_go_with_a_mix_is_refused(files, tmp_path, caplog, flag):
    assert run(files, tmp_path / "mix.safetensors", "0.3", *flag) == 1
    assert f"does not go with {flag[0]}" in caplog.text


def test_the_base_is_not_written_over(files, caplog):
    before = (files / "base.safetensors").read_bytes()
    assert run(files, files / "base.safetensors", "0.3") == 1
    assert "is the file that --mix reads" in caplog.text
    assert (files / "base.safetensors").read_bytes() == before
