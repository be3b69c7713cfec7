"""What leaves for other programs: which weights, in what precision and format, with what in the
header.
"""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main
from ldm.checkpoints.ema import WEIGHTS, ema_weights
from ldm.checkpoints.export import DTYPES, in_dtype, write_weights
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.config import EXPORTS
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.text_to_image import load_model
from ldm.training import defaults
from scripts import convert
from tests.support import golden, runs
from tests.support.families import params
from tests.support.runs import same

FILES = {"ckpt": "m.ckpt", "safetensors": "m.safetensors", "pipeline": "pipeline"}


@pytest.fixture(scope="module")
def model():
    found = LatentDiffusion(**params("v1"))
    golden.load_golden_weights(found)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    """A file of ours."""
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    config = {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params("v1")}
    }
    write_weights(path, model.state_dict(), config, {"steps": 7})
    return path


@pytest.fixture(scope="module")
def yaml(original):
    """Its config, for pipelines, which do not carry it."""
    from omegaconf import OmegaConf

    path = original.with_name("config.yaml")
    OmegaConf.save(read_checkpoint(original)["config"], path)
    return path


def converted(source, target, *more):
    """The command, which must not fail; the target."""
    assert convert.main(["--ckpt", str(source), "--output", str(target), *map(str, more)]) == 0
    return target


# Formats and precisions


@pytest.mark.parametrize("second", FILES)
@pytest.mark.parametrize("first", FILES)
def test_every_pair_of_formats_gives_the_same_bits(first, second, original, yaml, tmp_path):
    path = original
    for number, kind in enumerate((first, second, "safetensors")):
        (tmp_path / str(number)).mkdir()
        path = converted(path, tmp_path / str(number) / FILES[kind], "--config", yaml)
    found, state = load_file(path), load_file(original)
    assert (
        found.keys() | {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
        == state.keys()
    )
    assert all(torch.equal(value, state[key]) for key, value in found.items())


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(dtype, kind, original, model, tmp_path):
    path = converted(original, tmp_path / FILES[kind], "--dtype", dtype)
    content = read_checkpoint(path)
    found, state = state_dict_of(content, path), model.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        rounded = value.to(DTYPES[dtype]) if value.ndim > 1 and value.is_floating_point() else value
        assert found[key].dtype == rounded.dtype and torch.equal(found[key], rounded), key
    assert (
        content["training"] == {"steps": 7}
        and content["config"]["model"]["params"]["image_size"] == 8
    )
    # What is rounded once is not rounded again.
    again = converted(path, tmp_path / "again.safetensors")
    assert same(load_file(again), dict(found))


def test_half_the_size(original, tmp_path):
    half = converted(original, tmp_path / "half.safetensors", "--dtype", "fp16")
    assert half.stat().st_size < 0.55 * original.stat().st_size


def test_a_pipeline_in_half_precision(original, tmp_path):
    folder = converted(original, tmp_path / "pipeline", "--dtype", "fp16")
    assert {
        v.dtype for v in load_file(folder / "unet/diffusion_pytorch_model.safetensors").values()
    } == {torch.float16}


def test_a_model_in_half_precision_samples_under_autocast(original, model):
    """As on a GPU, where autocast would make half-precision copies of the weights anyway."""
    half, x, t = (
        load_model(original, dtype=torch.bfloat16),
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
    )
    assert (
        half.model.diffusion_model.out[2].weight.dtype == torch.bfloat16
        and half.betas.dtype == torch.float32
    )

    def outputs(model):
        text = model.get_learned_conditioning(["photo of a sks dog", ""])
        return text, model.apply_model(x, t, text), model.decode_first_stage(x)

    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(half)
    for ours, exact in zip(found, outputs(model)):
        assert golden.rel(ours.float(), exact) < 0.05


def test_rounding_leaves_vectors_and_integers():
    state = {"w": torch.ones(2, 2), "b": torch.ones(2), "n": torch.ones(2, 2, dtype=torch.int64)}
    assert [v.dtype for v in in_dtype(state, torch.float16).values()] == [
        torch.float16,
        torch.float32,
        torch.int64,
    ]
    assert same(in_dtype(state, None), state)


def test_a_sharded_file(original, yaml, tmp_path):
    state, names = load_file(original), ("a.safetensors", "b.safetensors")
    for number, name in enumerate(names):
        save_file(dict(list(state.items())[number::2]), tmp_path / name)
    weight_map = {key: names[number % 2] for number, key in enumerate(state)}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = converted(
        tmp_path / "m.safetensors.index.json", tmp_path / "whole.safetensors", "--config", yaml
    )
    assert same(load_file(whole), state)


def test_writing_to_another_suffix(tmp_path):
    with pytest.raises(
        UserError, match=r"m\.pt: expected a name that ends in \.safetensors or \.ckpt"
    ):
        write_weights(tmp_path / "m.pt", {"a": torch.ones(1)}, {}, {})


def test_a_single_file_opens_in_diffusers(original, tmp_path):
    """With a local config, as it would be without a network."""
    diffusers = pytest.importorskip("diffusers")
    folder = converted(original, tmp_path / "pipeline")
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        original, config=str(folder), local_files_only=True, safety_checker=None
    )
    expected = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        assert same(
            dict(getattr(pipeline, part).state_dict()), dict(getattr(expected, part).state_dict())
        ), part


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_another_autoencoder(prefix, original, model, tmp_path, caplog):
    """As it is shared by itself, and inside another model."""
    ours = model.first_stage_model.state_dict()
    other = {prefix + key: value + 1 for key, value in ours.items()}
    torch.save({"state_dict": {**other, "loss.logvar": torch.zeros(1)}}, tmp_path / "vae.ckpt")
    found = load_file(
        converted(original, tmp_path / "m.safetensors", "--vae", tmp_path / "vae.ckpt")
    )
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value + 1 if key.startswith("first_stage_model.") else value)
    torch.save({"state_dict": dict(list(other.items())[1:])}, tmp_path / "vae.ckpt")
    command = [
        "--ckpt",
        str(original),
        "--vae",
        str(tmp_path / "vae.ckpt"),
        "--output",
        str(tmp_path / "x.ckpt"),
    ]
    assert convert.main(command) == 1
    assert f"'{next(iter(ours))}' is missing or different" in caplog.text


