"""The pieces of a GPU day, rehearsed on the processor at the size of a toy."""

import json

import pytest

from ldm.benchmark import correctness, gpu_day
from ldm.errors import UserError
from scripts import gpu_day as command


@pytest.fixture
def toy(tmp_path, here, monkeypatch):
    """A day of one check, a training and a sampling, and what was measured of it."""
    begun, pieces = [], gpu_day.Day.pieces
    checked = {"AdamW in the backward pass", "DDP of one process"}  # to compile takes a minute
    wanted = {("checks", name) for name in checked} | {
        ("training, 1 + 1", "ours"),
        ("sampling, fp32, batch 1", "ours"),
        ("profiles", "profile"),
    }

    def chosen(day):
        return [piece for piece in pieces(day) if (piece.group, piece.name) in wanted]

    monkeypatch.setattr(gpu_day.Day, "pieces", chosen)
    measured = gpu_day._measured
    monkeypatch.setattr(
        gpu_day, "_measured", lambda day, piece: begun.append(piece.name) or measured(day, piece)
    )
    monkeypatch.setattr(gpu_day, "_theirs", list)
    return begun


def test_every_piece_runs_and_is_kept(tmp_path, toy, capsys):
    out, document = tmp_path / "day", tmp_path / "benchmarks.md"
    document.write_text(f"before\n{gpu_day.BEGIN}\nold\n{gpu_day.END}\nafter\n")
    call = ["--out", str(out), "--rehearse", "--into", str(document)]
    assert command.main(call) == 0
    found = json.loads((out / "gpu_day.json").read_text())["groups"]
    assert {row["name"]: row["passes"] for row in found["checks"]} == {
        "AdamW in the backward pass": True,
        "DDP of one process": True,
    }
    ours = found["training, 1 + 1"][0]
    assert ours["seconds"] and ours["images"] == 2 and ours["peak_bytes"]
    assert found["profiles"][0]["predicted_bytes"] > 0
    assert found["sampling, fp32, batch 1"][0]["images_per_second"] > 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| ours " in text and "gloo: the same bits" in text and "Predicted: profile " in text
    assert not list(out.glob("*.safetensors")), "weights of no meaning are removed"
    # What is there is not measured again; what has failed is.
    toy.clear()
    broken = next((out / "pieces").glob("checks-DDP*"))
    broken.write_text(json.dumps({"failed": "a GPU fell off the bus"}))
    assert command.main(call) == 0 and toy == ["DDP of one process"]


def test_a_piece_that_fails_leaves_the_others(tmp_path, toy, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("a GPU fell off the bus")

    monkeypatch.setattr(correctness, "in_backward", broken)
    monkeypatch.setattr(gpu_day, "SWITCHES", {})
    monkeypatch.setattr(
        gpu_day.Day,
        "pieces",
        lambda day: [p for p in day._checks() if p.name.startswith(("AdamW", "waits"))],
    )
    out = tmp_path / "day"
    assert command.main(["--out", str(out), "--rehearse"]) == 0
    kept = json.loads((out / "pieces/checks-AdamW-in-the-backward-pass.json").read_text())
    assert kept["failed"] == "a GPU fell off the bus"
    printed = capsys.readouterr().out
    assert "waits of a step" in printed and "| a GPU fell off the bus | **no** |" in printed
    assert command.main(["--out", str(tmp_path / "late"), "--rehearse", "--minutes", "-1"]) == 0
    assert "2 pieces are left" in capsys.readouterr().out


def test_a_check_can_fail(monkeypatch):
    """Each comparison sees a difference."""
    import torch

    same = {"state_dict": {"a": torch.zeros(2)}}
    other = {"state_dict": {"a": torch.ones(2)}}
    assert correctness._bits(same, same)["passes"] and not correctness._bits(other, same)["passes"]
    gradients = iter([(0.0, torch.ones(3)), (0.0, torch.ones(3)), (0.0, 2 * torch.ones(3))])
    monkeypatch.setattr(correctness, "gradient", lambda *_: next(gradients))
    assert not correctness.recomputation(None, "bf16-mixed")["passes"]


def test_without_a_gpu_or_marks(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(command, "accelerators", lambda: ("cpu", 0))
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "no GPU; --rehearse" in caplog.text
    (tmp_path / "plain.md").write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        gpu_day.put_into(tmp_path / "plain.md", "tables")
