"""What a user gets wrong: one line that names it, exit status 1, nothing overwritten, no run
folder.
"""

import pytest
import torch
from PIL import Image

import main
from ldm.checkpoints.checkpoint import Checkpoint
from ldm.config import RunConfig
from ldm.modules.encoders import tokenizer
from ldm.training.checks import check_identifier, check_identifiers
from scripts import stable_txt2img
from tests.support.runs import Workspace, config, metrics


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def refused(workspace, caplog):
    """Call the training command; the one line that it answers with."""

    def call(*more, replace=(), base=None):
        arguments = workspace.arguments("refused", *more, base=base)
        for flag, value in replace:
            arguments[arguments.index(flag) + 1] = str(value)
        caplog.clear()
        assert main.main(arguments) == 1
        assert not list(workspace.logs.glob("*_refused")), "a run folder was made"
        (message,) = [
            r.getMessage() for r in caplog.records if r.getMessage().startswith("error: ")
        ]
        assert "\n" not in message
        return message

    return call


@pytest.fixture
def refused_later(caplog):
    """The one line that a training ends with that had begun."""

    def call(workspace, *more):
        assert main.main(workspace.arguments("refused", *more)) == 1
        (message,) = [
            r.getMessage() for r in caplog.records if r.getMessage().startswith("error: ")
        ]
        assert "\n" not in message
        return message

    return call


@pytest.mark.parametrize("flag", ["--data_root", "--reg_data_root"])
def test_missing_and_empty_folders(refused, tmp_path, flag):
    assert str(tmp_path / "none") in refused(replace=[(flag, tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(replace=[(flag, tmp_path / "empty")])


@pytest.mark.parametrize(
    "batch, cache, what",
    [(3, "false", "images"), (3, "true", "cached latents"), (1, "false", "images")],
)
def test_images_of_different_sizes(tmp_path, refused_later, batch, cache, what):
    """Of the subject, or in batches of one of the subject and its class, whose images are 50 x
    40.
    """
    workspace = Workspace(tmp_path)
    for number, side in enumerate((32, 32, 48)):
        Image.new("RGB", (side, side)).save(workspace.photos / f"{number}.png")
    sizes = [f"data.params.{name}.params.size=null" for name in ("train", "reg")]
    more = [
        f"data.params.batch_size={batch}",
        f"data.params.latent_cache={cache}",
        "--max_steps",
        "3",
        *sizes,
    ]
    assert refused_later(workspace, *more).startswith(f"error: {what} of different sizes [(")


def test_no_folder_at_all(workspace, caplog):
    assert main.main(["--base", str(config(workspace.path)), "-t", "-l", str(workspace.logs)]) == 1
    assert "--data_root" in caplog.text


def test_text_with_the_name_of_an_image(refused, tmp_path):
    (tmp_path / "note.jpg").write_text("not a picture")
    assert "note.jpg" in refused(replace=[("--data_root", tmp_path)])


def test_a_truncated_checkpoint(refused, tmp_path):
    torch.save({"state_dict": {"a": torch.randn(1000)}}, path := tmp_path / "whole.ckpt")
    (cut := tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:2000])
    assert f"{cut}: truncated or not a checkpoint" in refused("--actual_resume", str(cut))
    assert len(cut.read_bytes()) == 2000


def test_a_checkpoint_of_another_shape(refused, tmp_path):
    torch.save({"state_dict": {"betas": torch.randn(10)}}, path := tmp_path / "other.ckpt")
    message = refused("--actual_resume", str(path))
    assert "'betas' has shape [10], the config's model has [1000]" in message


def test_a_checkpoint_of_something_else(refused, tmp_path):
    torch.save({"weight": torch.randn(10)}, path := tmp_path / "foreign.ckpt")
    assert "tensors are missing" in refused("--actual_resume", str(path))


def test_mistyped_flag(refused):
    assert "unknown flag --data_rooot (did you mean '--data_root'?)" in refused("--data_rooot=x")


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.params.reg_wieght=1", "reg_wieght: unknown key for LatentDiffusion (did you mean "
                                      "'reg_weight'?)"),
        ("model.params.unet_config.params.num_head=1", "model.params.unet_config.params.num_head: "
                                                       "unknown key"),
        ("data.params.batchsize=1", "data.params.batchsize: unknown key"),
        ("data.params.train.params.sizes=1", "data.params.train.params.sizes: unknown key"),
        ("lightning.trainer.max_step=1", "lightning.trainer.max_step: unknown key (did you mean "
                                         "'max_steps'?)"),
        ("lighting.trainer.max_steps=1", "lighting: unknown key (did you mean 'lightning'?)"),
        ("model.target=ldm.models.diffusion.ddpm.LatentDifusion", "model.target: unknown target"),
        ("model.target=ldm.models.nowhere.LatentDiffusion", "there is no module 'ldm.models.nowhere'"),
        ("model.base_learning_rate=fast", "model.base_learning_rate: expected a positive number"),
        ("lightning.trainer.precision=17", "lightning.trainer: "),
        ("model.params.parameterization=epsilon", "accepted: eps, x0, v"),
        ("lightning.trainer.precision=bf16-true", "use 16-mixed or bf16-mixed"),
        ("data.params.train.params.size=64", "need one size"),
        ("data.params.batch_size=two", "data.params.batch_size: expected int, got 'two'"),
        ("model.params.use_ema=maybe", "model.params.use_ema: expected bool, got 'maybe'"),
        ("data.params.train.params.templates.0=a", "templates: expected str or list or None, got "
                                                   "{'0': 'a'}"),
        ("model.params.freeze=3", "model.params.freeze: expected list or None, got 3"),
        ("model.params.unet_config.params.channel_mult={a: 1}", "channel_mult: cannot set it to '{a: 1}'"),
    ],
)  # fmt: skip
def test_mistyped_keys_and_values(refused, override, named):
    assert named in refused(override)


