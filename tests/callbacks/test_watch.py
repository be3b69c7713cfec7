"""What a training run watches: non-finite numbers, the first step, fixed losses, and a panel of fixed prompts."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from ldm.callbacks.first_step import FirstStepCheck, checksum
from ldm.callbacks.fixed_loss import FixedLoss
from ldm.callbacks.panel import Panel
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.support.runs import ROOT, SIZE, Workspace, checkpoint, csv_rows, metrics, same

HERE = "tests.callbacks.test_watch"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("watched"))


@pytest.fixture(scope="module")
def weights(workspace):
    """`--actual_resume` with weights through which gradients flow: a new UNet's last layers are zero."""
    return ["--actual_resume", str(workspace.train("weights") / "checkpoints/last.ckpt")]


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


def spy(callback, /, **params):
    """An override that adds a callback of this file to a run."""
    return f"lightning.callbacks.{callback}={{target: {HERE}.{callback}, params: {json.dumps(params)}}}"


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("error: ")]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# Numbers that are not finite


class BreakWeights(pl.Callback):
    """A weight is lost before the batch of an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            BreakWeights.batch = batch
            with torch.no_grad():
                next(pl_module.model.parameters()).fill_(torch.nan)


class BreakGradients(pl.Callback):
    """The gradients of a step are lost, although its loss is finite."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            next(pl_module.model.parameters()).grad.fill_(torch.nan)


