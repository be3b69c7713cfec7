"""Which parameters a training changes, at what rate and for how long."""

import math

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy

import main
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.trained import check_same_parameters, check_strategy
from ldm.sampling.text_to_image import load_model
from tests.support.models import (
    batch,
    build,
    groups_of,
    loader,
    parts_that_moved,
    small_trainer,
    step,
)
from tests.support.runs import (
    Workspace,
    assert_resumes_exactly,
    checkpoint,
    csv_rows,
    same,
)


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize("trainable", [True, False])
def test_which_networks_train(trainable):
    model = build(cond_stage_trainable=trainable)
    step(model, batch(1), batch(2))[0].backward()
    parts = {"model": True, "cond_stage_model": trainable, "first_stage_model": False}
    optimised = {
        id(p) for group in model.configure_optimizers().param_groups for p in group["params"]
    }
    for name, trains in parts.items():
        part = getattr(model, name)
        assert part.training == trains
        for key, parameter in part.named_parameters():
            assert parameter.requires_grad == trains, key
            assert (id(parameter) in optimised) == trains, key
            assert (parameter.grad is not None) == trains, key
    grads = {
        name: sum(p.grad.abs().sum() for p in getattr(model, name).parameters())
        for name in parts
        if parts[name]
    }
    assert all(grad > 0 for grad in grads.values())
    model.eval()
    assert not any(getattr(model, name).training for name in parts)
    assert model.get_learned_conditioning(["a dog"]).requires_grad == trainable


# The text encoder's own rate and end


def test_one_group_by_default_and_two_with_a_rate_for_the_text_encoder():
    plain, split = build(), build(text_encoder_lr=5e-7)
    unet, text = (len(list(part.parameters())) for part in (plain.model, plain.cond_stage_model))
    assert groups_of(plain) == [(None, 1e-3, unet + text)]
    assert groups_of(build(text_encoder_stop=3)) == groups_of(plain)
    assert groups_of(split) == [("unet", 1e-3, unet), ("text_encoder", 5e-7, text)]


def test_muon_has_the_groups_of_its_two_kinds():
    plain, split = (groups_of(build(optimizer="muon", text_encoder_lr=lr)) for lr in (None, 5e-7))
    assert [name for name, _, _ in plain] == [None, None]
    rates = {name: lr for name, lr, _ in split}
    assert rates == {
        "unet-adam": 1e-3,
        "unet-muon": 1e-3,
        "text_encoder-adam": 5e-7,
        "text_encoder-muon": 5e-7,
    }
    assert sum(n for _, _, n in split) == sum(n for _, _, n in plain)


SPLIT = ("model.params.text_encoder_lr=1e-4", "model.params.text_encoder_stop=2")


@pytest.fixture(scope="module")
def stopped(workspace):
    """A run of four steps, of which the text encoder takes two."""
    return workspace.train("stopped", *SPLIT)


def test_the_text_encoder_stops_exactly(stopped):
    second, last = (
        checkpoint(stopped, name) for name in ("epoch=000000-step=000000002.ckpt", "last.ckpt")
    )
    assert parts_that_moved(second["state_dict"], last["state_dict"]) == {
        "model"
    }  # AdamW would decay its weights
    unet, text = last["optimizer_states"][0]["param_groups"]
    assert (unet["name"], unet["lr"], text["name"], text["lr"]) == (
        "unet",
        1e-3,
        "text_encoder",
        1e-4,
    )
    states = last["optimizer_states"][0]["state"]
    assert {int(states[index]["step"]) for index in text["params"]} == {2}
    assert {int(states[index]["step"]) for index in unet["params"]} == {4}
    rates = [row for row in csv_rows(stopped) if row.get("lr-AdamW/unet")]
    assert {
        (float(row["lr-AdamW/unet"]), float(row["lr-AdamW/text_encoder"])) for row in rates
    } == {(1e-3, 1e-4)}


