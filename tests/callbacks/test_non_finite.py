"""Numbers that are not finite end a run before they are written."""

import re
import shutil
from pathlib import Path

import pytorch_lightning as pl
import torch

import main
from ldm.data.image_folder import ImageFolderDataset
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.support.runs import SIZE, checkpoint
from tests.support.spies import checkpoints, errors, fixed, panels, spy, with_panel
from tests.support.together import of_torchrun, together


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
    assert main.main(workspace.arguments("nan", every, spy(BreakWeights, step=3))) == 1
    run = workspace.run("nan")
    assert checkpoints(run) == [f"epoch=000000-step=00000000{step}.ckpt" for step in (1, 2)] + [
        "last.ckpt"
    ]
    assert all(value.isfinite().all() for value in checkpoint(run)["state_dict"].values())
    (error,) = errors(caplog)
    last = str(run / "checkpoints/last.ckpt")
    for part in (
        "step 3:",
        "subject nan, prior nan",
        '"photo of a sks dog"',
        '"photo of a dog"',
        str(workspace.photos),
        str(workspace.class_images),
        "base_learning_rate (it was 0.001)",
        last,
    ):
        assert part in error, part
    assert "\n" not in error


def test_the_files_that_are_named_are_those_of_the_batch(workspace, caplog):
    """Also in a resumed run, whose loader starts in the middle."""
    run = workspace.train("named", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "5", spy(BreakWeights, step=4)]) == 1
    (error,) = errors(caplog)
    for half, name, root in zip(
        BreakWeights.batch, ("subject", "prior"), (workspace.photos, workspace.class_images)
    ):
        path = re.search(rf'{name}: "[^"]*" \(([^)]*)\)', error).group(1)
        assert Path(path).parent == root
        image = torch.from_numpy(
            ImageFolderDataset(path_folder(path, workspace), SIZE, "squash")[0]["image"]
        )
        assert any(torch.equal(half["image"][0], view) for view in (image, image.flip(1)))


def path_folder(path, workspace):
    """A folder with this file alone."""
    (folder := workspace.path / f"alone-{Path(path).parent.name}").mkdir()
    shutil.copy(path, folder)
    return folder


def test_an_accumulated_batch_ends_it_too_and_before_the_step(workspace, caplog):
    more = ["--accumulate_grad_batches", "2", spy(BreakWeights, step=2)]
    assert main.main(workspace.arguments("nan-accumulated", *more)) == 1
    assert "error: step 2: the loss is not finite" in caplog.text
    assert checkpoints(workspace.run("nan-accumulated")) == []
    assert "no step is saved yet" in caplog.text


def test_weights_that_are_not_finite_are_not_written(workspace, caplog):
    more = [spy(BreakGradients, step=4), "lightning.modelcheckpoint.params.every_n_train_steps=3"]
    assert main.main(workspace.arguments("nan-weights", *more)) == 1
    run = workspace.run("nan-weights")
    assert checkpoints(run) == ["epoch=000000-step=000000003.ckpt", "last.ckpt"]
    assert checkpoint(run)["global_step"] == 3
    (error,) = errors(caplog)
    assert (
        "step 4: trained weights are not finite (model." in error
        and "no checkpoint is written" in error
    )


def test_a_loss_of_one_process_ends_all(workspace):
    devices = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--max_steps", "6"]
    more = [
        f"model.target={__name__}.BrokenOnRankOne",
        "lightning.modelcheckpoint.params.every_n_train_steps=1",
        fixed(every_n_steps=1),
        with_panel({"images": 1}),  # of the first process, for which the other waits
    ]
    arguments = workspace.arguments("nan-ddp", *devices, *more)

    def job(rank: int) -> None:
        # The first process's status is the run's; a second error would stop it before its own.
        assert main.main(arguments) == (1 if rank == 0 else 0)

    together(workspace.path, job, of_torchrun)
    output = "".join((workspace.path / f"log{rank}").read_text() for rank in (0, 1))
    assert (
        "step 3: the loss is not finite" in output
        and "step 3: stopped, for another process" in output
    )
    run = workspace.run("nan-ddp")
    assert checkpoints(run)[-2:] == ["epoch=000000-step=000000002.ckpt", "last.ckpt"]
    assert panels(run) == ["panel_gs-000000.png", "panel_gs-000002.png"]
