"""Two subjects, each alone, with a word each and with one word: trained, compared, gone on with."""

from dataclasses import replace

import ldm.tiny.miniature
from ldm.checkpoints.reading import read_checkpoint
from ldm.config import load_config, to_plain
from scripts.tiny import two_subjects
from tests.support.runs import config

STEPS = 2


def test_each_case_is_trained_once_and_has_its_rows(
    workspace, base_model, tmp_path, monkeypatch, capsys, caplog, in_this_process
):
    small = config(
        tmp_path,
        data__params__num_class_images=1,
        data__params__class_images={"steps": 2},
    )
    monkeypatch.setattr(two_subjects, "CONFIG", small)
    monkeypatch.setattr(two_subjects, "WEIGHTS", base_model)
    monkeypatch.setattr(two_subjects, "CLASS_IMAGES", 2)
    monkeypatch.setattr(two_subjects, "SUBJECT_IMAGES", 2)
    recipe = replace(ldm.tiny.miniature.RECIPE, steps=2, height=32, width=32)
    monkeypatch.setattr(ldm.tiny.miniature, "RECIPE", recipe)
    out = tmp_path / "out"
    flags = ["--subjects", "dog", "backpack", "--steps", str(STEPS), "--outdir", str(out)]

    assert two_subjects.main(flags) == 0
    table = (out / "dog-backpack.md").read_text()
    kinds = ["alone", "a word each", "one word for both"]
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert rows == [[f"| {subject}", kind] for subject in ("dog", "backpack") for kind in kinds]
    assert (out / "dog-backpack.jpg").stat().st_size > 1000

    # Each subject is seen as often as alone; in the last run one word names both.
    ends, captions = [], []
    for words in in_this_process:
        (run,) = (out / "runs").glob(f"*_{words[words.index('-n') + 1]}")
        ends.append(read_checkpoint(run / "checkpoints/last.ckpt")["global_step"])
        (saved,) = (run / "configs").glob("*-project.yaml")
        concepts = to_plain(load_config([saved]))["data"]["params"]["concepts"]
        captions.append([concept["templates"] for concept in concepts])
    assert ends == [STEPS, STEPS, 2 * STEPS, 2 * STEPS]
    sks, shs = ["photo of a sks {class_word}"], ["photo of a shs {class_word}"]
    assert captions == [[sks], [sks], [sks, shs], [sks, sks]]

    # Once more: nothing is trained again, and the table is the same.
    capsys.readouterr()
    assert two_subjects.main(flags) == 0
    assert len(in_this_process) == 4
    assert capsys.readouterr().out.strip() == table.strip()

    # The folder's runs are of one config.
    assert two_subjects.main([*flags, "--base", str(tmp_path / "other.yaml")]) == 1
    assert "has 'trainings' with other flags (" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(ldm.tiny.miniature, "RECIPE", replace(recipe, steps=3))
        assert two_subjects.main(flags) == 1
    assert "has 'pictures' with other flags (" in caplog.text
    assert len(in_this_process) == 4