def test_until_its_stop_the_text_encoder_is_trained(stopped, workspace):
    each = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    run = workspace.train("not-stopped", SPLIT[0], each, "--max_steps", "2")
    first, second = (
        checkpoint(run, f"epoch=000000-step=00000000{step}.ckpt")["state_dict"] for step in (1, 2)
    )
    assert same(second, checkpoint(stopped, "epoch=000000-step=000000002.ckpt")["state_dict"])
    assert "cond_stage_model" in parts_that_moved(first, second)


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_resumes_exactly_before_and_after_the_stop(workspace, stopped, at):
    parts = workspace.train(f"stopped-at-{at}", "--max_steps", str(at), *SPLIT)
    workspace.resume(parts, "--max_steps", "4")
    for key in ("state_dict", "optimizer_states"):
        assert same(checkpoint(parts)[key], checkpoint(stopped)[key]), key


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_after_the_stop_no_gradient_is_computed_for_the_text_encoder(monkeypatch):
    model = build(text_encoder_stop=1)
    model.learning_rate = 1e-6
    with_gradient = []

    def note(self, optimizer):
        of_parts = [
            [p.grad is not None for p in part.parameters()]
            for part in (self.model, self.cond_stage_model)
        ]
        with_gradient.append([sum(found) / len(found) for found in of_parts])

    monkeypatch.setattr(LatentDiffusion, "on_before_optimizer_step", note)
    small_trainer(max_steps=2).fit(model, loader(batch(1), batch(2)))
    assert not model.text_trains and not model.train().cond_stage_model.training
    assert not any(parameter.requires_grad for parameter in model.cond_stage_model.parameters())
    assert with_gradient == [[1, 1], [1, 0]]
    assert not model.get_learned_conditioning(["a dog"]).requires_grad


def test_the_text_encoders_rate_is_scaled_as_well(workspace, caplog):
    run = workspace.train(
        "scaled",
        "--scale_lr",
        "--accumulate_grad_batches",
        "3",
        "data.params.batch_size=2",
        "--max_steps",
        "1",
        *SPLIT,
    )
    (state,) = checkpoint(run)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [1e-3 * 3 * 1 * 2, 1e-4 * 3 * 1 * 2]
    assert "learning rate 0.006, text encoder at 0.0006 until step 2" in caplog.text


@pytest.mark.parametrize("wrong, message", [
    ({"text_encoder_lr": 0.0}, "text_encoder_lr: expected a positive number, got 0.0"),
    ({"text_encoder_stop": -1}, "text_encoder_stop: expected a positive number, got -1"),
    ({"text_encoder_lr": math.nan}, "text_encoder_lr: expected a positive number, got nan"),
    ({"text_encoder_lr": 1e-6, "cond_stage_trainable": False}, "text_encoder_lr: needs "
                                                               "cond_stage_trainable: true"),
    ({"text_encoder_stop": 5, "cond_stage_trainable": False}, "text_encoder_stop: needs "
                                                              "cond_stage_trainable: true"),
])  # fmt: skip
def test_rates_and_stops_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)


def test_processes_that_wait_for_all_gradients_cannot_stop_the_text_encoder():
    with pytest.raises(UserError, match="needs --strategy ddp_find_unused_parameters_true"):
        check_strategy(DDPStrategy())
    check_strategy(DDPStrategy(find_unused_parameters=True))


# Freezing


INPUT = "model.diffusion_model.input_blocks.*"


def test_frozen_patterns_are_left_out_of_the_training():
    plain, model = (
        build(use_ema=True, freeze=patterns)
        for patterns in (None, [INPUT, "*.token_embedding.weight"])
    )
    frozen = {
        name
        for name, p in model.named_parameters()
        if not p.requires_grad and "first_stage" not in name
    }
    fits = [
        n
        for n, _ in plain.named_parameters()
        if n.startswith(INPUT[:-1]) or n.endswith(".token_embedding.weight")
    ]
    assert frozen == set(fits) and len(fits) > 10
    step(model, batch(1))[0].backward()
    optimised = {
        id(p) for group in model.configure_optimizers().param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        trained = name not in frozen and not name.startswith("first_stage_model")
        assert (id(parameter) in optimised) == (parameter.grad is not None) == trained, name
    averages = {key for key in plain.state_dict() if key.startswith("model_ema.")} - set(
        model.state_dict()
    )
    assert averages == {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}"
        for name in fits
        if name.startswith("model.")
    }


