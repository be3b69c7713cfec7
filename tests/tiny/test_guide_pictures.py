"""The guide's pictures: three trainings that differ in what the page says, drawn from one noise."""

from dataclasses import replace

from PIL import Image

from ldm.tiny import miniature
from scripts.tiny import guide_pictures


def test_a_sheet_for_each_training(tmp_path, monkeypatch):
    asked = {}

    def trained(name, folder, words, done):
        asked[name] = words
        (folder / name).mkdir(parents=True)
        (folder / name / "checkpoints").mkdir()
        (folder / name / "checkpoints/last.ckpt").symlink_to(miniature.WEIGHTS)
        return folder / name

    monkeypatch.setattr(guide_pictures, "trained", trained)
    monkeypatch.setattr(miniature, "RECIPE", replace(miniature.RECIPE, steps=1, scale=1.0))
    assert guide_pictures.main(["--outdir", str(tmp_path)]) == 0

    # One training changes its length alone, one its rate and its prior.
    good = asked["good"]
    assert [word for word in asked["underfit"] if word not in good] == ["--max_steps", "40"]
    assert [word for word in good if word not in asked["underfit"]] == []
    assert (
        "model.params.reg_weight=0" in asked["overfit"]
        and "--reg_data_root" not in asked["overfit"]
    )
    sheets = [Image.open(tmp_path / f"guide-{name}.jpg") for name in guide_pictures.FITS]
    assert len({sheet.size for sheet in sheets}) == 1

    # The same weights have the same pictures on all three: below the title nothing differs.
    pictures = [sheet.crop((0, 40, *sheet.size)).tobytes() for sheet in sheets]
    assert pictures[0] == pictures[1] == pictures[2]
