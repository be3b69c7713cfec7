"""The protocol on a small dataset in the published layout; stopped between two pictures, and gone
on with.
"""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import ldm.studies.drawing
import main
from ldm.config import RunConfig, load_config, to_plain
from ldm.sampling.metadata import read_recipe
from ldm.studies.dreambench import METHODS, tasks, write_results
from ldm.training.cli import parse_args, with_flags
from ldm.util import instantiate_from_config
from scripts import dreambench, evaluate
from tests.support.dreambench import make_dataset
from tests.support.pages import read_page
from tests.support.runs import checkpoint, config

SCORE = {
    "protocol": "miniature", "encoders": ["dino"], "images": 2, "steps": 2, "side": 32,
    "batch_size": 1,
}  # fmt: skip
CLASSES = {"dog": "dog", "bear_plushie": "stuffed animal"}


def command(workspace, base_model, tmp_path, *more):
    score = tmp_path / "score.yaml"
    score.write_text(json.dumps(SCORE))
    dataset = tmp_path / "dataset"
    if not dataset.exists():
        make_dataset(dataset, CLASSES)
    flags = ["--dataset", dataset, "--ckpt", base_model, "--score", score]
    flags += ["--outdir", tmp_path / "out", "--base", config(workspace.path), "--max_steps", 1]
    return [*map(str, flags), "data.params.num_class_images=1",
            "data.params.class_images={steps: 2}", *more]  # fmt: skip


def pictures_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_the_protocol_goes_on_at_the_next_picture(
    workspace, base_model, tmp_path, monkeypatch, capsys, in_this_process
):
    save, made = ldm.studies.drawing.save_png, []

    def killed(image, path, texts):
        if len(made) == 5:  # in the second subject's pictures
            raise KeyboardInterrupt
        save(image, path, texts)
        made.append(path)

    flags = command(workspace, base_model, tmp_path, "--method", "no-prior", "--max_steps", "3")
    with monkeypatch.context() as patch:
        patch.setattr(ldm.studies.drawing, "save_png", killed)
        assert dreambench.main(flags) == 130
    out = tmp_path / "out"
    # What is done has its scores, and what is not is said.
    assert [row["subject"] for row in csv.DictReader((out / "scores.csv").open())][2:] == ["dog"]
    assert "Not there: 1 of 2 of no-prior." in (out / "table.md").read_text()
    before = pictures_of(out / "images")
    assert len(before) == 5 and len(in_this_process) == 2
    in_this_process.clear()
    assert dreambench.main(flags) == 0
    after = pictures_of(out / "images")
    assert in_this_process == []  # nothing was trained again
    assert len(after) == 2 * 2 * 2 and before.items() <= after.items()
    assert len(set(after.values())) == 8

    # One row a method, with what pins it; the page needs nothing else.
    table = capsys.readouterr().out
    assert "| real images |" in table and "| no-prior |" in table
    assert "compares with nothing else" in table
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [(row["method"], row["subject"]) for row in rows] == [
        (name, subject) for name in ("real images", "no-prior") for subject in CLASSES
    ]
    # A training's seconds and memory stand beside its scores.
    costs = [(float(row["seconds"] or 0), float(row["GB"] or 0)) for row in rows]
    assert costs[:2] == [(0, 0)] * 2 and all(0.1 < gigabytes < 50 for _, gigabytes in costs[2:])
    for (seconds, _), subject in zip(costs[2:], CLASSES):
        timing = json.loads((out / f"runs/no-prior-{subject}-23.timing.json").read_text())
        assert timing["steps"] == 3
        assert seconds == pytest.approx(3 * timing["seconds_per_step"]) and seconds > 0
    assert "| seconds ↓ | GB ↓ |" in table
    page = read_page(out / "index.html")
    assert page.alternatives[0].startswith("DINO: real images 0.") and "bear_plushie" in page.words
    run = next((out / "runs").glob("*_no-prior-dog-23"))
    assert checkpoint(run)["config"]["model"]["params"]["reg_weight"] == 0

    # Scores of other encoders are made anew, from the pictures that are there.
    (path,) = (out / "scores/no-prior").glob("dog-*.json")
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "encoders": "DINO of others", "scores": {"DINO": 0.0}}))
    assert dreambench.main(flags) == 0 and json.loads(path.read_text()) == old
    assert in_this_process == [] and pictures_of(out / "images") == after

    # The same scores by the command over anyone's folders.
    scores = tmp_path / "scores.json"
    given = [
        "--images",
        out / "images/no-prior",
        "--real",
        tmp_path / "dataset",
        "--output",
        scores,
    ]
    given += ["--protocol", "miniature", "--scores", "DINO"]
    assert evaluate.main(list(map(str, given))) == 0
    found = {row["subject"]: row["DINO"] for row in json.loads(scores.read_text())["images"]}
    for row in rows[2:]:
        assert found[row["subject"]] == pytest.approx(float(row["DINO"]), abs=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "loras"], "--method loras: unknown (did you mean 'lora'?)"),
        (["--method", "a/b=--max_steps 1"], "expected a name of its own"),
        (["--subjects", "cat"], "no subject 'cat'"),
        (["--protocol", "papers"], "did you mean 'paper'"),
        (["--ckpt", "nowhere.ckpt"], "--ckpt nowhere.ckpt: no such file"),
        (["--seeds", "1", "2", "1"], "--seeds 1: given twice"),
        (["--subjects", "dog", "dog"], "--subjects dog: given twice"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path, workspace, base_model, caplog, flags, message):
    assert dreambench.main(command(workspace, base_model, tmp_path, *flags)) == 1
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_textual_inversion_learns_the_identifier_as_a_new_word(workspace, base_model, tmp_path):
    """The prompts are those of all methods; the word starts as the subject's class."""
    flags = command(workspace, base_model, tmp_path, "--method", "textual_inversion")
    args, rest = dreambench.build_parser().parse_known_args(flags)
    bench = dreambench.bench_of(args, rest)
    found = {task["name"]: task for task in tasks(bench, tmp_path)}
    task = found["textual_inversion-bear_plushie-23"]
    assert all("sks stuffed animal" in prompt for prompt in task["prompts"])
    given = parse_args([word for word in task["arguments"] if word != "-t"])
    config = with_flags(RunConfig(to_plain(load_config(given.base, given.overrides))), given)
    assert config.new_words == ["sks"] and config.learns_words_alone
    params = config.get("model.params.personalization_config.params")
    assert params["initializer_words"] == ["stuffed animal"]
    # No class images are made for it.
    assert config.get("data.params.reg") is None
    assert config.get("data.params.num_class_images") is None


