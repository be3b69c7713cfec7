"""A training of several subjects from the command line: what it says, trains and refuses."""

import re

import pytest

import main
from ldm.checkpoints.checkpoint import Checkpoint
from tests.support.exact import smallest
from tests.support.runs import Workspace, checkpoint, csv_rows, metrics
from tests.training.test_exactness import CONCEPTS, WORDS

LORA = ["model.params.lora={rank: 2}", "model.params.use_ema=false"]
LIST = CONCEPTS[0]
# What looks at all images of a run, of whichever subject.
WHOLE = [
    "data.params.latent_cache=true",
    "lightning.callbacks.fixed_loss={target: ldm.callbacks.fixed_loss.FixedLoss, "
    "params: {every_n_steps: 3, examples: 4, time_steps: 1}}",
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, 3)


def test_the_start_lists_every_subject_and_both_losses_are_logged(workspace, base, caplog):
    caplog.set_level("INFO")
    run = workspace.train("two", LIST, *LORA, *WHOLE, "data.params.batch_size=3", base=base)
    here = workspace.path
    for line in (
        rf'subject 1 +{here}/photos: 3 images; "photo of a sks dog" = tokens .*; 33% of the examples',
        r'class 1 +4 images; "photo of a dog" = tokens',
        rf'subject 2 +{here}/photos2: 2 images; "photo of a zwx cat" = tokens .*; 67% of the ex',
        r'class 2 +3 images; "photo of a cat" = tokens',
    ):
        assert re.search(line, caplog.text), line
    assert all(float(row["train/loss_prior"]) > 0 for row in metrics(run))
    fixed = [row for row in csv_rows(run) if row.get("val/loss_subject_fixed")]
    assert len(fixed) == 2 and all(float(row["val/loss_prior_fixed"]) > 0 for row in fixed)
    assert (run / "checkpoints/lora.safetensors").exists()
    facts = Checkpoint.open(run / "checkpoints/last.ckpt").facts
    assert facts["concepts"] == [
        {"class_word": "dog"},
        {"class_word": "cat", "identifier": "zwx"},
    ]
    assert len(checkpoint(run)["config"]["data"]["params"]["concepts"]) == 2


def test_new_words_for_several_subjects(workspace, base, caplog):
    two = "model.params.personalization_config.params.placeholder_strings=['<a>','<b>']"
    starts = "model.params.personalization_config.params.initializer_words=[dog,cat]"
    named = LIST.replace("class_word: dog,", "class_word: dog, identifier: <a>,")
    given = [*WORDS, two, starts, named.replace("zwx", "<b>"), "data.params.reg=null"]
    run = workspace.train("words", *given, "--max_steps", "2", base=base)
    names = {path.name for path in (run / "checkpoints").glob("learned*")}
    assert names == {"learned_embeds-1.safetensors", "learned_embeds-2.safetensors"}
    assert "reg_data_root is not used, for there is no data.params.reg" in caplog.text


@pytest.mark.parametrize("more, message", [
    (["--data_root", "x"], "--data_root: data.params.concepts says it of each subject"),
    (["--class_word", "dog"], "--class_word: data.params.concepts says it of each subject"),
    (["--init_word", "dog"], "are for one subject, and data.params.concepts has 2"),
    (["data.params.train.params.data_root=x"], r"train.params.data_root: .*leave --data_root out"),
])  # fmt: skip
def test_what_is_said_twice_is_refused(workspace, base, caplog, more, message):
    assert main.main(workspace.arguments("refused", LIST, *more, base=base)) == 1
    assert re.search(message, caplog.text)
    assert not list(workspace.logs.glob("*_refused"))
