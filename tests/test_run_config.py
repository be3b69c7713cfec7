"""What is asked of a config, what older ones may hold, and where an error says that it is."""

import importlib
import logging
import pickle

import pytest
from omegaconf import OmegaConf

from ldm.config import RunConfig, check_config, load_yaml, save_yaml, to_plain
from ldm.errors import ParameterError, UserError, under
from ldm.util import LEGACY, RENAMED, get_obj_from_str, instantiate_from_config
from tests.support import golden, runs

HERE = __name__


# Asking


def test_a_path_is_followed_to_its_value_or_the_default():
    config = RunConfig({"data": {"params": {"train": None, "batch_size": 0}}})
    assert config.get("data.params.batch_size", 3) == 0
    for path in (
        "data.params.train.params.size",
        "data.params.train",
        "data.params.batch_size.x",
        "run.seed",
    ):
        assert config.get(path, 3) == 3
    assert (
        config.section("data.params.train.params") == {}
        and config.seed == 23
        and config.identifier == "sks"
    )
    with pytest.raises(UserError, match=r"data\.params\.batch_size: expected a mapping, got 0"):
        config.section("data.params.batch_size")


def test_another_value_makes_another_config():
    config = RunConfig({"lightning": {"trainer": None}, "run": {"seed": 1}})
    other = config.having(
        {"lightning.trainer.max_steps": 3, "run.seed": 2, "model.params.x": 1}
    ).without("run.export")
    assert other.content == {
        "lightning": {"trainer": {"max_steps": 3}},
        "run": {"seed": 2},
        "model": {"params": {"x": 1}},
    }
    assert config.content == {"lightning": {"trainer": None}, "run": {"seed": 1}}
    assert other.without("run.seed", "no.such.key").content["run"] == {}
    with pytest.raises(UserError, match=r"run\.seed: expected a mapping, got 1"):
        config.having({"run.seed.deep": 1})


@pytest.mark.parametrize(
    "text", ["${x}", "a${b}c", "\\${x}", "\\\\${x}", "$x ${", "{}", "C:\\dog\\", "a: b # c"]
)
def test_saved_text_comes_back_as_it_was(tmp_path, text):
    content = {"a": text, "list": [text, {"b": text}], "number": 1.5, "none": None}
    save_yaml(content, tmp_path / "a.yaml")
    assert to_plain(load_yaml(tmp_path / "a.yaml")) == content


# Keys and targets of older configs


def test_what_has_no_effect_is_left_out_and_said_in_one_line(tmp_path, caplog):
    config = to_plain(load_yaml(runs.config(tmp_path)))
    with caplog.at_level(logging.WARNING):
        check_config(config)
    (line,) = caplog.messages
    assert line.startswith("without effect here: ")
    assert "model.params.model_lr (the learning rate is model.base_learning_rate)" in line
    assert "personalization_config.params" not in line and "scale_factor" not in line
    model = instantiate_from_config(config["model"], "model")
    assert model.scale_factor == golden.CONFIG["scale_factor"]


@pytest.mark.parametrize("value", [None, False])
def test_what_is_switched_off_anyway_is_not_said(value, caplog):
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1, "wrap": value}}
    check_config({"model": {"target": "torch.nn.Identity"}, "data": data})
    assert not caplog.messages


class Own:
    """A class that has a use for a key which means nothing to its base."""

    def __init__(self, wrap=False):
        self.wrap = wrap


def test_a_key_that_a_class_takes_is_not_left_out(monkeypatch):
    monkeypatch.setitem(LEGACY, f"{HERE}.Own", {"wrap": "", "other": ""})
    assert (
        instantiate_from_config(
            {"target": f"{HERE}.Own", "params": {"wrap": True, "other": 1}}
        ).wrap
        is True
    )


@pytest.mark.parametrize("old, new", [
    ("ldm.lr_scheduler.WarmupLinearDecay", "ldm.optim.schedules.WarmupDecay"),
    ("ldm.data.world.World", "ldm.tiny.world.World"),
    ("ldm.models.clip.CLIP", "ldm.tiny.clip.CLIP"),
    ("ldm.optim.Muon", "ldm.optim.muon.Muon"),
    ("ldm.backward_optimizer.AdamWInBackward", "ldm.optim.in_backward.AdamWInBackward"),
    *((old, new) for old, new in RENAMED.items() if not new.islower()),
])  # fmt: skip
def test_targets_that_have_moved(old, new):
    assert get_obj_from_str(old) is get_obj_from_str(new)


@pytest.mark.parametrize("old", [old for old, new in RENAMED.items() if not new.islower()])
def test_scripts_import_single_targets_from_where_they_were(old):
    module, _, name = old.rpartition(".")
    assert getattr(importlib.import_module(module), name) is get_obj_from_str(old)
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec(f"from {module} import Nothing")


def test_every_renamed_target_is_there():
    for new in RENAMED.values():
        module, _, name = new.rpartition(".")
        assert __import__(new if name.islower() else module, fromlist=["x"]), new


@pytest.mark.parametrize("target, message", [
    ("ldm.lr_scheduler.LambdaLinear", "unknown target 'ldm.lr_scheduler.LambdaLinear': "
                                      "ldm.optim.schedules has no"),
    ("ldm.nowhere.Thing", "unknown target 'ldm.nowhere.Thing': there is no module 'ldm.nowhere'"),
])  # fmt: skip
def test_targets_that_are_nowhere(target, message):
    with pytest.raises(UserError, match=message):
        get_obj_from_str(target)


def test_ldms_scripts_build_a_model_from_a_whole_model_section(tmp_path):
    """`instantiate_from_config(config.model)` of OmegaConf's containers, as every script of that
    family calls it.
    """
    config = OmegaConf.load(runs.config(tmp_path))
    assert "base_learning_rate" in config.model
    model = instantiate_from_config(config.model)
    missing, unexpected = model.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected


# Errors


class Inner:
    def __init__(self, size):
        raise ParameterError("size", f"expected 1 or more, got {size}")


class Outer:
    def __init__(self, inner):
        with under("more"):
            self.inner = instantiate_from_config(inner, "inner")


def test_each_level_of_a_config_adds_its_part_of_the_path_once():
    inner = {"target": f"{HERE}.Inner", "params": {"size": 0}}
    with pytest.raises(ParameterError) as raised:
        instantiate_from_config({"target": f"{HERE}.Outer", "params": {"inner": inner}}, "model")
    assert str(raised.value) == "model.params.more.inner.params.size: expected 1 or more, got 0"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_what_a_foreign_class_refuses_is_one_line():
    timer = {"target": "pytorch_lightning.callbacks.Timer", "params": {"duration": "soon"}}
    with pytest.raises(
        UserError,
        match=r"^lightning\.callbacks\.t\.params: Timer: .*soon.* is not a valid duration",
    ):
        instantiate_from_config(timer, "lightning.callbacks.t")
