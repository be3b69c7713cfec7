"""The benchmark measures what it says; how fast that is, no test asks."""

import json

import pytest
import torch

from scripts import benchmark
from tests import runs


@pytest.mark.parametrize("purpose", ["sample", "train"])
def test_loading(purpose, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = runs.config(tmp_path)
    command = ["load", "--config", str(config), "--for", purpose, "--json", str(tmp_path / "load.json")]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["for"] == purpose
    assert found["weights"] == pytest.approx(found["file_bytes"], rel=0.02)
    assert found["machine"]["torch"] == torch.__version__
    assert f"to {purpose} in fp32" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load.json", "micro.yaml"]


def test_half_precision_is_not_for_training(caplog):
    assert benchmark.main(["load", "--for", "train", "--dtype", "fp16"]) == 1
    assert "weights are trained in fp32" in caplog.text