def test_a_run_with_frozen_parameters(workspace, caplog):
    more = (f"model.params.freeze=['{INPUT}']", "model.params.use_ema=true")
    straight, _ = assert_resumes_exactly(workspace, "frozen", *more)
    first, last = (
        checkpoint(straight, n)["state_dict"]
        for n in ("epoch=000000-step=000000002.ckpt", "last.ckpt")
    )
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert any(key.startswith("model.") for key in moved) and not any(
        key.startswith(INPUT[:-1]) for key in moved
    )
    assert "frozen: UNet 0." in caplog.text
    model = load_model(straight / "checkpoints/last.ckpt")
    for name, parameter in model.model.named_parameters():
        average = last.get(f"model_ema.{name.replace('.', '')}", last[f"model.{name}"])
        assert torch.equal(parameter, average), name


@pytest.mark.parametrize("patterns, message", [
    (["model.difusion_model.out.2.wieght"], r"fits no trained parameter \(did you mean "
                                            r"'model\.diffusion_model\.out"),
    ([INPUT, "nothing.*"], r"'nothing\.\*' fits no trained parameter$"),
    (["first_stage_model.*"], "fits only parameters that are not trained anyway"),
    (["*"], "nothing is left to train"),
    (INPUT, r"expected a list of patterns, got 'model"),
])  # fmt: skip
def test_patterns_that_make_no_sense(patterns, message):
    with pytest.raises(UserError, match=message):
        build(freeze=patterns)


@pytest.fixture
def lora():
    """The golden model with adapters, but those that the patterns fit."""
    pytest.importorskip("peft")

    def made(*patterns):
        model = build(lora={"rank": 2}, freeze=patterns)
        model.configure_model()
        return model

    return made


def test_adapters_are_frozen_by_the_names_of_their_weights(lora):
    plain, model = lora(), lora(INPUT, "*.to_q.weight")
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {
        name for name in trained if not name.startswith(INPUT[:-1]) and ".to_q." not in name
    }
    assert {name.partition(".")[0] for name in kept} == {"model", "cond_stage_model"}
    with pytest.raises(UserError, match="fits only parameters that are not trained anyway"):
        lora("model.diffusion_model.out.2.weight")  # which gets no adapter


def test_a_run_cannot_go_on_with_other_parameters(workspace, caplog):
    run = workspace.train("one-group", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "2", SPLIT[0]]) == 1
    assert "model.params.text_encoder_lr: None in the run, now " in caplog.text
    run = workspace.train("all-parameters", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "2", f"model.params.freeze=['{INPUT}']"]) == 1
    assert f"model.params.freeze: None in the run, now ['{INPUT}']" in caplog.text


def test_a_stop_can_be_added_to_a_run(workspace):
    run = workspace.train("stop-added", "--max_steps", "2")
    workspace.resume(run, "--max_steps", "4", "model.params.text_encoder_stop=2")
    second, last = (
        checkpoint(run, name)["state_dict"]
        for name in ("epoch=000000-step=000000002.ckpt", "last.ckpt")
    )
    assert parts_that_moved(second, last) == {"model"}


@pytest.mark.parametrize("trained, given, same_set", [
    (["a.*"], ["a.*"], True), (["a.*"], ["b.*"], False), ([], ["b.*"], False),
])  # fmt: skip
def test_other_patterns_of_as_many_parameters_are_noticed(trained, given, same_set):
    saved = {
        "optimizer_states": [{"param_groups": [{"params": [0, 1]}]}],
        "config": {"model": {"params": {"freeze": trained, "timesteps": 10}}},
    }
    if same_set:
        return check_same_parameters(saved, [None], 2, given)
    with pytest.raises(UserError, match="have to stay as they were"):
        check_same_parameters(saved, [None], 2, given)