class BrokenOnRankOne(LatentDiffusion):
    """The loss of the second process's third step is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_rank == 1 and batch_idx == 2 else loss


def test_a_loss_that_is_not_finite_ends_the_run(workspace, caplog):
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    assert main.main(workspace.arguments("nan", every, spy("BreakWeights", step=3))) == 1
    run = workspace.run("nan")
    assert checkpoints(run) == [f"epoch=000000-step=00000000{step}.ckpt" for step in (1, 2)] + ["last.ckpt"]
    assert all(value.isfinite().all() for value in checkpoint(run)["state_dict"].values())
    (error,) = errors(caplog)
    last = str(run / "checkpoints/last.ckpt")
    for part in ("step 3:", "subject nan, prior nan", '"photo of a sks dog"', '"photo of a dog"', str(workspace.photos),
                 str(workspace.class_images), "base_learning_rate (it was 0.001)", last):  # fmt: skip
        assert part in error, part
    assert "\n" not in error


def test_the_files_that_are_named_are_those_of_the_batch(workspace, caplog):
    """Also in a resumed run, whose loader starts in the middle."""
    run = workspace.train("named", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "5", spy("BreakWeights", step=4)]) == 1
    (error,) = errors(caplog)
    for half, name, root in zip(BreakWeights.batch, ("subject", "prior"), (workspace.photos, workspace.class_images)):
        path = re.search(rf'{name}: "[^"]*" \(([^)]*)\)', error).group(1)
        assert Path(path).parent == root
        image = torch.from_numpy(ImageFolderDataset(path_folder(path, workspace), SIZE, "squash")[0]["image"])
        assert any(torch.equal(half["image"][0], view) for view in (image, image.flip(1)))


def path_folder(path, workspace):
    """A folder with this file alone."""
    (folder := workspace.path / f"alone-{Path(path).parent.name}").mkdir()
    shutil.copy(path, folder)
    return folder


def test_an_accumulated_batch_ends_it_too_and_before_the_step(workspace, caplog):
    more = ["--accumulate_grad_batches", "2", spy("BreakWeights", step=2)]
    assert main.main(workspace.arguments("nan-accumulated", *more)) == 1
    assert "error: step 2: the loss is not finite" in caplog.text
    assert checkpoints(workspace.run("nan-accumulated")) == []
    assert "no step is saved yet" in caplog.text


def test_weights_that_are_not_finite_are_not_written(workspace, caplog):
    more = [spy("BreakGradients", step=4), "lightning.modelcheckpoint.params.every_n_train_steps=3"]
    assert main.main(workspace.arguments("nan-weights", *more)) == 1
    run = workspace.run("nan-weights")
    assert checkpoints(run) == ["epoch=000000-step=000000003.ckpt", "last.ckpt"]
    assert checkpoint(run)["global_step"] == 3
    (error,) = errors(caplog)
    assert "step 4: trained weights are not finite (model." in error and "no checkpoint is written" in error


def test_a_loss_of_one_process_ends_all(workspace, monkeypatch):
    devices = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    more = [f"model.target={HERE}.BrokenOnRankOne", "lightning.modelcheckpoint.params.every_n_train_steps=1"]
    more += [fixed(every_n_steps=1), with_panel({"images": 1})]  # of the first process, for which the other waits
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = workspace.start(*workspace.arguments("nan-ddp", *devices, *more, "--max_steps", "6"))
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "step 3: the loss is not finite" in output and "step 3: stopped, for another process" in output
    run = workspace.run("nan-ddp")
    assert checkpoints(run)[-2:] == ["epoch=000000-step=000000002.ckpt", "last.ckpt"]
    assert panels(run) == ["panel_gs-000000.png", "panel_gs-000002.png"]


# The first step


class Rate:
    """A schedule: no learning rate for the first `zeros` steps."""

    def __init__(self, zeros):
        self.zeros = zeros

    def __call__(self, step):
        return float(step >= self.zeros)


class Touch(pl.Callback):
    """Something changes a tensor that it should leave alone."""

    def __init__(self, name, step=1):
        self.name, self.step = name, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            with torch.no_grad():
                pl_module.state_dict()[self.name].view(-1)[0].add_(1e-3)


class Detached(LatentDiffusion):
    """No gradient reaches the text encoder."""

    def get_learned_conditioning(self, c):
        return super().get_learned_conditioning(c).detach()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (40, 64), (3, 1001, 4)])
def test_a_checksum_changes_with_any_value(dtype, shape):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    before = checksum(values)
    assert torch.equal(checksum(values.clone()), before)
    flat = values.view(-1)
    for place in {0, flat.numel() // 2, flat.numel() - 1} if flat.numel() else ():
        own = flat[place].clone()
        flat[place] = ~own if dtype == torch.bool else own + own.abs() / 64 + 1
        assert not torch.equal(checksum(values), before)
        flat[place] = own
    assert torch.equal(checksum(values), before)


@pytest.mark.parametrize("places", [(0, 1), (0, 1024), (2, 4096), (5, 4101), (0, 5000), (4998, 5001)])
def test_a_checksum_sees_changes_that_cancel_in_a_sum(places):
    bits = torch.arange(5002, dtype=torch.int32).view(torch.float32)
    before, integers = checksum(bits), bits.view(torch.int32)
    first, second = places
    integers[first] += 2
    integers[second] -= 2
    assert not torch.equal(checksum(bits), before)
    integers[first], integers[second] = second, first
    assert not torch.equal(checksum(bits), before), "exchanged"


def test_parts_of_a_transposed_tensor_count():
    values = torch.arange(12.0).view(3, 4)
    assert not torch.equal(checksum(values.T[1:]), checksum(values.T[:-1]))


@pytest.mark.parametrize("more", [
    ["--accumulate_grad_batches", "2", "model.params.use_ema=true"],
    ["model.params.lora.rank=2", "model.params.use_ema=false"],
    ["model.params.cond_stage_trainable=false"],
], ids=["accumulated", "lora", "unet"])  # fmt: skip
def test_a_sound_run_passes(workspace, weights, caplog, more):
    run = workspace.train(f"sound{len(more)}{more[0][-4:]}", "--max_steps", "2", *weights, *more)
    assert "step 1: what should train has moved, and nothing else has" in caplog.text
    workspace.resume(run, "--max_steps", "3")
    assert "step 3: what should train has moved, and nothing else has" in caplog.text


def test_a_new_model_is_looked_at_until_its_zero_layers_pass_gradients(workspace, caplog):
    workspace.train("new", "model.base_learning_rate=1e-6")
    found = re.search(r"step (\d+): (what should train has moved|\d+ of \d+ trained tensors)", caplog.text)
    assert found and found.group(1) == "4"


@pytest.mark.parametrize("name, words", [
    ("first_stage_model.decoder.conv_out.bias", ["(autoencoder) is frozen"]),
    ("betas", ["betas is frozen"]),
    ("cond_stage_model.transformer.text_model.final_layer_norm.weight", ["(text encoder) is frozen"]),
])  # fmt: skip
def test_something_frozen_that_changes_ends_the_run(workspace, caplog, name, words):
    more = ["model.params.cond_stage_trainable=false", spy("Touch", name=name)]
    assert main.main(workspace.arguments(f"touched-{name}", *more)) == 1
    (error,) = errors(caplog)
    assert all(word in error for word in ["step 1", name, *words]), error


def test_it_can_be_switched_off(workspace):
    workspace.train("off", "--max_steps", "1", spy("Touch", name="betas"), "lightning.callbacks.first_step=null")


def test_the_frozen_layers_under_adapters_have_to_stay(workspace, caplog):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.base_layer.weight"
    more = ["model.params.lora.rank=2", "model.params.use_ema=false", spy("Touch", name=name)]
    assert main.main(workspace.arguments("touched-base", *more)) == 1
    assert f"step 1: {name} (UNet) is frozen, but has changed" in caplog.text


def test_it_waits_for_a_learning_rate_and_then_looks(workspace, caplog):
    schedule = f"model.params.scheduler_config={{target: {HERE}.Rate, params: {{zeros: 2}}}}"
    assert main.main(workspace.arguments("waits", schedule, spy("Touch", name="betas", step=2))) == 1
    assert "error: step 3: betas is frozen" in caplog.text


def test_a_learning_rate_that_stays_zero_is_an_error(workspace, caplog):
    schedule = f"model.params.scheduler_config={{target: {HERE}.Rate, params: {{zeros: 100}}}}"
    more = [schedule, "lightning.callbacks.first_step.params.patience=2"]
    assert main.main(workspace.arguments("zero-rate", *more)) == 1
    assert "step 2: the UNet and the text encoder should train, but no weight has moved" in caplog.text
    assert "at a learning rate of 0" in caplog.text


def test_a_part_that_no_gradient_reaches_is_an_error(workspace, caplog):
    more = [f"model.target={HERE}.Detached", "lightning.callbacks.first_step.params.patience=2"]
    assert main.main(workspace.arguments("detached", *more)) == 1
    assert "step 2: the text encoder should train" in caplog.text and "no gradient arrives there" in caplog.text


def test_a_learning_rate_that_rounding_swallows_is_said(workspace, weights, caplog):
    workspace.train("rounded", "--max_steps", "1", *weights, "model.base_learning_rate=1e-10")
    (warning,) = [record.getMessage() for record in caplog.records if "did not move" in record.getMessage()]
    assert "trained tensors had a gradient" in warning and "1e-10" in warning


def test_one_that_it_swallows_altogether_is_an_error(workspace, weights, caplog):
    assert main.main(workspace.arguments("swallowed", *weights, "model.base_learning_rate=1e-20")) == 1
    (error,) = errors(caplog)
    assert "the UNet and the text encoder should train" in error and "1e-20, which is too small" in error


def test_a_step_that_the_gradient_scaler_skipped_does_not_count():
    module = torch.nn.Linear(2, 2)
    module.automatic_optimization = True
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    trainer = SimpleNamespace(
        strategy=SingleDeviceStrategy("cpu"), precision_plugin=SimpleNamespace(scaler=object()), optimizers=[optimizer],
        accumulate_grad_batches=1, num_training_batches=9, global_step=0, is_global_zero=True,
    )  # fmt: skip
    check = FirstStepCheck(patience=0)
    check.on_train_start(trainer, module)

    def step(gradient):
        module.weight.grad, module.bias.grad = torch.full((2, 2), gradient), torch.ones(2)
        trainer.global_step += 1
        check.on_before_optimizer_step(trainer, module, optimizer)
        check.on_train_batch_end(trainer, module, None, None, 0)

    step(torch.inf)
    step(torch.inf)
    with pytest.raises(UserError, match=r"step 3: the bias and the weight should train"):
        step(1.0)


# Losses at fixed time steps with fixed noise


def fixed(**params):
    """An override that evaluates two examples of each half at three time steps, every two steps."""
    params = {"every_n_steps": 2, "examples": 2, "time_steps": 3, **params}
    return (
        f"lightning.callbacks.fixed_loss={{target: ldm.callbacks.fixed_loss.FixedLoss, params: {json.dumps(params)}}}"
    )


def fixed_losses(run, name):
    return {int(row["step"]): row[name] for row in csv_rows(run) if row.get(name)}


@pytest.fixture(scope="module")
def plain(workspace):
    """A run that nothing watches."""
    return workspace.train("plain", "lightning.callbacks.first_step=null")


@pytest.fixture(scope="module")
def curve(workspace):
    return workspace.train("curve", fixed())


def test_fixed_losses_are_logged_also_before_the_first_step(curve):
    for name in ("val/loss_subject_fixed", "val/loss_prior_fixed"):
        assert list(fixed_losses(curve, name)) == [0, 2, 4]
        assert len(set(fixed_losses(curve, name).values())) == 3


def test_fixed_losses_change_nothing(curve, plain):
    ours, theirs = checkpoint(curve), checkpoint(plain)
    assert same(ours["state_dict"], theirs["state_dict"]) and same(ours["optimizer_states"], theirs["optimizer_states"])
    assert [row["train/loss_total"] for row in metrics(curve)] == [row["train/loss_total"] for row in metrics(plain)]


def test_fixed_losses_are_a_function_of_the_weights_alone(workspace, curve):
    """Resumed with other batches, in which the step's own losses differ."""
    first = workspace.train("same-weights", "--max_steps", "2", fixed(every_n_steps=50))
    workspace.resume(first, "--max_steps", "3", "data.params.batch_size=2", "-s", "5")
    for name in ("val/loss_subject_fixed", "val/loss_prior_fixed"):
        assert fixed_losses(first, name) == {step: fixed_losses(curve, name)[step] for step in (0, 2)}


