"""The measurements for docs/sampling.md: what cannot be measured is refused before it begins."""

from types import SimpleNamespace

import pytest

from ldm.tiny.miniature import WEIGHTS
from scripts.tiny import sampling


@pytest.mark.parametrize(
    "tuned, message",
    [
        ([], "expected SUBJECT=CKPT"),
        ([f"dog={WEIGHTS}", "robot"], "expected SUBJECT=CKPT"),
        ([f"dog={WEIGHTS}", f"dog={WEIGHTS}"], "--tuned dog: given twice"),
        ([f"dgo={WEIGHTS}"], "dgo: no folder of photos"),
        (["dog=nowhere.ckpt"], "--tuned dog=nowhere.ckpt: no such file"),
    ],
)
def test_checkpoints_that_cannot_be_measured_are_one_line(monkeypatch, caplog, tuned, message):
    monkeypatch.setattr(sampling, "worlds", lambda sprites: pytest.fail("the work has begun"))
    assert sampling.main(["guidance", *(["--tuned", *tuned] if tuned else [])]) == 1
    assert message in caplog.text


def test_what_is_measured_of_a_checkpoint_is_not_that_of_another(monkeypatch, tmp_path, capsys):
    measured = []

    def score(model, subject, recipe, judges):
        measured.append((subject, model.path))
        return {"likeness": {"snow": float(subject == "dog" and model.path == second)}}

    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    for path in (first, second):
        path.write_text(path.name)
    monkeypatch.setattr(sampling, "worlds", lambda sprites: (None, None))
    monkeypatch.setattr(sampling, "make_judges", lambda *_: None)
    monkeypatch.setattr(
        sampling, "load_model", lambda path: SimpleNamespace(path=path, first_stage_model=None)
    )
    monkeypatch.setattr(sampling, "score", score)
    flags = ["guidance", "--outdir", str(tmp_path / "out"), "--tuned"]
    assert sampling.main([*flags, f"dog={first}", f"backpack={second}"]) == 0
    assert set(measured) == {("dog", first), ("backpack", second)}
    assert "| classifier-free | 0.00" in capsys.readouterr().out
    # The same files for the other subjects.
    measured.clear()
    assert sampling.main([*flags, f"backpack={first}", f"dog={second}"]) == 0
    assert set(measured) == {("dog", second), ("backpack", first)}
    assert "| classifier-free | 0.50" in capsys.readouterr().out
    measured.clear()
    assert sampling.main([*flags, f"dog={second}"]) == 0 and not measured
