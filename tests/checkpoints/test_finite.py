"""Weights with values that are no numbers are refused where a model would take them."""

import math

import pytest
import torch

import main
from ldm.checkpoints.finite import is_finite
from ldm.checkpoints.loading import load_state
from ldm.errors import UserError
from scripts import stable_txt2img
from tests.support.exact import smallest
from tests.support.runs import Workspace, checkpoint

BROKEN = "model.diffusion_model.out.2.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_finite(dtype):
    large = torch.full((10_000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large)
    for value in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.cat([large, torch.tensor([value], dtype=dtype)]))
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
    assert is_finite(torch.tensor([1, 2]))


def test_a_base_file_is_named_not_the_learning_rate(tmp_path, caplog):
    workspace = Workspace(tmp_path)
    base = smallest(workspace, 1)
    run = workspace.train("whole", base=base)
    content = checkpoint(run)
    content["state_dict"][BROKEN].view(-1)[-1] = math.nan
    torch.save(content, path := run / "checkpoints" / "broken.ckpt")
    expected = f"{path}: '{BROKEN}' has values that are no numbers"
    arguments = workspace.arguments("refused", "--actual_resume", str(path), base=base)
    for command in (
        lambda: main.main(arguments),
        lambda: main.main(["-r", str(path), "--max_steps", "2"]),
        lambda: stable_txt2img.main(["--ckpt", str(path), "--outdir", str(tmp_path / "out")]),
    ):
        caplog.clear()
        assert command() == 1
        assert expected in caplog.text and "base_learning_rate (it" not in caplog.text
    assert not list(workspace.logs.glob("*_refused")) and not (tmp_path / "out").exists()


def test_a_mask_may_be_infinite_and_not_nan():
    module = torch.nn.Linear(1, 1)
    module.register_buffer("mask", torch.zeros(2))
    state = {**module.state_dict(), "mask": torch.tensor([0.0, -math.inf])}
    load_state(module, state, "file")
    with pytest.raises(UserError, match="file: 'mask' has values that are no numbers"):
        load_state(module, {**state, "mask": torch.tensor([0.0, math.nan])}, "file")
