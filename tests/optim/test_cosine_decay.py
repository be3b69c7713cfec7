"""A learning rate that falls as a cosine does."""

import math

import pytest

from ldm.errors import UserError
from ldm.optim.schedules import WarmupDecay
from tests.support.runs import Workspace, assert_resumes_exactly, csv_rows


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


def test_a_cosine_decay():
    factor = WarmupDecay(steps=100, warmup_steps=4, decay=0.5, final=0.2, shape="cosine")
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(30) == factor(50) == 1
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2 for done in (0.1, 0.5, 0.9)]
    assert [factor(step) for step in (55, 75, 95)] == pytest.approx(expected)
    assert factor(100) == factor(1000) == pytest.approx(0.2)


def test_a_constant_rate_after_its_warm_up():
    factor = WarmupDecay(steps=100, warmup_steps=1, decay=0)
    assert [factor(step) for step in (0, 1, 50, 99, 100, 1000)] == [0.5, 1, 1, 1, 1, 1]


def test_an_unknown_shape():
    with pytest.raises(
        UserError,
        match=r"shape: unknown 'cosinus' \(did you mean 'cosine'\?\); accepted: linear, cos",
    ):
        WarmupDecay(steps=2, shape="cosinus")


def test_a_run_with_a_cosine_decay_resumes_exactly(workspace):
    schedule = (
        "model.params.scheduler_config={target: ldm.optim.schedules.WarmupDecay, params: {steps: "
        "4, shape: cosine}}",
    )
    assert_resumes_exactly(workspace, "cosine", *schedule)
    rates = [
        float(row["lr-AdamW"])
        for row in csv_rows(workspace.run("cosine-parts"))
        if row.get("lr-AdamW")
    ]
    assert rates == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    )
