"""A file or folder that cannot be used is named as what it is, in one line, with the way out."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.other_files import of_weights
from ldm.checkpoints.reading import read_checkpoint
from ldm.errors import UserError
from scripts import convert
from tests.support import families

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4265380512\n"


def picture():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


def archive(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x" * 100)
    return file.getvalue()


def numpy_file(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


FILES = {
    "empty": (b"", "it is empty"),
    "Git LFS pointer": (POINTER, r"a Git LFS pointer, not the file of 4\.27 GB .*git lfs pull"),
    "HTML page": (b"\n<!DOCTYPE html>\n<html lang='en'><title>Sign in</title>", "an HTML page.* download the file"),
    "HTML in capitals": (b"<HTML><HEAD><TITLE>404 Not Found</TITLE>", "an HTML page"),
    "XML error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text.*AccessDenied"),
    "JSON error": (b'{"error": "Access to model is restricted"}', "a JSON text.*Access to model is restricted"),
    "words": (b"Entry not found, or you have no access to it.", "a text, not a checkpoint: 'Entry not found"),
    "zeros": (b"\0" * 9000, "zeros alone, as an unfinished download"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\1" * 100, "a GGUF file.*safetensors"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff onnx", "an ONNX model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file"),
    "picture": (picture(), "a picture"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "a gzip archive.*unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\1" * 100, "a 7z archive.*unpack it"),
    "zip of a model": (archive("readme.txt", "v1-5.safetensors"), r"a zip archive.*unpack "
                                                                  r"it.*'v1-5\.safetensors'"),
    "numpy arrays": (numpy_file(np.savez, np.ones(3)), "numpy arrays"),
    "numpy array": (numpy_file(np.save, np.ones(30)), "a numpy array"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_files_of_something_else_are_named(kind, suffix, tmp_path):
    content, expected = FILES[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as raised:
        read_checkpoint(path)
    message = str(raised.value)
    assert (
        message.startswith(f"{path}: ")
        and "\n" not in message
        and "invalid load key" not in message
    )


@pytest.mark.parametrize("command", ["convert", "base", "vae"])
def test_the_command_names_them_wherever_they_are_given(command, tmp_path, caplog):
    (pointer := tmp_path / "pointer.safetensors").write_bytes(POINTER)
    torch.save({"a.weight": torch.ones(2, 2)}, good := tmp_path / "good.ckpt")
    given = {
        "convert": ["--ckpt", pointer],
        "base": ["--ckpt", good, "--lora_base", pointer],
        "vae": ["--ckpt", good, "--vae", pointer, "--config", families.yaml(tmp_path)],
    }
    output = tmp_path / "out.safetensors"
    assert convert.main([*map(str, given[command]), "--output", str(output)]) == 1
    assert "a Git LFS pointer" in caplog.text and not output.exists()


@pytest.mark.parametrize("suffix", [".part", ".crdownload"])
def test_unfinished_downloads(suffix, tmp_path):
    (path := tmp_path / f"model.ckpt{suffix}").write_bytes(b"PK\x03\x04" + b"\1" * 100)
    with pytest.raises(UserError, match=rf"an unfinished download \({suffix}\)"):
        read_checkpoint(path)


# Weights of something else

TENSOR = torch.ones(4, 4)
UNET = "model.diffusion_model."
STRANGERS = {
    "a LoRA": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_te1_text_model.lora_up.weight"],
    "a LoRA ": ["unet.mid_block.attentions.0.to_q.lora_A.weight"],
    "a LoRA  ": ["lora_unet_down_blocks_0.hada_w1_a"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.input_hint_block.0.weight"],
    "a ControlNet ": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a T2I-Adapter": ["body.0.block1.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "an upscaler": ["model.1.sub.0.RDB1.conv1.0.weight"],
    "a Stable Diffusion XL model": ["conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"],
    "a Stable Diffusion XL "
    "model ": [UNET + "label_emb.0.0.weight", UNET + "input_blocks.0.0.weight"],
    "a Stable Diffusion 3 model": [UNET + "joint_blocks.0.context_block.attn.qkv.weight"],
    "a Flux model": ["double_blocks.0.img_attn.qkv.weight"],
    "a Flux model ": [UNET + "double_blocks.0.img_attn.qkv.weight"],
    "a Stable Cascade model": ["clip_txt_mapper.weight"],
    "a DeepFloyd IF model": ["encoder_pooling.0.weight", "input_blocks.0.0.weight", "aug_proj.0.weight"],
    "a model of imagen-pytorch": ["unets.0.init_conv.convs.0.weight", "unets.1.to_time_hiddens.0.weights"],
    "a GLIDE model": ["transformer_proj.weight", "token_embedding.weight", "input_blocks.0.0.weight"],
    "a model with quantised weights": [UNET + "out.2.weight.absmax", UNET + "out.2.weight"],
    "an autoencoder alone": ["encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight"],
    "an autoencoder alone ": ["first_stage_model.encoder.conv_in.weight"],
    "the UNet of a diffusers "
    "pipeline alone": ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    "a text encoder alone": ["text_model.embeddings.token_embedding.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGERS)
def test_weights_of_something_else_are_named_when_a_model_is_needed(kind, tmp_path):
    save_file({key: TENSOR.clone() for key in STRANGERS[kind]}, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors", families.config())
    with pytest.raises(UserError, match=rf"x\.safetensors: {kind.strip()}.*: ") as raised:
        checkpoint.build()
    assert "tensors are missing" not in str(raised.value)


@pytest.mark.parametrize(
    "kind", ["a LoRA", "a ControlNet", "a Stable Diffusion XL model", "a Flux model"]
)
def test_the_command_writes_no_model_of_them(kind, tmp_path, caplog):
    save_file({key: TENSOR.clone() for key in STRANGERS[kind]}, tmp_path / "x.safetensors")
    output = tmp_path / "model.safetensors"
    assert convert.main(["--ckpt", str(tmp_path / "x.safetensors"), "--output", str(output)]) == 1
    assert kind in caplog.text and not output.exists()


def test_a_network_alone_is_converted_by_itself(tmp_path):
    """Of our own trainings of an autoencoder and of CLIP, too."""
    save_file(
        {key: TENSOR.clone() for key in STRANGERS["an autoencoder alone"]},
        tmp_path / "vae.safetensors",
    )
    assert (
        convert.main(
            ["--ckpt", str(tmp_path / "vae.safetensors"), "--output", str(tmp_path / "vae.ckpt")]
        )
        == 0
    )


def test_no_model_of_ours_is_taken_for_something_else():
    from ldm.models.diffusion.ddpm import LatentDiffusion

    for family in ("v1", "v2", "v1-inpainting"):
        with torch.device("meta"):
            assert of_weights(LatentDiffusion(**families.params(family)).state_dict()) is None


CONTENTS = {
    "a textual-inversion embedding": {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.ones(1, 768)},
    },
    "a textual-inversion embedding ": {"<my-dog>": torch.ones(768)},
    "a hypernetwork": {320: [{"linear.weight": TENSOR}, {}], "step": 3, "name": "x"},
    "the state of an optimizer alone": {
        "state": {0: {"exp_avg": TENSOR}},
        "param_groups": [{"lr": 1e-6}],
    },
    "an IP-Adapter": {
        "image_proj": {"proj.weight": TENSOR},
        "ip_adapter": {"1.to_k_ip.weight": TENSOR},
    },
    "not weights: its 'model' is a whole pickled module": {"model": torch.nn.Linear(2, 2)},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_of_something_else_are_named(kind, tmp_path):
    torch.save(CONTENTS[kind], tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x\.pt: {kind.strip()}.*: "):
        Checkpoint.open(tmp_path / "x.pt")


# Folders, and what is not there


def test_folders_are_named(tmp_path):
    def named(folder, *files):
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(
                json.dumps({"_class_name": "UNet2DConditionModel"}) if "config" in file else "{}"
            )
        with pytest.raises(UserError) as raised:
            Checkpoint.open(folder)
        return str(raised.value)

    assert "give a file of weights" in named(tmp_path / "nothing", "notes.txt")
    assert "give the file in it, such as" in named(tmp_path / "one", "sd-v1-4.ckpt")
    assert f"a run's folder: give the checkpoint in it, {tmp_path}/run/checkpoints" in named(
        tmp_path / "run", "checkpoints/last.ckpt"
    )
    assert "snapshots/abc" in named(tmp_path / "cache", "snapshots/abc/model_index.json")
    assert "zero_to_fp32.py" in named(tmp_path / "deepspeed", "zero_to_fp32.py", "latest")
    assert "dcp_to_torch" in named(tmp_path / "distributed", ".metadata", "__0_0.distcp")
    assert "one part of a diffusers pipeline" in named(tmp_path / "pipe/unet", "config.json")
    assert "a pipeline of another kind" in named(
        tmp_path / "flux", "transformer/config.json", "model_index.json"
    )
    assert "a pipeline of another kind" in named(
        tmp_path / "xl", "unet/config.json", "text_encoder_2/config.json"
    )
    (tmp_path / "if" / "unet").mkdir(parents=True)
    (tmp_path / "if/model_index.json").write_text(json.dumps({"_class_name": "IFPipeline"}))
    with pytest.raises(
        UserError, match=r"a pipeline of a DeepFloyd IF model \(IFPipeline\): not read"
    ):
        Checkpoint.open(tmp_path / "if")


def test_what_is_not_there(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "sd-v1-4.ckpt")
    with pytest.raises(UserError, match=r"no such checkpoint \(did you mean 'sd-v1-4\.ckpt'\?\)"):
        read_checkpoint(tmp_path / "sd-v1_4.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "gone.ckpt")
    with pytest.raises(
        UserError, match=r"no such checkpoint: a link to .*gone\.ckpt, which is not there"
    ):
        read_checkpoint(tmp_path / "link.ckpt")


def test_one_of_several_files_names_their_index(tmp_path):
    save_file({"a": torch.ones(1)}, path := tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"one of 2 files .*: give their index, .*model\.safetensors\.index\.json"
    ):
        Checkpoint.open(path)
