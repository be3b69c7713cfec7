"""Weights are filled into models with a report, or refused before anything is changed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints import loading as checkpoint
from ldm.checkpoints.ema import weights_to_sample_from, weights_to_train
from ldm.checkpoints.loading import (
    EmptyInit,
    adopt_state,
    compare,
    describe,
    instantiate_filled,
    load_into,
    load_state,
)
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.util import instantiate_from_config
from tests.support import golden
from tests.support.pickles import WEIGHTS, same, save_zip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("position_ids", torch.arange(4))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_load_reports_what_it_used():
    report = load_state(
        net := Net(), WEIGHTS | {"extra": torch.ones(1), "b.c": torch.ones(1)}, "x.ckpt"
    )
    assert sorted(report.used) == ["a.bias", "a.weight", "steps"]
    assert report.built == ["position_ids"] and report.missing == []  # made with the model
    assert report.unexpected == ["extra", "b.c"]
    assert str(report) == "3 tensors used; 1 built from the config; 2 unexpected (extra, b.c)"
    assert all(torch.equal(net.state_dict()[key], value) for key, value in WEIGHTS.items())


def test_a_long_report_is_cut():
    report = checkpoint.LoadReport([], [], [f"k{i}" for i in range(9)])
    assert str(report) == "0 tensors used; 9 unexpected (k0, k1, k2, ...)"


@pytest.mark.parametrize("change, message", [
    ({"a.weight": torch.ones(3, 2)}, r"x\.ckpt: 'a.weight' has shape \[3, 2\], the config's model "
                                     r"has \[2, 3\]"),
    ({"a.bias": None}, r"x\.ckpt: 1 of the model's 4 tensors are missing, first 'a.bias' .the file "
                       r"has 2, first 'a.w"),
    ({"a.bias": None, "a.weight": None, "steps": None}, r"x\.ckpt: 3 of the model's 4 .*the "
                                                        r"file has 0"),
])  # fmt: skip
@pytest.mark.parametrize("check", [compare, load_state])
def test_what_does_not_fit_changes_nothing(check, change, message):
    state = {key: value for key, value in (WEIGHTS | change).items() if value is not None}
    before = snapshot(net := Net())
    with pytest.raises(UserError, match=message):
        check(net, state, "x.ckpt")
    assert same(net.state_dict(), before)


def test_compare_changes_nothing():
    before = snapshot(net := Net())
    assert compare(net, WEIGHTS, "x").built == ["position_ids"]
    assert same(net.state_dict(), before)


def test_averages_are_optional():
    net = Net()
    net.model_ema = nn.Linear(1, 1)
    assert compare(net, WEIGHTS, "x").missing == ["model_ema.weight", "model_ema.bias"]


@pytest.mark.parametrize(
    "stored, wanted", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_dtypes_convert_to_the_models(stored, wanted):
    net = Net().to(wanted)
    state = {
        key: value.to(stored) if value.is_floating_point() else value
        for key, value in WEIGHTS.items()
    }
    load_state(net, state, "x")
    assert net.a.weight.dtype == wanted and torch.equal(net.a.weight.float(), WEIGHTS["a.weight"])
    assert net.steps.dtype == torch.int64 and net.steps == 7


def test_ignored_keys_stay(tmp_path):
    save_zip({"state_dict": WEIGHTS | {"steps": torch.ones(5)}}, tmp_path / "x.ckpt")
    net = Net()
    bias = net.a.bias.detach().clone()
    report = load_into(net, tmp_path / "x.ckpt", ignore_keys=["a.b", "steps"])
    assert report.used == ["a.weight"]
    assert (
        torch.equal(net.a.weight, WEIGHTS["a.weight"])
        and torch.equal(net.a.bias, bias)
        and net.steps == 0
    )


def test_loading_does_not_tie_the_model_to_the_file(tmp_path):
    save_zip(WEIGHTS, tmp_path / "x.ckpt")
    load_into(net := Net(), tmp_path / "x.ckpt")
    with torch.no_grad():
        net.a.weight.zero_()
    assert same(read_checkpoint(tmp_path / "x.ckpt"), WEIGHTS)


def test_adopted_weights_are_the_files_own_and_not_tied_to_it(tmp_path):
    """No copy is made; what training then writes stays in memory."""
    for name, save in (("x.ckpt", save_zip), ("x.safetensors", save_file)):
        save(WEIGHTS, tmp_path / name)
        state = state_dict_of(read_checkpoint(tmp_path / name), name)
        adopt_state(net := Net(), state, name)
        assert (
            net.a.weight.data_ptr() == state["a.weight"].data_ptr() and net.a.weight.requires_grad
        )
        with torch.no_grad():
            net.a.weight.zero_()
        assert same(read_checkpoint(tmp_path / name), WEIGHTS)


def test_adopted_weights_in_half_precision():
    adopt_state(net := Net(), WEIGHTS, "x", torch.float16)
    assert net.a.weight.dtype == torch.float16 and net.a.bias.dtype == torch.float32  # vectors stay
    assert net.steps.dtype == torch.int64 and net.a.weight.tolist() == WEIGHTS["a.weight"].tolist()


BOTH = {
    "model.diffusion_model.out.weight": torch.zeros(2),
    "model_ema.diffusion_modeloutweight": torch.ones(2),
    "model_ema.decay": torch.tensor(0.9),
    "betas": torch.ones(3),
}


def test_sampling_takes_the_averages_and_training_does_not():
    key = "model.diffusion_model.out.weight"
    for weights, value in ((None, 1), ("ema", 1), ("trained", 0)):
        found = weights_to_sample_from(BOTH, "x", weights)
        assert sorted(found) == ["betas", key] and (found[key] == value).all()
    assert weights_to_train(BOTH, "x", None, averages=True).keys() == BOTH.keys()
    for weights, value in ((None, 0), ("trained", 0), ("ema", 1)):
        found = weights_to_train(BOTH, "x", weights, averages=False)
        assert sorted(found) == ["betas", key] and (found[key] == value).all()
    only = {key: BOTH[key]}
    assert weights_to_sample_from(only, "x", None) == only
    with pytest.raises(UserError, match="x: no averaged weights"):
        weights_to_train(only, "x", "ema", averages=True)


def test_what_a_checkpoint_holds_is_described():
    assert (
        describe(BOTH) == "weights, 4 tensors (float32), averaged weights beside the trained ones"
    )
    assert describe({"a": torch.ones(1, dtype=torch.float16)}) == "weights, 1 tensors (float16)"


def test_empty_init_skips_initialisation_only_inside():
    def constant():
        layer = nn.Linear(50, 50)
        with torch.no_grad():
            layer.weight.fill_(3.0)
        layer.reset_parameters()
        nn.init.kaiming_uniform_(layer.weight)
        nn.init.normal_(tensor=layer.weight)
        return bool((layer.weight == 3).all())

    with EmptyInit():
        assert constant()
    assert not constant()


def test_empty_init_skips_all_that_makes_a_model():
    """Also what transformers does, by functions of its own."""
    before = torch.get_rng_state()
    with EmptyInit():
        instantiate_from_config(model_config())
    assert torch.equal(torch.get_rng_state(), before), "something was drawn"


def test_an_unmapped_file_has_the_same_tensors(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 4),
        "halves": torch.randn(5).bfloat16(),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, path := tmp_path / "tensors.safetensors")
    found = read_checkpoint(path, mapped=False)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    # Each has memory of its own, so that it can be freed alone.
    assert len({t.untyped_storage().data_ptr() for t in found.values() if t.numel()}) == 4


def test_empty_init_also_skips_after_an_error_was_raised_inside():
    with pytest.raises(RuntimeError, match="inside"), EmptyInit():
        raise RuntimeError("inside")
    assert nn.init.ones_(torch.zeros(2)).sum() == 2


def model_config(**overrides):
    text = {
        "target": golden.CONFIG["cond_stage_config"]["target"],
        "params": {"text_config": golden.TEXT_CONFIG},
    }
    params = {**golden.CONFIG, "cond_stage_config": text, **overrides}
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


@pytest.mark.parametrize(
    "without", [(), ("cond_stage_model.transformer.text_model.embeddings.position_ids",)]
)
def test_instantiate_filled_has_exactly_the_files_weights(golden_model, without):
    state = {key: value for key, value in golden_model.state_dict().items() if key not in without}
    model, report = instantiate_filled(model_config(), state, "x.ckpt")
    assert report.built == list(without) and not report.missing and not report.unexpected
    assert same(model.state_dict(), golden_model.state_dict())
    assert torch.equal(model.lvlb_weights, golden_model.lvlb_weights)


def test_averages_that_a_file_lacks_start_from_its_weights(golden_model):
    model, report = instantiate_filled(
        model_config(use_ema=True), golden_model.state_dict(), "x.ckpt"
    )
    assert report.missing and all(key.startswith("model_ema.") for key in report.missing)
    own = golden_model.model.state_dict()
    with model.ema_scope():
        assert same(model.model.state_dict(), own)


def test_instantiate_filled_refuses_before_it_fills(golden_model):
    state = golden_model.state_dict() | {"betas": torch.ones(10)}
    with pytest.raises(UserError, match=r"x\.ckpt: 'betas' has shape \[10\]"):
        instantiate_filled(model_config(), state, "x.ckpt")