def test_a_method_of_ones_own_is_flags_of_the_training():
    found = dreambench.methods_of(["lora", "slow=--max_steps 5 a.b='{c: 1, d: 2}'"])
    assert found["slow"].arguments == ["--max_steps", "5", "a.b={c: 1, d: 2}"]
    assert found["lora"].arguments[0].startswith("model.params.lora")
    # It may be a known one with other flags behind.
    changed = dreambench.methods_of(["can=wrong-noun --max_steps 5", "few=lora --max_steps 7"])
    assert changed["can"].noun == "can" and changed["can"].arguments == ["--max_steps", "5"]
    assert changed["few"].arguments == [*found["lora"].arguments, "--max_steps", "7"]
    # Class images are made for those that ask for some.
    without = dreambench.methods_of(["mine=data.params.num_class_images=0 --max_steps 5"])["mine"]
    assert found["slow"].class_images and not without.class_images


@pytest.mark.parametrize(
    "method, class_word, caption, prompt",
    [
        ("dreambooth", "dog", "photo of a sks dog", "a sks dog in the snow"),
        ("no-noun", "dog", "photo of a sks", "a sks in the snow"),
        ("wrong-noun", "can", "photo of a sks can", "a sks can in the snow"),
    ],
)
def test_the_class_noun_of_a_method(
    workspace, base_model, tmp_path, method, class_word, caption, prompt
):
    """The paper's Table 4: captions and prompts change alike; what is scored stays the subject."""
    flags = command(workspace, base_model, tmp_path, "--method", method, "--subjects", "dog")
    bench = dreambench.bench_of(*dreambench.build_parser().parse_known_args(flags))
    (task,) = tasks(bench, tmp_path)
    assert task["prompts"][0] == prompt and task["texts"][0] == "a sks dog in the snow"
    assert task["class_prompt"] == "a photo of a dog"
    given = parse_args([word for word in task["arguments"] if word != "-t"])
    words = with_flags(RunConfig(to_plain(load_config(given.base, given.overrides))), given)
    photos = instantiate_from_config(words.get("data.params.train"))
    assert photos[0]["caption"] == caption
    assert given.class_word == class_word


@pytest.mark.parametrize("method", [*METHODS])
def test_the_training_of_every_method_is_taken(workspace, base_model, tmp_path, method):
    """Its words make a config that the model and its data accept."""
    flags = command(workspace, base_model, tmp_path, "--method", method, "--subjects", "dog")
    bench = dreambench.bench_of(*dreambench.build_parser().parse_known_args(flags))
    (task,) = tasks(bench, tmp_path)
    if not METHODS[method].trains:
        assert task["arguments"] == []
        return
    words = [word for word in task["arguments"] if word not in ("-t", "--max_steps", "1")]
    assert main.main([*words, "-t", "--max_steps", "1", "-l", str(tmp_path / "logs")]) == 0


