"""The benchmark measures loading and sampling; how fast they are, no test asks."""

import json
from importlib.metadata import version

import pytest

from scripts import benchmark
from tests.support import runs
from tests.support.benchmarks import measured


@pytest.mark.parametrize("purpose", ["sample", "train"])
def test_loading(purpose, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = runs.config(tmp_path)
    command = [
        "load",
        "--config",
        str(config),
        "--for",
        purpose,
        "--json",
        str(tmp_path / "load.json"),
    ]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["for"] == purpose
    assert found["weights"] == pytest.approx(found["file_bytes"], rel=0.02)
    assert found["machine"]["torch"] == version("torch")
    assert f"to {purpose} in fp32" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load.json", "micro.yaml"]


def test_half_precision_is_not_for_training(caplog):
    assert benchmark.main(["load", "--for", "train", "--dtype", "fp16"]) == 1
    assert "weights are trained in fp32" in caplog.text


def test_sampling_against_diffusers(here, tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    command = [
        "sample",
        "--config",
        runs.config(tmp_path),
        "--steps",
        3,
        "--batch",
        2,
        "--device",
        "cpu",
    ]
    found = measured(tmp_path, *command, "--size", 32, "--against", "diffusers")
    theirs, ours = found["variants"]
    assert (theirs["name"], ours["name"], found["compared_to"]) == (
        "diffusers",
        "ours",
        "diffusers",
    )
    assert ours["images"] == 2 and ours["images_per_second"] == pytest.approx(
        2 / ours["seconds"][0]
    )
    assert 0 < ours["step_seconds"][0] < ours["seconds"][0] / 3
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.05)  # the same networks as often
    assert "| ours" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "micro.yaml"]


def test_sampling_in_bf16(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "sample",
        "--config",
        runs.config(tmp_path),
        "--steps",
        2,
        "--batch",
        1,
        "--device",
        "cpu",
    ]
    (ours,) = measured(tmp_path, *command, "--size", 32, "--dtype", "bf16")["variants"]
    assert ours["dtype"] == "bf16" and ours["seconds"][0] > 0


def test_sampling_in_fp16_wants_a_gpu(tmp_path, caplog):
    assert (
        benchmark.main(
            ["sample", "--config", str(runs.config(tmp_path)), "--device", "cpu", "--dtype", "fp16"]
        )
        == 1
    )
    assert "--dtype fp16: is for GPUs" in caplog.text
