"""A sweep from its command to its page; stopped, and gone on with."""

import csv
import json
import signal

import pytest

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.signals import Interrupted
from ldm.studies.sweep import PAGE, TABLE, TRIALS
from scripts import sweep
from tests.support.pages import read_page
from tests.support.runs import config
from tests.support.spies import fixed

SCORE = {
    "prompts": "configs/prompts/tiny/class.yaml", "protocol": "miniature", "encoders": ["dino"],
    "images": 2, "class_images": 2, "steps": 2, "side": 32,
}  # fmt: skip


def command(workspace, outdir, *more):
    rates = "model.base_learning_rate=0.001,0.002"
    flags = ["--set", rates, "--outdir", str(outdir), "--base", str(config(workspace.path))]
    flags += ["--data_root", str(workspace.photos), "--class_word", "dog"]
    flags += ["--reg_data_root", str(workspace.class_images), "--max_steps", "2"]
    return [*flags, fixed(every_n_steps=1, examples=1), *more]


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    path = tmp_path_factory.mktemp("score") / "score.yaml"
    path.write_text(json.dumps(SCORE))
    return str(path)


def test_a_sweep_that_is_stopped_ends_in_the_same_table(
    workspace, tmp_path, monkeypatch, score, in_this_process
):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert sweep.main(command(workspace, straight, "--score", score)) == 0
    step = LatentDiffusion.training_step

    # Stop the second trial before its second step, as `kill` does.
    def stopped(self, batch, batch_idx):
        if self.learning_rate == 0.002 and self.global_step == 1:
            raise Interrupted(signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LatentDiffusion, "training_step", stopped)
        assert sweep.main(command(workspace, parts, "--score", score)) != 0
    in_this_process.clear()
    assert sweep.main(command(workspace, parts, "--score", score)) == 0
    assert len(in_this_process) == 1 and in_this_process[0][0] == "-r"  # it went on
    assert (parts / TABLE).read_text() == (straight / TABLE).read_text()

    rows = list(csv.DictReader((straight / TABLE).open()))
    assert [row["model.base_learning_rate"] for row in rows] == ["0.001", "0.002"]
    assert {row["status"] for row in rows} == {"done"}
    assert rows[0]["val/loss_subject_fixed"] != rows[1]["val/loss_subject_fixed"]
    assert all(0 < float(row["DINO"]) <= 1 and 0 < float(row["PRES"]) <= 1 for row in rows)
    assert all(float(row["DIV"]) > 0 and -1 <= float(row["CLIP-T"]) <= 1 for row in rows)
    assert rows[0]["protocol"] == "miniature" and "DINO EfficientNet" in rows[0]["encoders"]
    page = read_page(straight / PAGE)
    assert "Pareto front of DINO and CLIP-T" in page.alternatives[0]
    assert "2 trials done" in page.words
    # A trial is named by what it tries.
    shown = " ".join(map(str, page.alternatives))
    assert "000: base_learning_rate 0.001 from" in shown

    # All is there: nothing is done again.
    in_this_process.clear()
    assert sweep.main([str(straight / "sweep.yaml")]) == 0
    assert in_this_process == []


def test_a_trial_that_fails_is_said_and_tried_again(workspace, tmp_path, capsys):
    flags = command(workspace, tmp_path)
    flags[1] = "model.params.reg_weight=-1,1"
    assert sweep.main(flags) == 1
    assert "1 trials done, 1 failed" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / TABLE).open()))
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert (tmp_path / TRIALS / "000.failed.json").exists()
    # Without scores, what is learned stands against what is kept.
    assert (
        "-val/loss_subject_fixed and -val/loss_prior_fixed"
        in read_page(tmp_path / PAGE).alternatives[0]
    )


def test_another_sweep_has_another_folder(workspace, tmp_path, caplog):
    (tmp_path / "sweep.yaml").write_text("arguments: []\nset: {a.b: [1]}\n")
    assert sweep.main(command(workspace, tmp_path)) == 1
    assert "holds another sweep; choose another --outdir" in caplog.text


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--set KEY=V1,V2: what should be tried?"),
        (
            ["--set", "a.b=1,2", "--search", "optuna", "--trials", "2"],
            "objective: optuna needs one",
        ),
        (["--set", "a.b"], "--set a.b: expected KEY=V1,V2"),
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["{plan}"], "sweep.searches: unknown key"),
        (["{plan}", "--set", "a.b=1"], "not together with"),
        ([{"arguments": "--base x"}], "arguments: expected a list of texts, got '--base x'"),
        ([{"arguments": [1]}], "arguments: expected a list of texts, got [1]"),
        ([{"score": 3}], "score: expected keys and values, got 3"),
        ([{"early_stop": 3}], "early_stop: expected keys and values, got 3"),
        ([{"score": {"prompts": 3}}], "score.prompts: expected a suite's file, got 3"),
        ([{"score": SCORE | {"steps": 0}}], "score.steps: expected 1 or more, got 0"),
        ([{"score": SCORE | {"images": 0}}], "score.images: expected 1 or more, got 0"),
        ([{"score": SCORE | {"class_images": -1}}], "score.class_images: expected 0 or more"),
        ([{"score": SCORE | {"sampler": "dim"}}], "did you mean 'ddim'"),
        ([{"score": SCORE | {"encoders": ["dyno"]}}], "score.encoders: accepted: dino, clip"),
    ],
)
def test_what_a_sweep_cannot_be_is_one_line(tmp_path, caplog, flags, message):
    plan = tmp_path / "plan.yaml"
    plan.write_text("arguments: []\nset: {a.b: [1]}\nsearches: grid\n")
    if flags and isinstance(flags[0], dict):
        plan.write_text(json.dumps({"arguments": [], "set": {"a.b": [1]}, **flags[0]}))
        flags = ["{plan}"]
    outdir = ["--outdir", str(tmp_path / "out")]
    assert sweep.main([flag.format(plan=plan) for flag in flags] + outdir) == 1
    assert message in caplog.text
    assert not (tmp_path / "out").exists()
