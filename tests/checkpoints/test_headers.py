"""What the header of a safetensors file says, for the programs that read ModelSpec's and
sd-scripts' entries.
"""

import hashlib
import json
from datetime import datetime, timezone

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.export import training_facts, write_weights
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.headers import NO_HASH, kind_of, model_spec, trigger_phrase
from ldm.config import load_config, to_plain
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import convert
from tests.support import golden
from tests.support.families import params

CONFIGS = {name: path for family in FAMILIES for name, path in zip(family.configs, family.paths)}
# A tensor of each network is enough to tell which Stable Diffusion it is.
V1 = dict.fromkeys(
    ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.x"), torch.zeros(1)
)
V2 = dict.fromkeys(("model.diffusion_model.out.2.bias", "cond_stage_model.model.x"), torch.zeros(1))
FACTS = {
    "identifier": "sks",
    "class_word": "dog",
    "prompts": ["photo of a sks dog"],
    "steps": 800,
    "learning_rate": 1e-4,
    "reg_weight": 1.0,
    "seed": 23,
    "resolution": 512,
    "subject_images": 5,
    "class_images": 200,
    "base_model": {"file": "sd-v1-4.ckpt", "sha256": "ab" * 32},
}


def entries(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def lora(rank=4, alpha=2.0, conv_rank=None):
    shapes = {"x_to_q": (rank, 8)} | ({"x_conv1": (conv_rank, 8, 3, 3)} if conv_rank else {})
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.ones(shape)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.ones(
            8, shape[0], *[1] * (len(shape) - 2)
        )
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("name, state, architecture, prediction, side", [
    ("v1-inference.yaml", V1, "stable-diffusion-v1", "epsilon", "512x512"),
    ("v1-inpainting-inference.yaml", V1, "stable-diffusion-v1-inpainting", "epsilon", "512x512"),
    ("v2-inference.yaml", V2, "stable-diffusion-v2-512", "epsilon", "512x512"),
    ("v2-inference-v.yaml", V2, "stable-diffusion-v2-768-v", "v", "768x768"),
])  # fmt: skip
def test_each_family_has_its_architecture(name, state, architecture, prediction, side):
    config = to_plain(load_config([CONFIGS[name]]))
    found = model_spec("a title", kind_of(state, config), {}, is_lora=False)
    assert (found["modelspec.sai_model_spec"], found["modelspec.title"]) == ("1.0.1", "a title")
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.prediction_type"] == prediction
    assert found["modelspec.resolution"] == side
    assert found["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    of_lora = model_spec("a title", kind_of(state, config), {}, is_lora=True)
    assert of_lora["modelspec.architecture"] == f"{architecture}/lora"
    assert of_lora["modelspec.implementation"] == "diffusers"


def test_what_is_not_known_is_left_out():
    found = model_spec("a title", kind_of(V2, {}), {}, is_lora=False)
    assert "modelspec.architecture" not in found and "modelspec.prediction_type" not in found
    assert "modelspec.resolution" not in found and "modelspec.trigger_phrase" not in found
    assert (
        model_spec(
            "a part", kind_of({"first_stage_model.x": torch.zeros(1)}, {}), {}, is_lora=False
        )
        == {}
    )


def test_the_hash_is_that_of_the_tensors_bytes(tmp_path):
    path = tmp_path / "my-dog.safetensors"
    state = {key: value.clone() for key, value in V1.items()}
    write_weights(path, {**state, "model.diffusion_model.half": torch.ones(3, 5).half()}, {}, FACTS)
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    found = entries(path)
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest() != NO_HASH
    assert len(load_file(path)) == 3
    date = datetime.strptime(found["modelspec.date"], "%Y-%m-%dT%H:%M:%SZ").replace(
        tzinfo=timezone.utc
    )
    assert abs((datetime.now(timezone.utc) - date).total_seconds()) < 600
    assert found["modelspec.title"] == "my-dog" and json.loads(found["training"]) == FACTS


@pytest.mark.parametrize("facts, phrase", [
    (FACTS, "sks dog"),
    ({**FACTS, "prompts": ["a sks thing", "photo of a sks dog"]}, "sks"),
    ({**FACTS, "class_word": None, "prompts": []}, "sks"),
    ({}, None),
])  # fmt: skip
def test_the_trigger_phrase_is_what_all_captions_have(facts, phrase):
    facts = {key: value for key, value in facts.items() if value is not None}
    assert trigger_phrase(facts) == phrase


@pytest.mark.parametrize("kind, expected", [
    ({"version": "1", "inpaints": False, "predicts": "eps"}, ("False", "sd_v1")),
    ({"version": "2", "inpaints": False, "predicts": "eps"}, ("True", "sd_v2")),
    ({"version": "2", "inpaints": False, "predicts": "v"}, ("True", "sd_v2_v")),
])  # fmt: skip
def test_a_lora_has_what_tools_for_sd_scripts_read(kind, expected, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_weights(path, lora(), {}, {**FACTS, "model": kind}, title="my run")
    found = entries(path)
    assert (found["ss_v2"], found["ss_base_model_version"]) == expected
    assert {key: value for key, value in found.items() if key.startswith("ss_")} == {
        "ss_output_name": "my run",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_args": "{}",
        "ss_v2": expected[0],
        "ss_base_model_version": expected[1],
        "ss_sd_model_name": "sd-v1-4.ckpt",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_resolution": "(512, 512)",
        "ss_num_train_images": "5",
        "ss_num_reg_images": "200",
        "ss_prior_loss_weight": "1.0",
        "ss_seed": "23",
        "ss_learning_rate": "0.0001",
        "ss_steps": "800",
    }
    assert found["modelspec.title"] == "my run" and found["modelspec.trigger_phrase"] == "sks dog"


def test_convolutions_stand_in_the_networks_arguments(tmp_path):
    write_weights(tmp_path / "a.safetensors", lora(conv_rank=3, alpha=1.0), {}, {})
    found = entries(tmp_path / "a.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "1.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.0"}
    assert (
        "ss_v2" not in found and "ss_steps" not in found and "modelspec.architecture" not in found
    )


def test_the_facts_of_a_run_hold_what_the_headers_need():
    config = {
        "model": {"params": {"reg_weight": 0.5}, "base_learning_rate": 1e-6},
        "data": {
            "params": {
                "batch_size": 1,
                "train": {"params": {"size": 64, "placeholder_token": "dog"}},
            }
        },
    }
    facts = training_facts(config, 7, {"subject_images": 3, "class_images": 9})
    assert (facts["resolution"], facts["subject_images"], facts["class_images"]) == (64, 3, 9)
    assert training_facts(config, 0) == {}


def test_the_commands_files_say_it(tmp_path):
    """A model of our own layout, and the LoRA between two of them."""
    model = LatentDiffusion(**params("v1"))
    golden.load_golden_weights(model)
    config = {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params("v1")}
    }
    state = dict(model.state_dict())
    write_weights(tmp_path / "base.safetensors", state, config, {})
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tuned = Checkpoint(
        tmp_path / "tuned.safetensors", {**state, key: state[key] + 1}, config, FACTS
    )
    tuned.save(tuned.path)
    flags = [
        "--ckpt",
        str(tuned.path),
        "--lora_base",
        str(tmp_path / "base.safetensors"),
        "--rank",
        "2",
    ]
    assert convert.main([*flags, "--output", str(tmp_path / "my-lora.safetensors")]) == 0
    of_model, of_lora = (entries(tmp_path / f"{name}.safetensors") for name in ("tuned", "my-lora"))
    assert of_model["modelspec.architecture"] == "stable-diffusion-v1" and "ss_v2" not in of_model
    assert of_lora["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (of_lora["ss_v2"], of_lora["ss_steps"], of_lora["ss_output_name"]) == (
        "False",
        "800",
        "my-lora",
    )
    assert "config" not in of_lora and json.loads(of_lora["training"])["model"]["version"] == "1"
