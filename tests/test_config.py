"""Configs: how they merge, and what their errors say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config import check_config, load_config, load_yaml, to_plain
from ldm.errors import UserError, nearest
from ldm.training.defaults import TRAINER_KEYS
from ldm.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).resolve().parent.parent
FINETUNE = ROOT / "configs/stable-diffusion/v1-finetune_unfrozen.yaml"


@pytest.fixture
def yaml(tmp_path):
    """Writes a YAML file."""

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


# Reading and merging


def test_files_merge_left_to_right_and_overrides_come_last(yaml):
    first = yaml("a: {x: 1, y: 1, z: 1, list: [1, 2]}\nb: first")
    second = yaml("a: {y: 2, z: 2, list: [3]}\nc: {d: 5}", "b.yaml")
    config = load_config(
        [first, second], ["a.z=3", "a.new.deep=true", "c.d=0.5", "e=[1, two]", "f=x=y"]
    )
    assert to_plain(config) == {
        "a": {"x": 1, "y": 2, "z": 3, "list": [3], "new": {"deep": True}},
        "b": "first", "c": {"d": 0.5}, "e": [1, "two"], "f": "x=y",
    }  # fmt: skip
    assert to_plain(load_config([second, first]))["a"]["y"] == 1


def test_interpolations_resolve_after_the_merge(yaml):
    path = yaml("size: 64\nmodel: {size: '${size}'}")
    assert to_plain(load_config([path], ["size=32"]))["model"] == {"size": 32}
    with pytest.raises(UserError, match=r"cannot resolve the config: .*no\.such\.key"):
        to_plain(load_config([yaml("a: ${no.such.key}")]))


def test_plain_mappings_stay():
    assert to_plain({"a": 1}) == {"a": 1}


def test_an_empty_file_is_an_empty_config(yaml):
    assert to_plain(load_yaml(yaml("# nothing yet\n"))) == {}


@pytest.mark.parametrize("text", ["a: [1, 2", "a: 1\n b: 2", "a: 1\na: 2", "\t- x", "a: ${"])
def test_broken_yaml(yaml, text):
    path = yaml(text)
    with pytest.raises(UserError, match="not valid YAML") as raised:
        load_yaml(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"x\.yaml: not valid YAML"):
        load_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["- model\n- data", "3"])
def test_no_mapping_at_the_top(yaml, text):
    with pytest.raises(
        UserError,
        match=r"a\.yaml: (expected a mapping with model, data, lightning, run|not valid YAML)",
    ):
        load_config([yaml(text)])


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(UserError, match="no such config file"):
        load_config([tmp_path / name])


@pytest.mark.parametrize("override", ["model.params", "=3", "reg_weight"])
def test_overrides_of_another_form(yaml, override):
    with pytest.raises(UserError, match=f"'{override}': an override has the form key.path=value"):
        load_config([yaml("a: 1")], [override])


@pytest.mark.parametrize("override", ["a=[1", "a={b", "a=${"])
def test_overrides_that_do_not_parse(yaml, override):
    path, _, text = override.partition("=")
    says = f"{path}: cannot set it to '{text}': "
    with pytest.raises(UserError, match=re.escape(says)):
        load_config([yaml("a: 1")], ["b=1", override])


@pytest.mark.parametrize("override, found", [
    ("a.1=5", [1, 5, 3]),
    ("a[1]=5", [1, 5, 3]),
    ("a.-1=5", [1, 2, 5]),
    ("a=[5]", [5]),
    ("b.0.c=5", [{"c": 5, "d": 2}]),
])  # fmt: skip
def test_an_override_of_one_place_in_a_list(yaml, override, found):
    path = yaml("a: [1, 2, 3]\nb: [{c: 1, d: 2}]")
    assert to_plain(load_config([path], [override]))[override[0]] == found


@pytest.mark.parametrize("override", ["a.3=5", "a.x=5", "b.1.c=5"])
def test_an_override_of_no_place_in_a_list(yaml, override):
    path = yaml("a: [1, 2, 3]\nb: [{c: 1, d: 2}]")
    says = f"^{override.partition('=')[0]}: there is no such place in the config's list"
    with pytest.raises(UserError, match=says):
        load_config([path], [override])


def test_a_mapping_and_a_list_do_not_merge(yaml):
    with pytest.raises(UserError, match="cannot merge the configs"):
        load_config([yaml("a: {x: [1]}"), yaml("a: {x: {y: 1}}", "b.yaml")])


# Checking


@pytest.fixture
def config():
    """A complete config as plain containers."""
    return to_plain(load_config([FINETUNE]))


def put(config, path, value):
    """Set the value at a dotted path."""
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


@pytest.mark.parametrize("path, suggestion", [
    ("modle", "model"),
    ("ligthning", "lightning"),
    ("model.base_learning_rte", "base_learning_rate"),
    ("data.parms", "params"),
    ("lightning.trainr", "trainer"),
    ("lightning.callback", "callbacks"),
    ("lightning.modelcheckpoint.parms", "params"),
    ("lightning.trainer.max_step", "max_steps"),
    ("lightning.trainer.accumulate_grad_batch", "accumulate_grad_batches"),
    ("run.sed", "seed"),
    ("model.params.reg_wieght", "reg_weight"),
    ("model.params.unet_config.params.model_chanels", "model_channels"),
    ("model.params.first_stage_config.params.embed_dims", "embed_dim"),
    ("data.params.batchsize", "batch_size"),
    ("data.params.train.params.repeat", "repeats"),
    ("lightning.callbacks.image_logger.params.batch_freqency", "batch_frequency"),
])  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest_one(config, path, suggestion):
    put(config, path, {})
    with pytest.raises(UserError) as raised:
        check_config(config, TRAINER_KEYS)
    message = str(raised.value)
    assert message.startswith(f"{path}: unknown key")
    assert f"(did you mean '{suggestion}'?)" in message
    assert "accepted: " in message and suggestion in message.partition("accepted: ")[2].split(", ")


def test_a_key_like_no_other_gets_no_suggestion(config):
    put(config, "model.params.zzz", 1)
    with pytest.raises(UserError) as raised:
        check_config(config)
    assert "did you mean" not in str(raised.value) and "reg_weight" in str(raised.value)


@pytest.mark.parametrize("path, target, message", [
    ("model.target", "ldm.models.diffusion.ddpm.LatentDifusion",
     r"model\.target: unknown target .* has no 'LatentDifusion' \(did you mean "
     r"'LatentDiffusion'\?\)"),
    ("model.params.unet_config.target", "ldm.modules.diffusion.openaimodel.UNetModel",
     r"model\.params\.unet_config\.target: .*there is no module 'ldm\.modules\.diffusion'"),
    ("data.target", "mian.DataModuleFromConfig", r"data\.target: .*there is no module 'mian'"),
    ("data.target", "main.DataModule", r"data\.target: .*main has no 'DataModule'"),
    ("lightning.callbacks.image_logger.target", "ImageLogger", r"image_logger\.target: "
                                                               r"'ImageLogger' is not a dotted"),
    ("lightning.callbacks.image_logger.target", "ldm.callbacks.image_logger", r"image_logger\.target: .*but a module"),
    ("model.target", None, r"model\.target: 'None' is not a dotted path"),
    ("model.target", "..ddpm", r"model\.target: '\.\.ddpm' is not a dotted path"),
    ("model.target", "ldm.models.", r"model\.target: 'ldm\.models\.' is not a dotted path"),
])  # fmt: skip
def test_an_unknown_target_is_named(config, path, target, message):
    import ldm.callbacks.image_logger  # noqa: F401  (so that the path above names a module)

    put(config, path, target)
    with pytest.raises(UserError, match=message):
        check_config(config, TRAINER_KEYS)


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_section_without_a_target(config, section):
    del config[section]["target"]
    with pytest.raises(UserError, match=f"{section}: the config has no {section}.target"):
        check_config(config)
    del config[section]
    with pytest.raises(UserError, match=f"{section}: the config has no {section}.target"):
        check_config(config)


@pytest.mark.parametrize(
    "path", ["model", "lightning", "lightning.trainer", "lightning.modelcheckpoint", "run"]
)
@pytest.mark.parametrize("value", [3, "text", [1]])
def test_a_section_that_is_no_mapping(config, path, value):
    put(config, path, value)
    with pytest.raises(UserError, match=f"{path}: expected a mapping, got"):
        check_config(config, TRAINER_KEYS)


@pytest.mark.parametrize("path", ["model.params", "model.params.unet_config.params"])
@pytest.mark.parametrize("value", [3, "text", [1]])
def test_params_that_are_no_mapping(config, path, value):
    put(config, path, value)
    with pytest.raises(UserError, match=f"{path}: expected a mapping, got"):
        check_config(config, TRAINER_KEYS)


@pytest.mark.parametrize("path", ["lightning", "lightning.trainer", "lightning.callbacks", "run"])
def test_empty_sections_are_fine(config, path):
    put(config, path, None)
    check_config(config, TRAINER_KEYS)


def test_missing_params_are_named(config):
    del config["model"]["params"]["unet_config"]["params"]["in_channels"]
    del config["model"]["params"]["unet_config"]["params"]["num_res_blocks"]
    with pytest.raises(
        UserError, match=r"unet_config\.params: UNetModel needs in_channels, num_res_blocks$"
    ):
        check_config(config)


def test_targets_in_lists_are_checked(config):
    put(config, "data.params.train", [{"target": "torch.nn.Linear", "params": {"in_features": 1}}])
    with pytest.raises(
        UserError, match=r"data\.params\.train\[0\]\.params: Linear needs out_features"
    ):
        check_config(config)


# Building


def test_instantiate():
    layer = instantiate_from_config(
        {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 1}},
        bias=False,
        out_features=3,
    )
    assert layer.weight.shape == (3, 2) and layer.bias is None
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), torch.nn.Identity)
    assert isinstance(
        instantiate_from_config({"target": "torch.nn.Identity", "params": None}), torch.nn.Identity
    )
    assert instantiate_from_config(
        OmegaConf.create({"target": "builtins.dict", "params": {"a": 1}})
    ) == {"a": 1}


@pytest.mark.parametrize("config, message", [
    ({"params": {}}, "x: expected a mapping with a 'target' key, got {'params': {}}"),
    (None, "x: expected a mapping with a 'target' key, got None"),
    ("torch.nn.Identity", "x: expected a mapping with a 'target' key, got 'torch.nn.Identity'"),
    ({"target": "torch.nn.Identity", "param": {}}, r"x\.param: unknown key \(did you mean "
                                                   r"'params'\?\)"),
    ({"target": "torch.nn.Linear", "params": {"in_features": 1}}, r"x\.params: Linear needs "
                                                                  r"out_features"),
    ({"target": "torch.nn.Linear", "params": {"in_feature": 1}},
     r"x\.params\.in_feature: unknown key for Linear \(did you mean 'in_features'\?\); accepted: "
     r"in_features, out_f"),
    ({"target": "torch.nn.Linear", "params": [1, 2]}, r"x\.params: expected a mapping, got "
                                                      r"\[1, 2\]"),
    ({"target": "torch.nn.Linaer"}, r"x\.target: unknown target 'torch.nn.Linaer': torch.nn has no "
                                    r"'Linaer' .*Linear"),
    ({"target": "math.pi"}, r"x\.target: 'math\.pi' is not a class or function, but a float"),
])  # fmt: skip
def test_what_cannot_be_built(config, message):
    with pytest.raises(UserError, match=message):
        instantiate_from_config(config, "x")


def test_a_target_that_needs_a_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "needs_a_package.py").write_text("import no_such_package.part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"t: 'needs_a_package\.X' needs the package 'no_such_package': pip install"
    ):
        get_obj_from_str("needs_a_package.X", "t")


def test_errors_inside_a_constructor_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        instantiate_from_config({"target": "tests.test_config.divide", "params": {"by": 0}})


def divide(by):
    return 1 / by


def test_nearest():
    assert nearest("reg_wieght", ["reg_weight", "timesteps"]) == " (did you mean 'reg_weight'?)"
    assert nearest("banana", {"reg_weight", "timesteps"}) == ""


HEAVY = {
    "torch",
    "pytorch_lightning",
    "lightning",
    "transformers",
    "open_clip",
    "torchvision",
    "kornia",
}


@pytest.mark.parametrize("arguments", [["main.py", "--help"], ["-c", "import ldm"]])
def test_help_and_the_package_do_not_wait_for_large_imports(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "ldm" in imported
    assert not imported & HEAVY
    if "main.py" in arguments:
        assert all(flag in done.stdout for flag in ("--base", "--actual_resume", "--class_word"))


def test_the_references_personalization_config_is_accepted():
    params = {
        "placeholder_strings": ["*"], "initializer_words": ["sculpture"], "per_image_tokens": False,
        "num_vectors_per_token": 1, "progressive_words": False,
    }  # fmt: skip
    config = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": params}
    assert instantiate_from_config(config, embedder=None).embedder is None