# Runs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.Workspace(tmp_path_factory.mktemp("export"))


def test_the_end_of_a_training(workspace, original, caplog):
    """`--export` writes the weights alone, with their history."""
    caplog.set_level("INFO")
    base = runs.config(workspace.path, lightning__trainer__max_steps=2)
    first = workspace.train("first", "--export", "fp16", base=base)
    (exported,) = (first / "checkpoints").glob("*.safetensors")
    assert f"exported  {exported}" in caplog.text
    with safe_open(exported, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    assert facts["prompts"] == ["photo of a sks dog"] and (
        facts["identifier"],
        facts["class_word"],
    ) == ("sks", "dog")
    assert (facts["steps"], facts["learning_rate"], facts["reg_weight"]) == (2, 1e-3, 1.0)
    assert facts["software"].startswith("dreambooth-ldm 0.") and "base_model" not in facts
    last = runs.checkpoint(first)["state_dict"]
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(load_file(exported)[key], last[key].half())

    second = workspace.train("second", "--actual_resume", str(exported), base=base)
    path = converted(second / "checkpoints" / "last.ckpt", workspace.path / "small.safetensors")
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert facts["base_model"] == {"file": exported.name, "sha256": digest}


def test_which_weights_a_training_starts_from(workspace, caplog):
    base = runs.config(
        workspace.path, model__params__use_ema="true", lightning__trainer__max_steps=2
    )
    run = workspace.train("averaging", base=base)
    last = run / "checkpoints" / "last.ckpt"
    state, key = runs.checkpoint(run)["state_dict"], "model.diffusion_model.time_embed.0.weight"
    average = state["model_ema." + key.removeprefix("model.").replace(".", "")]
    caplog.set_level("INFO")
    rate = ["model.base_learning_rate=1e-30", "--actual_resume", str(last)]  # that changes nothing
    for weights, expected in (("trained", state[key]), ("ema", average)):
        found = runs.checkpoint(workspace.train(weights, *rate, "--weights", weights))["state_dict"]
        assert torch.equal(found[key], expected)
    assert "averaged weights beside the trained ones" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "ema"], "--weights: says which of the weights of --actual_resume"),
        (["run.export=fp8"], "run.export: unknown 'fp8'; accepted: fp32, fp16, bf16"),
        (["--export", "fp8"], "argument --export: invalid choice"),
    ],
)
def test_flags_that_do_not_fit(flags, message, workspace, caplog):
    assert main.main(workspace.arguments("wrong", *flags)) == 1
    assert message in caplog.text
    assert not list(workspace.logs.glob("*_wrong"))