def test_yaml_that_does_not_parse(refused, tmp_path):
    (path := tmp_path / "broken.yaml").write_text("model: [1, 2\nlightning: {")
    assert f"{path}: not valid YAML" in refused(base=path)


def test_gpus_that_are_not_there(refused):
    assert "--gpus 7,: there is no GPU 7" in refused("--gpus", "7,")


# Sampling


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ckpt", "no.ckpt"], "no.ckpt: no such checkpoint"),
        (["--from-file", "no.txt", "--ckpt", "{ckpt}"], "--from-file no.txt: no such file"),
        (["--ckpt", "{ckpt}", "--H", "33"], "must be multiples of"),
        (["--ckpt", "{ckpt}", "--ddim_steps", "1001"], "between 1 and 1000"),
        (
            ["--ckpt", "{ckpt}", "--plms", "--ddim_eta", "1"],
            "is for the DDIM sampler, not for plms",
        ),
        (["--ckpt", "{ckpt}", "--f", "8"], "--f 8: this model has 2"),
        (["--ckpt", "{ckpt}", "--n_samples", "0"], "at least 1"),
        (["--ckpt", "{ckpt}", "--device", "cuda"], "--device cuda"),
        (["--ckpt", "{ckpt}", "--device", "meta"], "--device meta"),
        (["--ckpt", "{ckpt}", "--scale", "nan"], "must be numbers"),
        (["--ckpt", "{ckpt}", "--seed", "-2"], "--seed -2: expected a whole number from 0 to"),
        (["--ckpt", "{ckpt}", "--seed", str(2**64)], "or -1"),
        (["--ckpt", "{ckpt}", "--n_rows", "-1"], "--n_rows at least 0"),
        (["--ckpt", "{ckpt}", "--outdir", "{ckpt}/out"], "a file stands where a folder is needed"),
        (["--laion400m"], "not supported"),
    ],
)
def test_sampling_what_cannot_be_sampled(workspace, arguments, message, caplog, tmp_path):
    if not (ckpt := workspace.path / "sampled.ckpt").exists():
        run = workspace.train("sampled", "--max_steps", "1")
        (run / "checkpoints/last.ckpt").rename(ckpt)
    arguments = [a.replace("{ckpt}", str(workspace.path / "sampled.ckpt")) for a in arguments]
    assert stable_txt2img.main(["--outdir", str(tmp_path / "out"), *arguments]) == 1
    error = caplog.records[-1].getMessage()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("arguments, message", [
    (["--logger", "wandb"], "lightning.trainer.logger: wandb needs its package: pip install wandb"),
    (["--logger", "wandby"], "lightning.trainer.logger: unknown 'wandby' (did you mean 'wandb'?)"),
    (["--profiler", "xla"], "lightning.trainer: Requirement 'torch_xla"),
    (["--accelerator", "tpu"], "lightning.trainer: Requirement 'torch_xla"),
    (["lightning.modelcheckpoint.params.every_n_train_steps=-1"], "lightning.modelcheckpoint.params: "),
    (["lightning.callbacks.first_step=3"], "lightning.callbacks.first_step: expected a "
                                           "mapping, got 3"),
    (["lightning.callbacks.t={target: pytorch_lightning.callbacks.Timer, params: {duration: abc}}"],
     "lightning.callbacks.t.params: Timer: "),
    (["lightning.modelcheckpoint.params.monitor=val/loss_simple_ema"],
     "'val/loss_simple_ema' is of the validation, but the config has no data.params.validation"),
    (["lightning.modelcheckpoint.params.monitor=train/los"],
     "lightning.modelcheckpoint.params.monitor: nothing logs 'train/los' (did you mean "
     "'train/loss'?); logged are train/loss_simple, train/loss_vlb, train/loss, train/loss_prior, "
     "train/loss_total"),
    (["model.params.monitor=val/los_simple"], "model.params.monitor: nothing logs 'val/los_simple' "
                                              "(did you mean"),
    (["lightning.callbacks.s={target: pytorch_lightning.callbacks.EarlyStopping, params: "
      "{monitor: val/none}}"],
     "lightning.callbacks.s.params.monitor: nothing logs 'val/none'"),
    (["model.base_learning_rate=.nan"], "model.base_learning_rate: expected a positive number, "
                                        "got nan"),
    (["data.params.train=null"], "data.params.train: needed to train"),
    (["model.params.optimizer=adamv"], "model.params.optimizer: unknown 'adamv' (did you "
                                       "mean 'adam'?)"),
    (["data.params.train.params.repeats=0"], "data.params.train.params.repeats: expected at "
                                             "least 1, got 0"),
    (["model.params.unet_config.params.num_heads=5"], "model.params.unet_config.params.num_heads: "
                                                      "32 channels cannot"),
])  # fmt: skip
def test_what_would_be_silently_something_else(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("override, says", [
    ("model.params.reg_weight=-1", "expected 0 or more, got -1"),
    ("model.params.scale_factor=0", "expected a positive number, got 0"),
    ("model.params.scale_factor=.nan", "expected a positive number, got nan"),
    ("model.params.image_size=0", "expected 1 or more, got 0"),
    ("model.params.unet_config.params.dropout=2", "expected a share from 0 to 1, got 2"),
    ("model.params.unet_config.params.model_channels=0", "expected 1 or more, got 0"),
    ("model.params.unet_config.params.num_res_blocks=-1", "expected 1 or more, got -1"),
    ("model.params.unet_config.params.channel_mult=[]", "expected 1 or more, got 0"),
    ("model.params.unet_config.params.context_dim=0", "expected 1 or more, got 0"),
    ("model.params.first_stage_config.params.embed_dim=0", "expected 1 or more, got 0"),
    ("model.params.first_stage_config.params.ddconfig.num_res_blocks=-1", "expected 1 or more, "
                                                                          "got -1"),
    ("model.params.cond_stage_config.params.max_length=0", "expected 3 or more, got 0"),
    ("data.params.class_images.batch_size=0", "expected 1 or more, got 0"),
    ("data.params.class_images.steps=0", "expected 1 or more, got 0"),
    ("data.params.class_images.scale=.nan", "expected a number, got nan"),
])  # fmt: skip
def test_numbers_with_no_sense_are_refused_by_name(refused, override, says):
    assert refused(override) == f"error: {override.partition('=')[0]}: {says}"


def test_fields_that_the_text_model_refuses(refused):
    path = "model.params.cond_stage_config.params.text_config"
    assert refused(f"{path}.num_attention_heads=3").startswith(f"error: {path}: ")


def test_one_folder_for_both_needs_no_class_images_where_the_prior_weighs_nothing(
    workspace, refused, caplog
):
    both = [("--reg_data_root", workspace.photos)]
    assert "model.params.reg_weight=0" in refused(replace=both)
    arguments = workspace.arguments("no-prior", "model.params.reg_weight=0", "--max_steps", "1")
    arguments[arguments.index("--reg_data_root") + 1] = str(workspace.photos)
    assert main.main(arguments) == 0
    assert "so no class images are used" in caplog.text
    assert "train/loss_prior" not in metrics(workspace.run("no-prior"))[0]


@pytest.mark.parametrize("keys, named", [
    ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": 1}, "a LoRA"),
    ({"encoder.conv_in.weight": 1, "decoder.conv_in.weight": 1}, "an autoencoder alone"),
    ({"model.diffusion_model.input_blocks.0.0.weight": 1}, "a UNet alone"),
])  # fmt: skip
def test_one_network_is_named_before_a_model_is_built(refused, tmp_path, monkeypatch, keys, named):
    torch.save({key: torch.zeros(1) for key in keys}, path := tmp_path / "one.ckpt")
    monkeypatch.setattr(Checkpoint, "build", lambda *args, **kwargs: pytest.fail("built"))
    assert refused("--actual_resume", str(path)).startswith(f"error: {path}: {named}, not a whole")


def test_a_folder_of_the_system_s_own(workspace, refused, caplog):
    message = refused(replace=[("-l", "/proc/none")])
    assert message.startswith("error: /proc/none: cannot write there: ")
    assert stable_txt2img.main(["--outdir", "/proc/none"]) == 1
    assert "error: /proc/none: cannot write there: " in caplog.text


def test_a_validation_that_never_comes_cannot_be_monitored(refused):
    validation = "data.params.validation={target: ldm.data.personalized.PersonalizedBase, params: {size: 32, set: val}}"
    monitor = "lightning.modelcheckpoint.params.monitor=val/loss_simple_ema"
    assert "the first one comes after step 6 and max_steps is 4" in refused(validation, monitor)


def test_an_identifier_of_several_tokens_is_said(workspace, caplog):
    workspace.train(
        "identifier", "--max_steps", "1", "data.params.train.params.identifier=mydogxyz"
    )
    assert "identifier: 'mydogxyz' is 4 tokens" in caplog.text
    assert "no caption of the subject has" not in caplog.text


@pytest.mark.parametrize("prompt, is_said", [
    ("photo of a sks dog", False), ("a SKS's toy", False), ("masks of a dog", True),
])  # fmt: skip
def test_an_identifier_is_a_word_of_its_own(caplog, prompt, is_said):
    check_identifier("sks", [prompt], tokenizer.encode)
    assert ("no caption of the subject has 'sks'" in caplog.text) == is_said


def test_each_subject_needs_its_identifier(caplog):
    concepts = [{"identifier": "sks"}, {"identifier": "zwx"}]
    config = RunConfig({"data": {"params": {"concepts": concepts}}})
    each = [{"subject_prompts": ["a sks dog and a zwx cat"]}, {"subject_prompts": ["a cat"]}]
    check_identifiers(config, {"concepts": each}, tokenizer.encode)
    assert "data.params.concepts[1].identifier: no caption of the subject has 'zwx'" in caplog.text
    assert "sks'" not in caplog.text


def test_an_identifier_that_no_caption_has_is_said(workspace, caplog):
    templates = 'data.params.train.params.templates=["a {class_word}"]'
    workspace.train("no-identifier", "--max_steps", "1", templates)
    assert "no caption of the subject has 'sks', so that word will not mean it" in caplog.text
