"""What a run switches on by itself: by which rules, with which reasons, and that no number
changes.
"""

import itertools
import logging
from dataclasses import replace

import pytest
import torch

from ldm.benchmark.predict import predict
from ldm.benchmark.variants import checked_config
from ldm.training import engine, facts, memory
from ldm.training.engine import AUTO, LATENTS, LAYOUT, OPTIMIZER, RECOMPUTE, Facts, Images
from ldm.training.run import Run
from ldm.training.saved import saved_config
from scripts import benchmark
from tests.support.models import batch, build, in_float64, step
from tests.support.runs import ROOT, Workspace, checkpoint, config

GB = 10**9
FINETUNE = ROOT / "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
NEEDS = {False: 14 * GB, "attention": 12 * GB, True: 11 * GB}
IMAGES = Images(variants=410, draws=1600, nbytes=GB, free=20 * GB)
LARGE = Facts(
    device="cpu",
    weights=4 * GB,
    trained=3 * GB,
    given={},
    memory=20 * GB,
    needed=lambda recomputed, optimizer: NEEDS[recomputed],
    images=IMAGES,
)
ALL_ON = {LATENTS: True, OPTIMIZER: "adamw_in_backward", RECOMPUTE: False, LAYOUT: True}
OFF = {LATENTS: None, OPTIMIZER: "adamw", RECOMPUTE: False, LAYOUT: False}


def values(facts_):
    return {choice.key: choice.value for choice in engine.choose(facts_)}


def changed(**more):
    return replace(LARGE, **more)


