"""The YAML files of the project: each is complete, and builds the model that it is for."""

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.config import RunConfig, check_config, load_config, to_plain
from ldm.training.cli import parse_args, with_flags
from ldm.training.defaults import CALLBACKS, MODELCHECKPOINT, TRAINER, TRAINER_KEYS
from ldm.util import instantiate_from_config
from tests.support import golden

ROOT = Path(__file__).resolve().parent.parent
PROFILES = [  # of each fine-tuning, the folder of what goes over it
    (ROOT / f"configs/{family}/{name}.yaml", ROOT / f"configs/{family}/profiles")
    for family, name in (
        ("stable-diffusion", "v1-finetune_unfrozen"),
        ("stable-diffusion", "v2-finetune_unfrozen"),
        ("tiny", "dreambooth"),
    )
]
PROMPTS = ROOT / "configs" / "prompts"
YAMLS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "profiles" and PROMPTS not in path.parents
)
FINETUNE = ROOT / "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
INFERENCE = ROOT / "configs/stable-diffusion/v1-inference.yaml"


STABLE_DIFFUSION = sorted((ROOT / "configs/stable-diffusion").glob("*.yaml"))


def model_section(config):
    return {key: value for key, value in config["model"].items() if key != "base_learning_rate"}


def on_meta(config):
    """The config's model, without memory for its weights."""
    with torch.device("meta"):
        return instantiate_from_config(model_section(config), "model")


def test_there_are_yamls():
    assert {FINETUNE, INFERENCE, ROOT / "configs/tiny/dreambooth.yaml"} <= set(YAMLS)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_complete_and_builds(path):
    config = to_plain(load_config([path]))
    if "inference" in path.stem:  # for sampling only
        config.setdefault("data", {"target": "torch.nn.Identity"})
    else:
        datasets = config["data"]["params"]
        of_photos = not datasets["train"]["target"].endswith(
            (".World", ".RenderedWorld", ".CachedLatents")
        )
        flags = ["--data_root", "photos"] if of_photos else []
        flags += ["--reg_data_root", "dogs"] if "reg" in datasets else []
        config = dict(with_flags(RunConfig(config), parse_args(flags)).content)
    check_config(config, TRAINER_KEYS)
    assert config["model"]["base_learning_rate"] > 0
    if (
        "lossconfig" in config["model"]["params"]
    ):  # an autoencoder; VGG's weights are not on every disk
        config["model"]["params"]["lossconfig"]["params"]["perceptual_weight"] = 0
    model = on_meta(config)
    assert isinstance(model, pl.LightningModule) and next(model.parameters()).is_meta


@pytest.mark.parametrize(
    "base, path",
    [(base, path) for base, folder in PROFILES for path in sorted(folder.glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_a_profile_goes_over_every_fine_tuning(base, path):
    config = to_plain(load_config([base, path]))
    flags = parse_args(["--data_root", "photos", "--reg_data_root", "dogs"])
    config = dict(with_flags(RunConfig(config), flags).content)
    check_config(config, TRAINER_KEYS)
    assert next(on_meta(config).parameters()).is_meta


# tests/checkpoints/test_upscaler.py has the upscaler's.
@pytest.mark.parametrize(
    "path", [path for path in STABLE_DIFFUSION if "x4" not in path.stem], ids=lambda path: path.stem
)
def test_stable_diffusion_has_exactly_the_published_keys(path):
    published = json.loads((golden.DATA / f"sd_{path.name[:2]}_keys.json").read_text())
    model = on_meta(to_plain(load_config([path])))
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    if "inpainting" in path.stem:  # the mask and the masked image go in beside the latent
        published["model.diffusion_model.input_blocks.0.0.weight"][1] = 9
    if "inversion" in path.stem:  # the new word
        published["embedding_manager.string_to_param_dict.*"] = [1, 768]
    assert ours == published


def test_inference_and_training_describe_one_model():
    """Every number that a sample depends on is the same in both."""
    tiny = [
        to_plain(load_config([ROOT / f"configs/tiny/{name}.yaml"]))["model"]["params"]
        for name in ("ldm", "dreambooth")
    ]
    for part in (
        "unet_config",
        "first_stage_config",
        "cond_stage_config",
        "linear_start",
        "linear_end",
        "scale_factor",
    ):
        assert tiny[0][part] == tiny[1][part]
    train, sample = (
        to_plain(load_config([path]))["model"]["params"] for path in (FINETUNE, INFERENCE)
    )
    for params in (train, sample):
        params["unet_config"]["params"].pop("use_checkpoint", None)
    assert {key: train[key] for key in sample} == sample


def test_trainer_keys_are_lightnings():
    assert list(TRAINER_KEYS) == list(inspect.signature(pl.Trainer).parameters)


def test_defaults_bind():
    assert set(TRAINER) <= set(TRAINER_KEYS)
    check_config(
        {
            "model": {"target": "torch.nn.Identity"},
            "data": {"target": "torch.nn.Identity"},
            "lightning": {
                "callbacks": CALLBACKS,
                "modelcheckpoint": MODELCHECKPOINT,
                "trainer": TRAINER,
            },
        },
        TRAINER_KEYS,
    )
