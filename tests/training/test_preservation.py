"""The ways to keep the prior, as a run has them: what goes together, resuming, and the log."""

import re

import pytest
import torch

import main
from ldm.models.diffusion.preservation import PRESERVATIONS
from ldm.sampling.text_to_image import load_model
from ldm.training.defaults import WITHOUT_CLASS_IMAGES
from tests.support.exact import smallest
from tests.support.runs import (
    Workspace,
    assert_resumes_exactly,
    checkpoint,
    metrics,
    without_class_images,
)

METHOD = "model.params.preservation"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, 4)


def test_the_command_line_knows_which_methods_take_no_class_images():
    taken = {name for name, method in PRESERVATIONS.items() if not method.takes_class_images}
    assert taken == set(WITHOUT_CLASS_IMAGES)


@pytest.mark.parametrize("given, message", [
    (["=dop"], "dop uses no class images: leave out --reg_data_root"),
    (["=dopp"], r"preservation: unknown 'dopp' \(did you mean 'dop'\?\)"),
    (["={method: dop, teacher: fp8}"], "preservation.teacher: unknown 'fp8'.*accepted: fp32, bf16"),
    (["={method: none, teacher: bf16}"], "preservation.teacher: bf16: none has no teacher"),
    (["=prior_prediction", "model.params.reg_weight=0"], "a reg_weight of 0 preserves nothing"),
    (["={method: prior_prediction, teacher: bf16}", "model.params.lora={rank: 2}",
      "model.params.use_ema=false"], "with lora the teacher is the model itself"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(workspace, base, caplog, given, message):
    method, *more = given
    arguments = workspace.arguments("refused", METHOD + method, *more, base=base)
    assert main.main(arguments) == 1
    assert re.search(message, caplog.text)
    assert not list(workspace.logs.glob("*_refused"))


@pytest.mark.parametrize("kind, more", [
    ("dop", []),
    ("blank", []),
    ("dop", ["model.params.lora={rank: 2}", "model.params.use_ema=false"]),
])  # fmt: skip
def test_a_run_without_class_images_goes_on_with_its_teacher(tmp_path, monkeypatch, kind, more):
    workspace, given = Workspace(tmp_path), Workspace.arguments
    monkeypatch.setattr(
        Workspace, "arguments", lambda *args, **more: without_class_images(given(*args, **more))
    )
    base, fast = ["--base", str(smallest(workspace, 4))], "model.base_learning_rate=0.05"
    lora = bool(more)
    if lora:  # adapters learn nothing behind layers that begin at zero
        run = workspace.train("base", f"{METHOD}=none", fast, "--max_steps", "3", *base)
        more = [*more, fast, "--actual_resume", str(run / "checkpoints/last.ckpt")]
    straight, _ = assert_resumes_exactly(workspace, kind, f"{METHOD}={kind}", *more, *base)
    end = checkpoint(straight)
    if lora:
        # Nothing is copied: the teacher is the model with its adapters switched off.
        assert end["teacher"] == {}
        adapters = [value for key, value in end["state_dict"].items() if ".lora_B." in key]
        assert any(value.abs().max() > 0 for value in adapters)
    else:
        losses = [float(row["train/loss_prior"]) for row in metrics(straight)]
        # Before the first step the model is its own teacher, up to the rounding of other batch
        # sizes.
        assert losses[0] < 1e-9 < losses[3]
        assert end["teacher"]
    # What samples from the checkpoint takes no notice.
    assert isinstance(load_model(straight / "checkpoints/last.ckpt"), torch.nn.Module)