def test_the_base_model_draws_the_class_and_is_not_trained(
    workspace, base_model, tmp_path, in_this_process, capsys
):
    more = ["--method", "base", "--subjects", "dog", "--seeds", "1", "2"]
    assert dreambench.main(command(workspace, base_model, tmp_path, *more)) == 0
    assert in_this_process == [] and "| base |" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    # Once, and by no seed of a training: it stands beside all seeds of the others.
    assert [row["seed"] for row in rows if row["method"] == "base"] == [""]
    (picture, *_) = sorted((tmp_path / "out/images/base/dog/seed1").glob("*.png"))
    assert read_recipe(picture)["prompt"] == "a dog in the snow"


def test_trainings_of_a_class_share_its_class_images(workspace, base_model, tmp_path):
    more = ["--method", "dreambooth", "--method", "wrong-noun", "--seeds", "1", "2"]
    more += ["--method", "few=data.params.num_class_images=8"]
    flags = command(workspace, base_model, tmp_path, *more, "--workers", "2")
    bench = dreambench.bench_of(*dreambench.build_parser().parse_known_args(flags))
    folders, names = {}, []
    for task in tasks(bench, tmp_path):
        names.append(task["name"])
        words = task["arguments"]
        folder = words[words.index("--reg_data_root") + 1]
        folders.setdefault(Path(folder).name, []).append(task["name"])
    assert folders == {
        "dog": ["dreambooth-dog-1", "dreambooth-dog-2"],
        "stuffed_animal": ["dreambooth-bear_plushie-1", "dreambooth-bear_plushie-2"],
        "can": [f"wrong-noun-{name}-{seed}" for seed in (1, 2) for name in CLASSES],
        # A method with class images of its own does not read those of the others.
        "dog-few": ["few-dog-1", "few-dog-2"],
        "stuffed_animal-few": ["few-bear_plushie-1", "few-bear_plushie-2"],
    }
    # The first seed of all methods comes first.
    assert [name[-1] for name in names] == ["1"] * 6 + ["2"] * 6


def test_other_flags_of_a_method_are_refused(
    workspace, base_model, tmp_path, caplog, in_this_process, monkeypatch
):
    """Its scores, and a run that is gone on with, would be of the flags of before."""
    with_flags_of = lambda *more: command(workspace, base_model, tmp_path, *more)  # noqa: E731
    few = ["--subjects", "dog", "--method"]
    assert dreambench.main(with_flags_of(*few, "mine=model.params.reg_weight=0")) == 0
    scores = (tmp_path / "out/scores.csv").read_text()
    assert dreambench.main(with_flags_of(*few, "mine=model.params.reg_weight=0.5")) == 1
    assert "has 'mine' with other flags (model.params.reg_weight=0, " in caplog.text
    assert len(in_this_process) == 1 and (tmp_path / "out/scores.csv").read_text() == scores

    # So they would with other photos.
    (photo, *_) = sorted((tmp_path / "dataset/dog").iterdir())
    kept, picture = photo.read_bytes(), Image.open(photo)
    picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(photo)
    assert dreambench.main(with_flags_of(*few, "mine=model.params.reg_weight=0")) == 1
    assert f"has 'photos of dog' with other flags ({photo.name} " in caplog.text
    photo.write_bytes(kept)

    # A picture of another recipe is drawn anew, and what is not all there is said.
    folder = tmp_path / "out/images/mine/dog/seed23"
    before = pictures_of(folder)
    flags = with_flags_of("--method", "mine=model.params.reg_weight=0", "--subjects", "dog")
    (tmp_path / "score.yaml").write_text(json.dumps({**SCORE, "scale": 3.0}))
    with monkeypatch.context() as patch:  # a model that cannot be read costs no picture
        patch.delattr(ldm.studies.drawing, "load_model")
        assert dreambench.main(flags) == 1
    assert pictures_of(folder) == before
    assert dreambench.main(flags) == 0
    after = pictures_of(folder)
    assert before.keys() == after.keys() and all(before[key] != after[key] for key in after)
    assert "4 pictures were asked for otherwise: drawn anew" in caplog.text
    assert "Not there" not in (tmp_path / "out/table.md").read_text()
    args, rest = dreambench.build_parser().parse_known_args(flags)
    args.seeds = [23, 24]
    write_results(dreambench.bench_of(args, rest), tmp_path / "out")
    said = "Not there: 1 of 2 of mine."
    assert said in (tmp_path / "out/table.md").read_text()
    assert said in read_page(tmp_path / "out/index.html").words
