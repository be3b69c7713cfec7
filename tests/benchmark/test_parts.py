"""The benchmark's clock, figures, rounds, switches and processes."""

import os

import pytest
import torch

from ldm import host
from ldm.benchmark import clock, isolation, machine, report
from ldm.benchmark.train import Settings
from ldm.benchmark.variants import parse_switch, training_rows, variants
from ldm.config import load_yaml
from ldm.errors import UserError
from tests.support import runs


def test_the_clock(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 13.0, 16.0])
    monkeypatch.setitem(machine.CLOCKS, "wall", lambda: next(times))
    steps = clock.StepClock(warmup=1, steps=3)
    steps.begin(torch.device("cpu"))
    for _ in range(steps.total):
        steps.before()
        torch.ones(2, 3) @ torch.ones(3, 5)
        steps.before()  # a step of two batches
        torch.ones(2, 3) @ torch.ones(3, 5)
        steps.after()
    assert steps.seconds == [1.0, 2.0, 3.0] and steps.flops == 2 * (2 * 2 * 3 * 5)
    assert steps.peak_bytes > 0


def test_figures_and_their_ratios():
    slow = {
        "name": "slow",
        **report.figures({"seconds": [2.0, 2.0, 8.0], "peak_bytes": 4e9, "flops": 4e12}, 2, 8e12),
    }
    fast = {
        "name": "fast",
        **report.figures({"seconds": [0.5], "peak_bytes": 1e9, "flops": None}, 2, 8e12),
    }
    report.compare([slow, fast], "slow")
    assert (slow["median_step_seconds"], slow["mean_step_seconds"], slow["images_per_second"]) == (
        2,
        4,
        1,
    )
    assert (slow["flops_per_second"], slow["share_of_peak"], fast["flops_per_second"]) == (
        2e12,
        0.25,
        None,
    )
    assert (fast["speed_ratio"], fast["memory_ratio"]) == (4, 0.25)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.table([slow, fast], "slow").split("\n")
    ]
    header, _, first, second = lines
    assert dict(zip(header, first)) == {
        **{
            "": "slow",
            "s/step": "2",
            "(mean)": "4",
            "steps/s": "0.5",
            "images/s": "1",
            "peak GB": "4.00",
        },
        **{"TFLOP/s": "2", "of peak": "25%", "speed, x slow": "1.00", "memory, x slow": "1.00"},
    }
    assert second[-4:] == ["", "", "4.00", "0.25"]


def test_rounds_become_one():
    found = report.merged(
        [
            {"seconds": [1.0], "peak_bytes": 5, "flops": 7},
            {"seconds": [3.0], "peak_bytes": 4, "flops": 7},
        ]
    )
    assert found == {"seconds": [1.0, 3.0], "peak_bytes": 5, "flops": 7}
    assert report.merged([found, {"failed": "out of memory"}]) == {"failed": "out of memory"}


def test_the_rate_of_a_matrix_product(monkeypatch):
    times = iter([0.0, 0.9, 2.0, 2.5, 3.0, 3.8])  # 0.9, 0.5 and 0.8 s
    monkeypatch.setitem(machine.CLOCKS, "cpu", lambda: next(times))
    assert (
        machine.matmul_rate("cpu", "fp32", torch.get_num_threads(), "cpu", times=2, side=8)
        == 2 * 8**3 / 0.5
    )


def test_switches(tmp_path):
    assert parse_switch("a name: x.y=1  z.w=2") == ("a name", ["x.y=1", "z.w=2"])
    base = runs.config(tmp_path)
    rows = variants(
        [base], ["model.params.reg_weight=2"], ["x: data.params.batch_size=3"], ["two-forward"]
    )
    assert [(row.name, row.kind) for row in rows] == [
        ("two-forward",) * 2,
        ("ours",) * 2,
        ("x", "ours"),
    ]
    assert [row.config["data"]["params"]["batch_size"] for row in rows] == [1, 1, 3]
    assert {row.config["model"]["params"]["reg_weight"] for row in rows} == {2}


def test_only_our_rows_have_what_a_training_starts_with(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "HUGE_PAGES", tmp_path)
    switches = ["given back: lightning.callbacks.host_memory=null"]
    found = training_rows([runs.config(tmp_path)], [], switches, ["two-forward"], Settings())
    assert {row.name: bool(row.environment) for row in found} == {
        "ours": True,
        "given back": False,
        "two-forward": False,
    }


def test_a_process_of_its_own():
    assert isolation.in_own_process(os.getpid) != os.getpid()
    assert (
        isolation.in_own_process(os.getenv, "OF_A_ROW", environment={"OF_A_ROW": "1"}) == "1"
        and "OF_A_ROW" not in os.environ
    )
    with pytest.raises(UserError, match="no such config file"):
        isolation.in_own_process(load_yaml, "nothing.yaml")
    with pytest.raises(UserError, match="the measuring process was killed"):
        isolation.in_own_process(os._exit, 9)
