"""Diffusers folders as people have them, and autoencoders by themselves: each is the same model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.pipeline_folder import save_pipeline, schedule_of_pipeline
from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.text_to_image import load_model
from ldm.training.initial_weights import Start, build_model
from scripts import convert
from tests.support import families, golden
from tests.support.runs import same

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
FILES = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}


@pytest.fixture(scope="module")
def model():
    found = LatentDiffusion(**families.params("v1"))
    golden.load_golden_weights(found)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def pipeline(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(model, families.params("v1"), path)
    return path


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    return families.yaml(tmp_path_factory.mktemp("config"))


@pytest.fixture
def folder(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "pipeline")


def shards(weights, file, suffix, variant=""):
    """Two files and their index, named as diffusers and transformers do."""
    middle = f".{variant}" if variant else ""
    names = [f"{file.name}{middle}-0000{n}-of-00002{suffix}" for n in (1, 2)]
    keys = list(weights)
    for number, name in enumerate(names):
        part = {key: weights[key] for key in keys[number::2]}
        write(part, file.with_name(name))
    weight_map = {key: names[number % 2] for number, key in enumerate(keys)}
    index = file.with_name(f"{file.name}{suffix}.index{middle}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write(weights, path):
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)


FORMS = {
    "fp16 names": lambda weights, file: write(
        weights, file.with_name(f"{file.name}.fp16.safetensors")
    ),
    "bin": lambda weights, file: write(weights, file.with_name(f"{old(file)}.bin")),
    "fp16 names of bin": lambda weights, file: write(
        weights, file.with_name(f"{old(file)}.fp16.bin")
    ),
    "non_ema": lambda weights, file: write(
        weights, file.with_name(f"{file.name}.non_ema.safetensors")
    ),
    "shards": lambda weights, file: shards(weights, file, ".safetensors"),
    "fp16 shards": lambda weights, file: shards(weights, file, ".safetensors", "fp16"),
    "bin shards": lambda weights, file: shards(weights, file.with_name(old(file)), ".bin"),
    "fp16 bin shards": lambda weights, file: shards(
        weights, file.with_name(old(file)), ".bin", "fp16"
    ),
}


def old(file):
    """What transformers called a .bin file."""
    return "pytorch_model" if file.parent.name == "text_encoder" else file.name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_weights_is_read(form, folder, state, yaml):
    for stem in FILES.values():
        weights = load_file(folder / f"{stem}.safetensors")
        (folder / f"{stem}.safetensors").unlink()
        FORMS[form](weights, folder / stem)
    assert same(dict(load_model(folder, yaml).state_dict()), state)


def test_the_most_exact_of_several_forms_is_read(folder, state, yaml):
    stem = folder / FILES["unet"]
    weights = {
        key: torch.zeros_like(value) for key, value in load_file(f"{stem}.safetensors").items()
    }
    write(weights, stem.with_name(f"{stem.name}.fp16.safetensors"))
    write(weights, stem.with_name(f"{stem.name}.bin"))
    assert same(dict(load_model(folder, yaml).state_dict()), state)


def test_shards_without_their_index(folder, yaml):
    stem = folder / FILES["unet"]
    stem.with_name(f"{stem.name}.safetensors").rename(
        stem.with_name(f"{stem.name}-00001-of-00002.safetensors")
    )
    with pytest.raises(
        UserError, match=r"a piece of a sharded file, whose index .* is not beside it"
    ):
        load_model(folder, yaml)


def test_a_pointer_in_a_folder_is_named(folder, yaml):
    """As a folder is that was cloned without Git LFS."""
    path = folder / f"{FILES['vae']}.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 334643276\n")
    with pytest.raises(
        UserError, match=r"vae/diffusion_pytorch_model\.safetensors: a Git LFS pointer"
    ):
        load_model(folder, yaml)


def test_a_training_and_a_lora_start_from_a_folder(folder, state, yaml, tmp_path):
    found, report = build_model(RunConfig(families.config()), Start(folder), resumes=False)
    assert same(dict(found.state_dict()), state) and str(folder) in report
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.save({**state, key: state[key] + 1}, tuned := tmp_path / "tuned.ckpt")
    output = tmp_path / "lora.safetensors"
    command = [
        "--ckpt",
        str(tuned),
        "--lora_base",
        str(folder),
        "--config",
        str(yaml),
        "--output",
        str(output),
    ]
    assert convert.main([*command, "--rank", "1"]) == 0
    assert all("mid_block" in name for name in load_file(output))


# The scheduler


SCALED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@pytest.mark.parametrize(
    "kind", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_any_scheduler_says_the_schedule(kind, folder, state, yaml):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, "prediction_type": "v_prediction", **SCALED}))
    found = schedule_of_pipeline(folder)
    assert (found["linear_start"], found["linear_end"], found["beta_schedule"]) == (
        0.00085,
        0.012,
        "linear",
    )
    assert (found["parameterization"], found["timesteps"], found["zero_terminal_snr"]) == (
        "v",
        1000,
        False,
    )
    assert same(dict(load_model(folder, yaml).state_dict()), state)


def test_another_prediction_than_the_configs_is_said(folder, yaml, caplog):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    load_model(folder, yaml)
    assert "was trained with parameterization v; the config's eps is used" in caplog.text


def test_a_schedule_that_is_not_ours_is_refused(folder, yaml):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(
        UserError, match="the schedule of its FlowMatchEulerDiscreteScheduler is not one that"
    ):
        load_model(folder, yaml)


# An autoencoder by itself


@pytest.mark.parametrize("place", ["folder", "vae folder", "file", "bin"])
def test_an_autoencoder_of_diffusers(place, folder, state, yaml, tmp_path):
    file = folder / f"{FILES['vae']}.safetensors"
    other = {key: value + 1 for key, value in load_file(file).items()}
    save_file(other, file)
    torch.save(other, tmp_path / "vae.bin")
    given = {
        "folder": folder,
        "vae folder": folder / "vae",
        "file": file,
        "bin": tmp_path / "vae.bin",
    }[place]
    torch.save(state, original := tmp_path / "original.ckpt")
    output = tmp_path / "model.safetensors"
    command = [
        "--ckpt",
        str(original),
        "--config",
        str(yaml),
        "--vae",
        str(given),
        "--output",
        str(output),
    ]
    assert convert.main(command) == 0
    found = load_file(output)
    for key, value in state.items():
        assert torch.equal(
            found[key], value + 1 if key.startswith("first_stage_model.") else value
        ), key


def test_an_autoencoder_for_other_latents_is_refused(folder, state, yaml, tmp_path, caplog):
    """That of Stable Diffusion XL has the same shape, and draws something else."""
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.13025}))
    torch.save(state, original := tmp_path / "original.ckpt")
    output = tmp_path / "model.safetensors"
    command = [
        "--ckpt",
        str(original),
        "--config",
        str(yaml),
        "--vae",
        str(folder),
        "--output",
        str(output),
    ]
    assert convert.main(command) == 1
    assert "whose latents are scaled by 0.13025" in caplog.text and not output.exists()


def test_another_part_of_a_pipeline_is_no_autoencoder(folder, state, yaml, tmp_path, caplog):
    torch.save(state, original := tmp_path / "original.ckpt")
    output = tmp_path / "model.safetensors"
    command = ["--ckpt", original, "--config", yaml, "--vae", folder / "unet", "--output", output]
    assert convert.main(list(map(str, command))) == 1
    assert "unet: no autoencoder in it: it is a UNet2DConditionModel; give" in caplog.text
    assert not output.exists()


def test_a_file_without_an_autoencoder_gets_one(folder, state, yaml, tmp_path):
    rest = {key: value for key, value in state.items() if not key.startswith("first_stage_model.")}
    torch.save(rest, path := tmp_path / "no-vae.ckpt")
    with pytest.raises(
        UserError, match=r"it has no autoencoder: a file with all three networks is needed"
    ):
        load_model(path, yaml)
    output = tmp_path / "model.safetensors"
    command = [
        "--ckpt",
        str(path),
        "--config",
        str(yaml),
        "--vae",
        str(folder),
        "--output",
        str(output),
    ]
    assert convert.main(command) == 0
    assert same(dict(load_model(output).state_dict()), state)


# Refused before any work


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "{pipeline}/"], "is there already"),
        (["--output", "{file}"], "is the file that --ckpt reads"),
        (
            ["--output", "{pipeline}/unet/diffusion_pytorch_model.safetensors"],
            "is there already; give another name, or --overwrite",
        ),
        (["--output", "x/", "--keep_ema"], "has one set of weights"),
        (["--output", "x/", "--only", "model."], "has all of the weights"),
        (["--output", "x/", "--lora_base", "{file}"], "--lora_base writes a .safetensors file"),
        (
            ["--output", "x.safetensors", "--lora_base", "{file}", "--vae", "{file}"],
            "does not go with --vae",
        ),
        (
            ["--output", "x.safetensors", "--lora_base", "{file}", "--rank", "0"],
            "--rank 0: expected 1 or more",
        ),
        (
            ["--output", "x.safetensors", "--lora", "{file}", "--strength", "nan"],
            "--strength nan: expected a number",
        ),
    ],
)
def test_flags_are_refused_before_anything_is_read(
    flags, message, pipeline, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "open", None)  # that nothing calls
    (file := tmp_path / "model.safetensors").touch()
    given = [flag.format(pipeline=pipeline, file=file) for flag in flags]
    assert convert.main(["--ckpt", str(file), *given]) == 1
    assert message in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
