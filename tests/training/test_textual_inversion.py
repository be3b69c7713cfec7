"""A training of new words from the command line: what it says, writes, draws, and is tuned from."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import main
from ldm.checkpoints.embeddings import read_words
from ldm.data.datamodule import DataModuleFromConfig
from ldm.sampling.text_to_image import load_model
from ldm.training.checks import check_new_words
from scripts import stable_txt2img
from tests.support.exact import smallest
from tests.support.models import parts_that_moved
from tests.support.runs import Workspace, checkpoint
from tests.training.test_exactness import WORDS

PARAMS = "model.params.personalization_config.params."
ROWS = "embedding_manager.string_to_param_dict.*"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, 2)


@pytest.fixture(scope="module")
def base_model(workspace, base):
    """A model as it is before anything was learned."""
    run = workspace.train("base", "--max_steps", "1", "model.base_learning_rate=1e-30", base=base)
    return run / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def learned(workspace, base, base_model):
    """A run that learned a word of two vectors."""
    return workspace.train("words", *WORDS, "--actual_resume", str(base_model), base=base)


def test_a_run_says_what_trains_and_leaves_the_rest_bit_for_bit(
    workspace, base, base_model, caplog
):
    caplog.set_level("INFO")
    more = ["--actual_resume", str(base_model), "--init_word", "cat"]
    run = workspace.train("said", *WORDS, *more, base=base)
    said = caplog.text
    assert "new word '*' (2 vectors of 8); frozen: UNet" in said
    assert "'*' starts as 'cat'" in said
    assert '"photo of a * dog" = tokens 1125 539 320 1000000 1000001 1929' in said
    assert "not used: captions of the class hold none of the new words" in said
    assert "step 1: what should train has moved, and nothing else has" in said
    file = run / "checkpoints/learned_embeds.safetensors"
    assert f"new words  {file}: for prompts and other programs" in said
    before, after = (checkpoint(r)["state_dict"] for r in (base_model.parents[1], run))
    assert parts_that_moved(before, {key: after[key] for key in before}) == set()
    assert after.keys() - before.keys() == {ROWS}
    assert torch.equal(read_words(file)["*"], after[ROWS])


def test_a_prompt_with_the_word_is_drawn_from_the_run_or_with_its_file(
    learned, base_model, tmp_path
):
    """The checkpoint knows its words; beside the base model the file gives them."""
    file = learned / "checkpoints/learned_embeds.safetensors"
    sources: dict[str, list[str]] = {
        "run": ["--ckpt", str(learned / "checkpoints/last.ckpt")],
        "file": ["--ckpt", str(base_model), "--embedding_path", str(file)],
    }
    drawn = {}
    for name, flags in sources.items():
        where = ["--outdir", str(tmp_path / name), "--prompt", "photo of a *", "--skip_grid"]
        how = ["--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--H", "16", "--W", "16"]
        assert stable_txt2img.main([*flags, *where, *how]) == 0
        with Image.open(next((tmp_path / name).rglob("*.png"))) as picture:
            drawn[name] = picture.tobytes()
    assert drawn["run"] == drawn["file"]
    # So small a model hardly listens; what it is told differs.
    tuned, plain = (load_model(path) for path in (sources["run"][1], base_model))
    read = [model.get_learned_conditioning(["photo of a *"]) for model in (tuned, plain)]
    assert (read[0] - read[1]).abs().max() > 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_is_tuned_around_words_that_stay(workspace, base, base_model, learned, lora):
    """Pivotal tuning, from the run's checkpoint or from its file beside the base model."""
    more = [*WORDS, f"{PARAMS}pivotal=true"]
    if lora:
        file = learned / "checkpoints/learned_embeds.safetensors"
        more += ["--actual_resume", str(base_model), "--embedding_manager_ckpt", str(file)]
        more += ["model.params.lora={rank: 2}"]
    else:
        more += ["--actual_resume", str(learned / "checkpoints/last.ckpt")]
        more += ["model.params.preservation=prior_prediction"]  # by a copy of both networks
    run = workspace.train(f"pivotal-{lora}", *more, base=base)
    word = checkpoint(learned)["state_dict"][ROWS]
    after = checkpoint(run)["state_dict"]
    assert torch.equal(after[ROWS], word) and word.abs().max() > 0
    if not lora:
        moved = parts_that_moved(checkpoint(learned)["state_dict"], after)
        assert moved == {"model", "cond_stage_model"}
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names >= {"learned_embeds.safetensors", *(["lora.safetensors"] if lora else [])}
    model = load_model(run / "checkpoints/last.ckpt")
    assert torch.equal(model.embedding_manager.words["*"], word)


@pytest.mark.parametrize("more, message", [
    (["data.params.train.params.identifier=sks"], "no caption holds '[*]', as 'photo of a sks dog'"),
    ([f"{PARAMS}initializer_words=[]"], "initializer_words: '[*]' has no word to start as"),
    (["model.params.use_ema=true"], "use_ema: personalization_config trains new words alone"),
    (["--embedding_manager_ckpt", "FILE", f"{PARAMS}num_vectors_per_token=3"],
     "2 vectors, '[*]' has 3: set .*num_vectors_per_token to 2"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused(workspace, base, learned, caplog, more, message):
    file = str(learned / "checkpoints/learned_embeds.safetensors")
    given = [file if word == "FILE" else word for word in more]
    assert main.main(workspace.arguments("refused", *WORDS, *given, base=base)) == 1
    assert re.search(message, caplog.text)
    assert not list(workspace.logs.glob("*_refused"))


def test_a_word_that_no_caption_has_is_said(caplog):
    manager = SimpleNamespace(words={"<a>": None, "<b>": None}, words_in=lambda text: ["<a>"])
    data = object.__new__(DataModuleFromConfig)
    data.num_class_images, data.concepts, data._test = 0, [], None
    data.summary = lambda: {"subject_prompts": ["photo of a <a>"]}
    check_new_words(SimpleNamespace(embedding_manager=manager, words_alone=True), data)
    assert "'<b>': in no caption, so nothing is learned for it" in caplog.text


def test_words_that_a_training_would_lose_are_named(workspace, base, learned, caplog):
    more = ["--actual_resume", str(learned / "checkpoints/last.ckpt"), "--max_steps", "1"]
    run = workspace.train("lost", *more, base=base)
    assert "its new words * are lost: name them in model.params.personalization" in caplog.text
    assert ROWS not in checkpoint(run)["state_dict"]
