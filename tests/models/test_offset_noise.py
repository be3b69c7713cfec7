"""Offset noise: a random constant for each sample and channel."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.objective import Objective
from ldm.modules.losses.batch import Batch
from ldm.modules.losses.per_sample import with_offset
from ldm.rng import SampleRandom
from tests.support.models import (
    batch,
    build,
    step,
)
from tests.support.runs import Workspace, assert_resumes_exactly, checkpoint, same


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


def test_offset_noise_is_a_constant_for_each_sample_and_channel():
    noise = SampleRandom([1, 2]).randn((2, 4, 8, 8))
    offset = (with_offset(noise, 0.5, [1, 2]) - noise) / 0.5
    constants = offset[:, :, :1, :1]
    torch.testing.assert_close(offset, constants.expand_as(offset), rtol=0, atol=1e-5)
    assert len({round(value, 4) for value in constants.flatten().tolist()}) == 8
    many = with_offset(torch.zeros(500, 4, 1, 1), 1.0, list(range(500)))
    assert many.mean().item() == pytest.approx(0, abs=0.1) and many.std().item() == pytest.approx(
        1, abs=0.1
    )


def test_offset_noise_is_a_function_of_the_samples_seed():
    zeros = torch.zeros(2, 4, 8, 8)
    first, swapped = with_offset(zeros, 0.1, [1, 2]), with_offset(zeros, 0.1, torch.tensor([2, 1]))
    assert torch.equal(first, swapped.flip(0)) and not torch.equal(first[0], first[1])
    assert with_offset(zeros, 0.0, [1, 2]) is zeros
    torch.manual_seed(0)
    drawn = with_offset(zeros, 0.1, None)
    torch.manual_seed(0)
    assert torch.equal(drawn, (0.1 * torch.randn(2, 4, 1, 1)).expand_as(zeros))


def drawn(objective, examples):
    """What an objective draws for a batch of the golden model."""
    return objective.draw(Batch.of(examples).subject, (4, 8, 8), 1000, torch.device("cpu"))


def test_offset_noise_leaves_the_other_draws_alone():
    plain, offset = (
        drawn(Objective(offset_noise=strength), batch(1, 2)) for strength in (0.0, 0.1)
    )
    assert torch.equal(plain.eps, offset.eps) and torch.equal(plain.t, offset.t)
    assert torch.equal(offset.noise, with_offset(plain.noise, 0.1, [1, 2]))
    unseeded = {key: value for key, value in batch(1, 2).items() if key != "noise_seed"}
    states = []
    for objective in (Objective(), Objective(offset_noise=0.0)):
        torch.manual_seed(0)
        states.append([vars(drawn(objective, unseeded)), torch.randn(1)])
    assert same(*states)


def test_offset_noise_is_noised_with_and_predicted():
    model = build(offset_noise=0.3)
    plain = build()
    assert step(model, batch(1))[0] != step(plain, batch(1))[0]
    draws = drawn(plain.objective, batch(1))
    posterior = plain.encode_first_stage(batch(1)["image"].permute(0, 3, 1, 2).contiguous())
    x_start = plain.get_first_stage_encoding(posterior, draws.eps)
    cond = plain.get_learned_conditioning(batch(1)["caption"])
    expected, _ = plain.p_losses(x_start, cond, draws.t, with_offset(draws.noise, 0.3, [1]))
    torch.testing.assert_close(step(model, batch(1))[0], expected, rtol=1e-6, atol=0)


def test_a_run_with_offset_noise_resumes_exactly(workspace):
    _, run = assert_resumes_exactly(workspace, "offset", "model.params.offset_noise=0.1")
    assert checkpoint(run)["config"]["model"]["params"]["offset_noise"] == 0.1


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_offset_noise_out_of_range(wrong):
    with pytest.raises(UserError, match="offset_noise: expected 0 or more"):
        build(offset_noise=wrong)
