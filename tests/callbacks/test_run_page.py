"""A run's page, the list of runs, and the settings that loggers compare."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm.callbacks.run_page
import main
from ldm.reports.runs import INDEX, PAGE, compare_page, differences, read_run
from scripts import report
from tests.support.pages import read_page
from tests.support.spies import fixed, panels, with_panel

WITH_PAGE = "lightning.callbacks.run_page={}"
FIXED_LOSSES = ("val/loss_subject_fixed", "val/loss_prior_fixed")


@pytest.fixture(scope="module")
def paged(workspace):
    more = (
        WITH_PAGE,
        fixed(every_n_steps=1, examples=1),
        "lightning.callbacks.image_logger.params.batch_frequency=3",
    )
    return workspace.train("page", with_panel({"images": 1}), *more)


def test_a_page_shows_the_run_and_needs_nothing_else(paged):
    page = read_page(paged / PAGE)
    assert "finished: step 4 of 4" in page.words and "http-equiv" not in page.words
    shown = " ".join(map(str, page.alternatives))
    # The losses at fixed noise come first, with their numbers in words.
    assert page.alternatives[0].startswith("Losses at fixed time steps with fixed noise: val/loss_")
    assert "at step 4" in page.alternatives[0]
    assert "train/loss_total from" in shown and "at step 0" in shown and "at step 4" in shown
    assert "model.base_learning_rate" in page.words


def test_the_panel_is_drawn_at_the_last_step_too(paged):
    assert panels(paged) == [f"panel_gs-{step:06}.png" for step in (0, 3, 4)]


def test_the_list_of_runs_leads_to_their_pages(paged):
    index = read_page(paged.parent / INDEX)
    assert f"{paged.name}/{PAGE}" in index.addresses
    assert "finished" in index.words and "4 of 4" in index.words
    assert all(name in index.words for name in FIXED_LOSSES)


def test_loggers_have_the_settings(paged):
    events = EventAccumulator(str(paged / "tensorboard"))
    events.Reload()
    said = events.summary_metadata
    assert any(name.startswith("_hparams_") for name in said)
    session = said["_hparams_/session_start_info"].plugin_data.content
    assert b"model.base_learning_rate" in session
    # No metric has a value that the run has not measured.
    losses = [event.value for event in events.Scalars(FIXED_LOSSES[0])]
    assert len(losses) == 5 and all(losses)
    assert "base_learning_rate" in next(paged.glob("csv/*/hparams.yaml")).read_text()


def test_runs_side_by_side(workspace, paged, tmp_path):
    other = workspace.train("other", "model.base_learning_rate=0.002", "--max_steps", "2")
    runs = [read_run(paged), read_run(other)]
    found = differences(runs)
    assert found["model.base_learning_rate"] == [0.001, 0.002]
    assert found["lightning.trainer.max_steps"] == [4, 2]
    assert "model.params.reg_weight" not in found
    compare_page(runs, "Two runs").save(tmp_path / "compare.html")
    page = read_page(tmp_path / "compare.html")
    assert "model.base_learning_rate" in page.words and paged.name in page.words


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("csv/a/metrics.csv", b"step,train/loss\n1,x\n", "metrics.csv: damaged"),
        ("csv/a/metrics.csv", b"step,train/\xfcloss\n1,2\n", "metrics.csv: damaged"),
        ("images/panel/panel_gs-000003.png", b"cut", "000003.png: cannot read this image"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(tmp_path, caplog, name, content, message):
    for path, data in (("configs/a-project.yaml", b"model: {}\nseed: 1\n"), (name, content)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(data)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 1
    assert message in caplog.messages[-1]
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(workspace, monkeypatch, caplog):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ldm.callbacks.run_page, "write_run_page", fail)
    run = workspace.train("no-page", WITH_PAGE, "--max_steps", "1")
    assert "the run's page is not written: disk full" in caplog.text
    assert (run / "checkpoints/last.ckpt").exists()


def test_a_run_that_ends_early_says_so(workspace, monkeypatch):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    step = LatentDiffusion.training_step

    def fail(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("the machine is gone")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LatentDiffusion, "training_step", fail)
    with pytest.raises(RuntimeError):
        main.main(workspace.arguments("early", WITH_PAGE))
    page = read_page(workspace.run("early") / PAGE)
    assert "ended early (RuntimeError): step 2 of 4" in page.words