def test_a_fixed_loss_is_the_mean_of_the_examples_losses(workspace, golden_model):
    """At the middles of three parts of the schedule, of the unaugmented first and second image."""
    data = PersonalizedBase(workspace.photos, SIZE, flip_p=1.0, resize="random_crop")
    callback = FixedLoss(examples=2, time_steps=3, batch_size=4)
    golden_model.eval()
    found = callback.losses(golden_model, {"train": data})
    assert list(found) == ["subject"]
    assert FixedLoss(examples=2, time_steps=3, batch_size=1).losses(golden_model, {"train": data}) == pytest.approx(
        found
    )
    (half,) = callback._halves.values()
    assert half.t.tolist() == [166, 500, 833] * 2
    plain = PersonalizedBase(workspace.photos, SIZE, flip_p=0.0, resize="center_crop")
    with torch.no_grad():
        losses = []
        for example in range(2):
            image = torch.from_numpy(plain[example]["image"].copy()).permute(2, 0, 1)[None]
            z = golden_model.get_first_stage_encoding(golden_model.encode_first_stage(image).mode())
            cond = golden_model.get_learned_conditioning([plain[example]["caption"]])
            for place in range(3):
                pair = 3 * example + place
                loss, _ = golden_model.p_losses(z, cond, half.t[pair : pair + 1], half.noise[pair : pair + 1])
                losses.append(float(loss))
    assert found["subject"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_fixed_losses_without_a_prior_and_of_latents(golden_model):
    class Latents(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            moments = torch.randn(
                2 * golden_model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(index)
            )
            return {"moments": moments.half(), "caption": f"number {index}"}

    golden_model.eval()
    state = torch.get_rng_state()
    first, second = (FixedLoss(time_steps=2).losses(golden_model, {"train": Latents()}) for _ in range(2))
    assert first == second and list(first) == ["subject"]
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_losses_of_another_kind_of_model(workspace, caplog):
    assert main.main(workspace.arguments("mistaken", fixed(time_steps=0))) == 1
    assert "fixed_loss.params.time_steps: expected 1 or more, got 0" in caplog.text


# The panel


def with_panel(panel, **params):
    params = {"batch_frequency": 2, "increase_log_steps": False, "log_images_kwargs": {"ddim_steps": 2}, **params}
    params |= {} if panel == "default" else {"panel": panel}
    return f"lightning.callbacks.image_logger={{target: main.ImageLogger, params: {json.dumps(params)}}}"


@pytest.fixture(scope="module")
def paneled(workspace):
    return workspace.train("panel", with_panel({"images": 2}))


def panels(run):
    return sorted(path.name for path in run.glob("images/panel/*"))


def test_a_panel_comes_with_the_grids_and_before_the_first_step(paneled):
    assert panels(paneled) == [f"panel_gs-{step:06}.png" for step in (0, 2, 4)]
    sheets = [Image.open(path) for path in sorted((paneled / "images/panel").iterdir())]
    assert len({sheet.tobytes() for sheet in sheets}) == 3 and len({sheet.size for sheet in sheets}) == 1
    events = EventAccumulator(str(paneled / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("panel/panel")] == [0, 2, 4]


@pytest.mark.parametrize("more", [[], ["model.params.use_ema=true"]])
def test_a_panel_changes_nothing(workspace, paneled, plain, more):
    with_it, without = paneled, plain
    if more:
        with_it = workspace.train("panel-ema", with_panel({"images": 1}), *more)
        without = workspace.train("plain-ema", *more)
    ours, theirs = checkpoint(with_it), checkpoint(without)
    assert same(ours["state_dict"], theirs["state_dict"]) and same(ours["optimizer_states"], theirs["optimizer_states"])


def test_panels_of_the_same_weights_are_the_same(workspace, paneled):
    again = workspace.train("panel-again", with_panel({"images": 2, "every_n_steps": 4}), "data.params.batch_size=2",
                            "--max_steps", "1")  # fmt: skip
    assert panels(again) == ["panel_gs-000000.png"]
    first, second = (run / "images/panel/panel_gs-000000.png" for run in (paneled, again))
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


@pytest.mark.parametrize("panel", [None, False])
def test_no_panel(workspace, panel):
    run = workspace.train(f"no-panel-{panel}", with_panel(panel), "--max_steps", "2")
    assert panels(run) == [] and list(run.glob("images/train/*"))


def test_the_rows_of_a_panel():
    found = {"subject_prompts": ["photo of a sks car"], "class_prompts": ["", "photo of a car"]}
    data = SimpleNamespace(summary=lambda: found)
    assert Panel().prompts(data) == ["photo of a sks car", "photo of a car", "a photo of a house", "a photo of a tree"]
    found["class_prompts"] = []
    assert Panel(unrelated=["a cat"]).prompts(data) == ["photo of a sks car", "a cat"]
    assert Panel(prompts=["x", "y"]).prompts(data) == ["x", "y"]
    assert Panel().prompts(SimpleNamespace()) == []


@pytest.mark.parametrize("panel, words", [
    ({"image": 2}, "panel.image: unknown key"), ({"images": 0}, "panel.images: expected 1 or more, got 0"),
    ({"prompts": "a cat"}, "panel.prompts: expected a list of prompts, got 'a cat'"), (3, "panel: expected a mapping"),
])  # fmt: skip
def test_a_panel_that_cannot_be(workspace, caplog, panel, words):
    assert main.main(workspace.arguments("bad-panel", with_panel(panel))) == 1
    assert words in caplog.text
