"""The cascade's tables: what each row is drawn and enlarged by, and what is not made twice."""

import pytest
import yaml
from PIL import Image

from ldm.tiny import miniature
from scripts.tiny import cascade_tables


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Trainings that change nothing: the files that ship stand for what they would write."""
    asked = []

    def trained(name, folder, words, done):
        asked.append((name, words))
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    monkeypatch.setattr(cascade_tables, "trained", trained)
    load = cascade_tables.load_model

    def weights(path, **how):
        kinds = {"base": miniature.BASE_WEIGHTS, "sr": miniature.SR_WEIGHTS}
        name = path.parent.parent.name.split("-")[0]
        return load(kinds.get(name, miniature.WEIGHTS) if path.name == "last.ckpt" else path, **how)

    monkeypatch.setattr(cascade_tables, "load_model", weights)
    monkeypatch.setattr("ldm.studies.drawing.load_model", weights)
    monkeypatch.setattr("ldm.studies.drawing.weights_names", lambda path: {})
    return asked


def test_the_tables(asked, tmp_path, capsys, caplog):
    quick = {"protocol": "miniature", "images": 1, "class_images": 2, "steps": 1, "scale": 1}
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({**quick, "side": 64, "batch_size": 27}))
    out = tmp_path / "out"
    words = ["--subjects", "dog", "--outdir", str(out), "--score", str(tmp_path / "score.yaml")]
    assert cascade_tables.main([*words, "--steps", "2"]) == 0
    table = capsys.readouterr().out
    assert all(f"| {row} |" in table for row in cascade_tables.ROWS)

    # One training changes one thing.
    given = {name.rsplit("-", 2)[0]: words for name, words in asked}
    assert set(given) == set(cascade_tables.TRAININGS)
    assert set(given["base-no-prior"]) - set(given["base"]) == {"model.params.reg_weight=0"}
    noise = {"model.params.noise_augmentation=1.0e-3"}
    assert set(given["sr-noisy"]) - set(given["sr"]) == noise
    assert "--reg_data_root" in given["base"] and "--reg_data_root" not in given["sr"]

    # Rows of super-resolution enlarge the same small pictures, and draw no class.
    assert Image.open(out / "base/dog-23/subject/00-0.png").size == (32, 32)
    for name in ("base-sr", "base-untuned", "base-sr-noisy"):
        assert Image.open(out / name / "dog-23/subject/00-0.png").size == (64, 64)
        assert (out / name / "dog-23/class").is_dir() == (name == "base-sr")
    assert Image.open(out / "sheet.jpg").width > 600

    # The same command again makes nothing.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert cascade_tables.main([*words, "--steps", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    assert capsys.readouterr().out == table

    # Other steps are other trainings: these scores are not theirs.
    assert cascade_tables.main([*words, "--steps", "3"]) == 1
    assert "has 'latent' with other flags (2, 3)" in caplog.text
