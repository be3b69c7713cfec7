"""The embedded default: its weights, what they know, and the demo on them."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.config import load_config, to_plain
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.metrics import CLIPImages, features_of, similarity, similarity_within, to_tensor
from ldm.sampling.text_to_image import Recipe, load_model
from ldm.tiny import miniature, report
from ldm.tiny.attributes import KINDS
from ldm.tiny.clip import OF_CLIP_ALONE
from ldm.tiny.encoders import miniature_encoders, read_clip
from scripts import demo
from scripts.tiny import evaluate

MEGABYTES = 1e6


@pytest.fixture(scope="module")
def clip_images():
    return CLIPImages(
        miniature.CLIP_IMAGES, to_plain(load_config([miniature.CLIP_CONFIG]))["model"]
    )


@pytest.fixture(scope="module")
def photos():
    """Three photos of each subject, as tensors."""
    names = miniature.subject_names()
    return {
        n: to_tensor([load_image(p) for p in find_images(miniature.photos_of(n))][:3], 64)
        for n in names
    }


def test_the_weights_are_small_and_say_what_they_fit():
    assert miniature.WEIGHTS.stat().st_size < 45 * MEGABYTES
    model = load_model(miniature.WEIGHTS)
    assert (model.image_size, model.downsampling, model.latent_channels) == (16, 4, 4)
    assert len(model.betas) == 1000
    assert model.get_learned_conditioning(["photo of a sks dog"]).shape == (1, 77, 128)


def test_the_cascade_is_small_and_enlarges(photos):
    base, large = (load_model(path) for path in (miniature.BASE_WEIGHTS, miniature.SR_WEIGHTS))
    sizes = [p.stat().st_size for p in (miniature.BASE_WEIGHTS, miniature.SR_WEIGHTS)]
    assert sum(sizes) < 40 * MEGABYTES
    assert (base.image_size, large.image_size, large.small.factor) == (32, 64, 2)


def test_latents_have_the_scale_that_the_schedule_expects(photos):
    model = load_model(miniature.WEIGHTS)
    images = torch.cat(list(photos.values()))
    latents = model.get_first_stage_encoding(model.encode_first_stage(images).mode())
    assert 0.5 < latents.std() < 2
    assert latents.mean().abs() < 0.5


def test_the_first_stage_reconstructs_photos_that_it_never_saw(photos):
    model = load_model(miniature.WEIGHTS)
    images = torch.cat(list(photos.values()))
    restored = model.decode_first_stage(
        model.get_first_stage_encoding(model.encode_first_stage(images).mode())
    )
    error = ((restored.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    assert -10 * error.log10().mean() > 24  # dB


def test_its_clip_knows_one_scene_from_another(clip_images, photos):
    """The subjects were photographed in the same places, in the same order."""
    features = torch.stack(
        [features_of(clip_images, images) for images in photos.values()], dim=1
    )  # (place, subject, d)
    within = sum(similarity_within(place) for place in features) / len(features)
    across = (similarity(features[0], features[1]) + similarity(features[1], features[2])) / 2
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:2]))
    assert within > across + 0.1


def test_its_clip_ships_without_the_text_encoder_that_is_in_the_other_file():
    assert miniature.CLIP_IMAGES.stat().st_size < 12 * MEGABYTES
    state = state_dict_of(read_checkpoint(miniature.CLIP_IMAGES), miniature.CLIP_IMAGES)
    assert all(key.startswith(OF_CLIP_ALONE) for key in state)


def test_its_clip_tells_from_words_where_a_photo_was_taken():
    """The subjects were photographed in the same places, in the same order."""
    encoders = miniature_encoders()
    places = [
        "on a white background",
        "in a meadow",
        "on the beach",
        "on top of a wooden floor",
        "in the snow",
    ]
    right = 0
    for name in miniature.subject_names():
        folder = miniature.photos_of(name)
        shown = encoders.clip_image([load_image(path) for path in find_images(folder)])
        noun = miniature.class_word_of(folder)
        said = encoders.clip_text([f"a photo of a {noun} {place}" for place in places])
        right += int(((shown @ said.T).argmax(1) == torch.arange(len(places))).sum())
    assert right >= 28, f"{right} of 40 photos; 33 when it was trained"


def test_its_clip_reads_words_from_what_ships():
    clip = read_clip("miniature")
    assert clip.texts(["a photo of a dog"]).shape == (1, 128)
    assert "dog" in clip.nouns and 1 < clip.scale <= 100


def test_pictures_follow_their_prompts(clip_images):
    """Snow is bright, the night is dark, and a red background is red at the border."""
    sample = miniature.PromptSampler(miniature.WEIGHTS)
    prompts = [
        "a photo of a cat in the snow",
        "a photo of a cat at night",
        "a photo of a cat on a red background",
    ]
    snow, night, red = to_tensor(sample(prompts), 64)
    assert snow.mean() > 0.1 > -0.1 > night.mean()
    border = torch.cat([red[:, :6].flatten(1), red[:, :, :4].flatten(1)], 1).mean(1)
    assert border[0] > 0.2 and border[1:].max() < 0


def test_a_picture_does_not_depend_on_its_neighbours():
    sample = miniature.PromptSampler(miniature.WEIGHTS)
    prompts = ["a photo of a dog", "a photo of a cat"]
    one, two = miniature.PromptSampler(miniature.WEIGHTS, batch_size=1)(prompts), sample(prompts)
    for alone, together in zip(one, two):
        difference = to_tensor([alone], 64) - to_tensor([together], 64)
        assert difference.abs().max() < 0.05


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Two class images, and one step of sampling, for both models."""
    for where, name in (
        (miniature, "CONFIG"),
        (demo, "BASE_CONFIG"),
        (demo, "SR_CONFIG"),
    ):
        config = OmegaConf.load(getattr(where, name))
        if "num_class_images" in config.data.params:
            config.data.params |= {
                "num_class_images": 2,
                "class_images": {"steps": 1, "scale": 4.0, "batch_size": 2},
            }
        # What watches a run is tested where it is written, and takes longer than a step.
        config.merge_with({"lightning": {"callbacks": {"image_logger": None, "fixed_loss": None}}})
        OmegaConf.save(config, tmp_path / f"{name}.yaml")
        monkeypatch.setattr(where, name, tmp_path / f"{name}.yaml")
    recipe = Recipe(steps=1, scale=4.0, height=64, width=64)
    monkeypatch.setattr(miniature, "RECIPE", recipe)
    monkeypatch.setattr(miniature, "SMALL", replace(recipe, height=32, width=32))
    monkeypatch.setattr(miniature, "LARGE", replace(recipe, scale=1.0))