def test_flags_offer_what_there_is():
    assert tuple(DTYPES) == EXPORTS and defaults.WEIGHTS == WEIGHTS


# The command


def test_conversion_takes_the_averages_and_says_what_they_fit(tmp_path):
    base = runs.config(tmp_path, model__params__use_ema="true", lightning__trainer__max_steps=2)
    run = runs.Workspace(tmp_path).train("ema", base=base)
    checkpoint, output = run / "checkpoints" / "last.ckpt", tmp_path / "small.safetensors"
    command = ["--ckpt", str(checkpoint), "--output", str(output)]
    output.touch()
    assert convert.main([*command, "--dtype", "fp16"]) == 1
    assert convert.main([*command, "--dtype", "fp16", "--overwrite"]) == 0

    state = read_checkpoint(checkpoint)["state_dict"]
    key = "model.diffusion_model.input_blocks.0.0.weight"
    average = state["model_ema." + key.removeprefix("model.").replace(".", "")]
    assert not torch.equal(average, state[key])
    found = load_file(output)
    assert torch.equal(found[key], average.half())
    assert found["betas"].dtype == torch.float32
    assert not [name for name in found if name.startswith("model_ema")]
    assert output.stat().st_size < 0.3 * checkpoint.stat().st_size

    both, trained = tmp_path / "both.ckpt", tmp_path / "trained.safetensors"
    assert convert.main([*command[:2], "--output", str(both), "--keep_ema"]) == 0
    assert same(read_checkpoint(both)["state_dict"], dict(state))
    assert (
        convert.main(["--ckpt", str(both), "--output", str(trained), "--weights", "trained"]) == 0
    )
    assert torch.equal(load_file(trained)[key], state[key])
    assert torch.equal(load_model(both).state_dict()[key], average)  # to sample from
    assert torch.equal(load_model(both, weights="trained").state_dict()[key], state[key])

    model = load_model(output)  # the file says which config it fits
    assert model.model_ema is None
    torch.testing.assert_close(model.state_dict()[key], average, atol=1e-3, rtol=1e-3)


def test_averages_without_the_merged_lora_are_refused(tmp_path, caplog):
    flags = ["--ckpt", "a.ckpt", "--keep_ema", "--lora", "l.safetensors"]
    assert convert.main([*flags, "--output", str(tmp_path / "b.ckpt")]) == 1
    assert "--keep_ema: does not go with --lora" in caplog.text


def test_averages_that_are_not_there():
    with pytest.raises(UserError, match=r"x\.ckpt: no averaged weights"):
        ema_weights({"model.weight": torch.zeros(1)}, "x.ckpt")


def test_conversion_to_another_format(tmp_path, caplog):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert (
        convert.main(
            ["--ckpt", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "b.pt")]
        )
        == 1
    )
    assert "expected a .safetensors or .ckpt file" in caplog.text
    command = [
        "--ckpt",
        str(tmp_path / "a.safetensors"),
        "--output",
        str(tmp_path / "b.safetensors"),
    ]
    assert convert.main([*command, "--only", "clip."]) == 1
    assert "no tensor of" in caplog.text


def test_a_header_that_is_no_config_is_left_alone(tmp_path):
    save_file(
        {"weight": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"config": json.dumps([1])}
    )
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == {"weight"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"config": "{"})
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == {"weight"}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_values_that_are_no_numbers_are_not_written(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    state = {"a.weight": torch.ones(2, 2), "b.weight": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(UserError, match=r"not written: 'b\.weight' has values that are no numbers"):
        write_weights(path, state, {}, {})
    assert not list(tmp_path.iterdir())