@pytest.mark.parametrize(
    "given, expected",
    [
        (LARGE, ALL_ON),
        # What one picture more or less makes of the cache.
        (changed(images=replace(IMAGES, draws=410)), ALL_ON),
        (changed(images=replace(IMAGES, draws=409)), {**ALL_ON, LATENTS: None}),
        (changed(images=replace(IMAGES, draws=None)), ALL_ON),
        (changed(images=replace(IMAGES, nbytes=6 * GB)), {**ALL_ON, LATENTS: None}),
        (changed(images="cropped anew"), {**ALL_ON, LATENTS: None}),
        (changed(images=None), {**ALL_ON, LATENTS: None}),
        # AdamW in the backward pass has no gradients to accumulate, clip, scale or share.
        (changed(needs_gradients=["clipping"]), {**ALL_ON, OPTIMIZER: "adamw"}),
        (changed(trained=0), {**ALL_ON, OPTIMIZER: "adamw"}),
        # The fastest that fits, with a tenth and a GB to spare; the least where nothing does.
        (changed(memory=int(16.5 * GB)), ALL_ON),
        (changed(memory=int(16.3 * GB)), {**ALL_ON, RECOMPUTE: "attention"}),
        (changed(memory=int(14.1 * GB)), {**ALL_ON, RECOMPUTE: True}),
        (changed(memory=GB), {**ALL_ON, RECOMPUTE: True}),
        (changed(memory=None), {**ALL_ON, RECOMPUTE: True}),
        (changed(sharded=True), {**ALL_ON, RECOMPUTE: True}),
        # A small model needs no memory saved, and its calls are what takes time.
        (changed(weights=GB // 2, trained=GB // 2), {**OFF, LATENTS: True}),
        # No GPU has measured the layout.
        (changed(device="cuda"), {**ALL_ON, LAYOUT: False}),
        # The config is right, also where it says no; but for the word for this.
        (changed(given={key: value or False for key, value in OFF.items()}), {**OFF, LATENTS: False}),
        (changed(given={RECOMPUTE: AUTO}, memory=GB), {**ALL_ON, RECOMPUTE: True}),
        # A run that goes on is as it was: an older one has nothing of this.
        (changed(resumes=True), OFF),
        (changed(resumes=True, given={RECOMPUTE: True}), {**OFF, RECOMPUTE: True}),
        (changed(resumes=True, given=ALL_ON, settled=ALL_ON, memory=GB), ALL_ON),
        (
            changed(resumes=True, given=ALL_ON, settled=ALL_ON, needs_gradients=["clipping"]),
            {**ALL_ON, OPTIMIZER: "adamw"},
        ),
    ],
)  # fmt: skip
def test_what_is_chosen(given, expected):
    assert values(given) == expected


def test_the_line_names_each_choice_and_its_reason():
    line = engine.in_one_line(engine.choose(changed(memory=int(16.3 * GB))))
    assert line == (
        "latents cached (410 pictures encoded once, the steps read 1600); "
        "AdamW in the backward pass (3.0 GB of gradients less); "
        "attention recomputed (14.2 of 16.3 GB); channels last (a large UNet on a CPU)"
    )
    line = engine.in_one_line(
        engine.choose(changed(given={RECOMPUTE: True}, needs_gradients=["x"]))
    )
    assert "AdamW after the backward pass (x); use_checkpoint true as given" in line


# No number changes


def trained(recomputed, in_backward, cached, channels_last=False, model=None):
    """Return a model's weights and its optimizer's state after three steps."""
    model = model or build()
    unet = model.model.diffusion_model
    unet.recompute(recomputed)
    unet.channels_last = channels_last
    model.configure_model()
    model.optimizer = "adamw_in_backward" if in_backward else "adamw"
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    dtype = next(model.parameters()).dtype
    for number in range(3):
        parts = [batch(2 * number + role) for role in (0, 1)]
        for part in parts:
            part["image"] = part["image"].to(dtype)
            if cached:
                images = part.pop("image").permute(0, 3, 1, 2).contiguous()
                with torch.no_grad():
                    part["moments"] = model.encode_first_stage(images).parameters

        def closure(parts=parts):
            optimizer.zero_grad()
            loss, _ = step(model, *parts)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model.state_dict(), optimizer.state_dict()["state"]


@pytest.fixture(scope="module")
def plain():
    return trained(False, False, False)


RECOMPUTED = [False, "attention", True]


@pytest.mark.parametrize(
    "recomputed, in_backward", list(itertools.product(RECOMPUTED, [False, True]))[1:]
)
def test_when_and_how_often_something_is_computed_changes_no_bit(plain, recomputed, in_backward):
    weights, state = trained(recomputed, in_backward, False)
    assert all(torch.equal(weights[name], value) for name, value in plain[0].items())
    assert all(
        torch.equal(state[number][name], value)
        for number, moments in plain[1].items()
        for name, value in moments.items()
    )


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_latents_and_layout_change_rounding_alone(recomputed, monkeypatch):
    """In float64, so that a difference would show beside what three steps make of rounding."""
    plain, _ = trained(False, False, False, model=in_float64(build(), monkeypatch))
    model = in_float64(build(), monkeypatch)
    everything, _ = trained(recomputed, True, True, channels_last=True, model=model)
    weight = model.model.diffusion_model.middle_block[0].in_layers[2].weight
    assert not weight.is_contiguous(), "the layout is the other one"
    # Where a gradient is rounding alone, AdamW makes whole steps of it, of 1e-3 each.
    off = {name: (everything[name] - value).abs().median() for name, value in plain.items()}
    assert max(off.values()) < 1e-9
    moved = build().state_dict()
    assert max((plain[name] - moved[name]).abs().max() for name in plain) > 1e-3


# In a run


@pytest.fixture
def workspace(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return Workspace(tmp_path)


def saved(folder):
    return saved_config(Run(folder, ""))


def line_of(caplog):
    return [line for line in caplog.text.splitlines() if line.strip().startswith("engine ")][-1]


def test_a_run_says_and_saves_what_was_chosen_and_goes_on_with_it(workspace, caplog, monkeypatch):
    for module in (engine, memory):
        monkeypatch.setattr(module, "LARGE" if module is engine else "CONCERNS", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**12)
    auto = f"{RECOMPUTE}=auto"
    straight = workspace.train("straight", "--max_steps", "9", auto)
    for text in ("latents cached (14 pictures", "in the backward pass", "nothing recomputed"):
        assert text in line_of(caplog)
    chosen = saved(straight)
    assert {key: chosen.get(key, False) for key in ALL_ON} == ALL_ON
    assert chosen.get(facts.CHOSEN) == sorted(ALL_ON)
    parts = workspace.train("parts", "--max_steps", "8", auto)
    # On a machine where it would not be chosen now.
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    workspace.resume(parts, "--max_steps", "9")
    assert "latent_cache true as before" in line_of(caplog)
    ours, theirs = (checkpoint(run)["state_dict"] for run in (parts, straight))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    # What the engine has chosen does not keep its user from what it does not go with.
    workspace.resume(parts, "--max_steps", "10", "--accumulate_grad_batches", "2")
    assert "AdamW after the backward pass (lightning.trainer.accumulate" in line_of(caplog)
    assert saved(parts).get(OPTIMIZER) == "adamw"


def test_an_older_run_goes_on_as_it_was(workspace, caplog, monkeypatch):
    monkeypatch.setattr(facts, "decide", lambda config, *_: (config, ""))
    monkeypatch.setattr("ldm.training.train.decide", facts.decide)
    old = workspace.train("old", "--max_steps", "2")
    monkeypatch.undo()
    monkeypatch.setattr(engine, "LARGE", 0)
    workspace.resume(old, "--max_steps", "8")
    assert not any(saved(old).get(key) for key in (LATENTS, OPTIMIZER, LAYOUT, facts.CHOSEN))


def test_a_callback_that_reads_gradients_gets_them(workspace, caplog, monkeypatch):
    monkeypatch.setattr(engine, "LARGE", 0)
    scheduler = (
        "lightning.callbacks.more.target=pytorch_lightning.callbacks.GradientAccumulationScheduler"
    )
    workspace.train(
        "scheduled", "--max_steps", "2", scheduler, "lightning.callbacks.more.params.scheduling={0: 1}"
    )  # fmt: skip
    assert "after the backward pass (GradientAccumulationScheduler)" in line_of(caplog)


# For a card that is not here


def test_the_choice_for_a_card_needs_no_card(capsys):
    """v1 at 512 pixels; the figures are those of docs/training.md."""
    command = ["memory", "--base", str(FINETUNE), "--precision", "bf16-mixed"]
    assert benchmark.main([*command, "--card", "12", "--card", "24"]) == 0
    printed = capsys.readouterr().out
    small, large = (
        next(line for line in printed.splitlines() if line.startswith(f"ours, {card} GB:"))
        for card in (12, 24)
    )
    assert "all blocks recomputed (not even so it fits" in small
    assert "nothing recomputed" in large and "in the backward pass" in large


@pytest.mark.parametrize(
    "more, said",
    [
        ("lightning.trainer.accumulate_grad_batches=2", "after the backward pass (lightning.tr"),
        ("model.params.lora.rank=4", "after the backward pass (0.00 GB are trained)"),
        ("model.params.reg_weight=0.5", "in the backward pass"),
    ],
)
def test_the_choice_goes_by_the_whole_config(tmp_path, monkeypatch, more, said):
    monkeypatch.setattr(engine, "LARGE", 1)
    content = checked_config([config(tmp_path)], [more])
    ((_, line),) = predict(content, [("cuda", 10**12)])
    assert said in line