@pytest.mark.parametrize(
    ("model", "sheet", "folder", "command"),
    [
        ("latent", "mug.png", "class_images", "scripts/stable_txt2img.py"),
        ("cascade", "mug-cascade.png", "class_images_cascade", "scripts/cascade_txt2img.py"),
    ],
)
def test_the_demo(model, sheet, folder, command, quick, tmp_path, capsys, monkeypatch):
    """The whole loop with two class images and one step, on a folder of a user's own pictures."""
    if model == "cascade":
        # The latent miniature trains in a process of its own, as for a user. Two more of them
        # would import for longer than they train.
        run = lambda words, **_: SimpleNamespace(returncode=main.main(words[2:]), stderr=None)  # noqa: E731
        monkeypatch.setattr(miniature, "subprocess", SimpleNamespace(run=run))
    (tmp_path / "mug").mkdir()
    for number in range(2):
        Image.new("RGB", (80, 60), (90 * number, 90, 200)).save(tmp_path / "mug" / f"{number}.png")
    out = tmp_path / "out"
    words = ["--subject", str(tmp_path / "mug"), "--model", model, "--steps", "1"]
    assert demo.main([*words, "--outdir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "calls a mug 'bowl'" in said and "photos of a bowl" in said
    assert command in said
    assert "time: training, as it says above" in said
    assert Image.open(out / sheet).width > 600
    assert len(list((out / folder / "bowl").glob("*.png"))) == 2


@pytest.mark.parametrize("train", [demo.tune, demo.tune_cascade])
def test_a_demo_without_the_prior_draws_no_class_images(train, monkeypatch, tmp_path):
    asked = []

    def dreambooth(photos, class_word, class_images, logs, more, *_):
        asked.append((class_images, list(more)))
        return miniature.BASE_WEIGHTS

    monkeypatch.setattr(demo, "dreambooth", dreambooth)
    monkeypatch.setattr(demo, "PromptSampler", lambda _: None)
    monkeypatch.setattr(demo, "CascadeSampler", lambda *_: None)
    train(tmp_path, "dog", tmp_path, False, ["--max_steps", "9"])
    without = (None, ["--max_steps", "9", "model.params.reg_weight=0"])
    super_resolution = (None, ["--max_steps", "9"])  # has no prior
    assert asked == ([without] if train is demo.tune else [without, super_resolution])


def test_a_demo_without_a_subject(caplog):
    with caplog.at_level(logging.ERROR):
        assert demo.main(["--subject", "no/such/folder"]) == 1
    assert "no/such/folder: no folder of photos" in caplog.text


def test_a_demo_of_a_cascade_without_its_weights(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(miniature, "SR_WEIGHTS", tmp_path / "cascade-sr.safetensors")
    monkeypatch.setattr(miniature, "BASE_WEIGHTS", miniature.WEIGHTS)
    assert demo.main(["--model", "cascade", "--outdir", str(tmp_path / "out")]) == 1
    assert "cascade-sr.safetensors: not there, though it comes with the project" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_says_so(tmp_path):
    with pytest.raises(UserError, match=r"training ended with status 1: error: .*batch_sice"):
        miniature.dreambooth(
            tmp_path, "dog", tmp_path, tmp_path / "logs", ["data.params.batch_sice=1"]
        )


def test_the_report_holds_every_subject():
    result = dict.fromkeys(
        (
            *(
                "scenes",
                "scenes, base",
                "class kept",
                "class, base",
                "nearest training image, dB",
                "seconds",
            ),
            *(
                f"{encoder}, {name}"
                for encoder in ("CLIP-I", "EfficientNet-Lite0")
                for name in ("gap closed", "class drift", "centred subject", "diversity kept")
            ),
        ),
        0.5,
    )
    applications = {
        f"{kind}{what}": 0.25
        for kind in KINDS
        for what in ("", ", base", ", EfficientNet-Lite0 gap closed")
    }
    kept = {**result, "applications": applications}
    runs = {(report.WITH, "dog", seed): kept for seed in (1, 2)} | {
        (report.WITHOUT, "dog", 1): result
    }
    table = "\n".join([*report.run_tables(runs), *report.application_table(runs)])
    assert table.count("25% (25%), 25%") == 2 * len(KINDS)
    assert table.count("| dog | 50% | 50% | 50% (50%) |") == 2
    assert "Means over seeds 1, 2;" in table and "without prior preservation" in table


def test_an_evaluation_of_an_unknown_subject(caplog, tmp_path):
    assert evaluate.main(["--subjects", "dragon"]) == 1
    assert "unknown dragon" in caplog.text
    (tmp_path / "holiday").mkdir()
    assert evaluate.main(["--subjects", str(tmp_path / "holiday")]) == 1
    assert "name the folder after one of the classes" in caplog.text


def test_the_photos_of_a_folder_are_measured_apart_from_the_toy_of_its_name(tmp_path):
    folders = [tmp_path / "one" / "dog", tmp_path / "two" / "dog"]
    for shade, folder in enumerate(folders):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / "0.png")
    subjects = ["dog", *map(str, folders)]
    assert [evaluate.label_of(s) for s in subjects] == ["dog", "dog (photos)", "dog (photos)"]
    assert len({evaluate.file_name_of(s) for s in subjects}) == 3
    with pytest.raises(UserError, match="two folders of one name"):
        evaluate.check_subjects(subjects)
    evaluate.check_subjects(subjects[:2])


def test_results_of_another_recipe_or_file_are_not_taken_for_these(monkeypatch, tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    folder = evaluate.results_folder(tmp_path, tmp_path / "a")
    assert folder == evaluate.results_folder(tmp_path, tmp_path / "a")
    others = {evaluate.results_folder(tmp_path, tmp_path / "b")}
    monkeypatch.setattr(miniature, "RECIPE", replace(miniature.RECIPE, steps=7))
    others.add(evaluate.results_folder(tmp_path, tmp_path / "a"))
    assert len(others) == 2 and folder not in others
