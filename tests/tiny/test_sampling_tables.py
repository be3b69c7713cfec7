"""The measurements for docs/sampling.md: what cannot be measured is refused before it begins."""

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
