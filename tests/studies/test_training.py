"""Runs of the training command, found again by their names."""

from ldm.studies.training import run_folders


def test_a_run_whose_name_ends_like_anothers_is_not_taken_for_it(tmp_path):
    for name in ("02_inversion-dog-23", "01_1_inversion-dog-23", "02_textual_inversion-dog-23"):
        (tmp_path / f"2026-01-02T03-04-{name}").mkdir()
    found = [path.name for path in run_folders(tmp_path, "inversion-dog-23")]
    stamp = "2026-01-02T03-04-"
    assert found == [f"{stamp}01_1_inversion-dog-23", f"{stamp}02_inversion-dog-23"]
