"""LoRA DreamBooth: adapters as one choice of the same training loop, their files, and diffusers
as their judge.
"""

import json
import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import main
from ldm.checkpoints.export import write_weights
from ldm.checkpoints.lora import adapted_layers, adapters_alone, extract_lora, merge_adapters
from ldm.checkpoints.pipeline_folder import save_pipeline
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.text_to_image import load_model
from scripts import convert, stable_txt2img
from tests.support import golden
from tests.support.families import PROMPTS, noise, params
from tests.support.golden import rel
from tests.support.runs import Workspace, checkpoint, golden_config, same

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 6.0}
UNET_CHECKPOINTING = "model.params.unet_config.params.use_checkpoint=true"
TEXT_CHECKPOINTING = "model.params.cond_stage_config.params.use_checkpoint=true"


def small(family="v1", **overrides):
    """A small model with the golden rule's weights."""
    model = LatentDiffusion(
        **{**params(family), "lora": LORA, "cond_stage_trainable": True, **overrides}
    )
    golden.load_golden_weights(model)
    return model


def outputs(model):
    """The text encoder's and the UNet's output."""
    x, context, t = (
        noise(2, 4, 8, 8),
        model.get_learned_conditioning(PROMPTS),
        torch.tensor([3, 700]),
    )
    return context, model.model.diffusion_model(x, t, context=context)


@pytest.fixture(scope="module")
def base():
    """The model before it has adapters."""
    model = small()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapted():
    """The model with adapters that change it."""
    model = small()
    model.configure_model()
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("lora"), make_config=golden_config)


@pytest.fixture(scope="module")
def run(workspace):
    """The flags of a LoRA run; it has initial weights, as a new UNet's last layer is zero and
    lets no gradient by.
    """
    torch.save(
        {"state_dict": golden.latent_diffusion().state_dict()}, path := workspace.path / "base.ckpt"
    )
    return [
        "model.params.lora={rank: 4, alpha: 6.0}",
        "model.params.use_ema=false",
        "--actual_resume",
        str(path),
    ]


@pytest.fixture(scope="module")
def finished(workspace, run):
    """A LoRA run of four steps."""
    return workspace.train("finished", *run)


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


# The model


def test_how_adapters_start_is_a_function_of_the_seed_and_of_their_names():
    """So two processes start as one does, and a run with class images as one that finds them."""

    def starts(seed, drawn_before=0):
        torch.manual_seed(seed)
        torch.rand(drawn_before)
        model = small()
        model.configure_model()
        named = model.named_parameters()
        return {name: value.detach() for name, value in named if ".lora_A." in name}

    first, again, other = starts(1), starts(1, drawn_before=7), starts(2)
    assert same(first, again) and not any(map(torch.equal, first.values(), other.values()))
    for value in first.values():
        bound = value.shape[1] ** -0.5
        assert 0.5 * bound < value.abs().max() <= bound and value.mean().abs() < bound / 2
    assert len({tuple(value.flatten()[:3].tolist()) for value in first.values()}) == len(first)


def test_adapters_change_nothing_at_first(base):
    model = small()
    model.configure_model()
    assert all(map(torch.equal, outputs(base), outputs(model.eval())))


def test_where_the_adapters_are():
    model = small()
    state = model.state_dict()
    model.configure_model()
    model.configure_model()
    layers = {layer.split(".", 1)[1] for layer in adapted_layers(model.state_dict())}
    unet, text = (
        {layer for layer in layers if layer.startswith(part)}
        for part in ("diffusion_model", "transformer")
    )
    assert {layer.rsplit(".attn", 1)[1][2:] for layer in unet} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert {layer.rsplit(".", 1)[1] for layer in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert len(unet) == sum(
        ".attn" in key and key.endswith("weight") for key in state if "first_stage" not in key
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_a_frozen_text_encoder_gets_none():
    model = small(cond_stage_trainable=False)
    model.configure_model()
    assert all(layer.startswith("model.") for layer in adapted_layers(model.state_dict()))
    assert not model.get_learned_conditioning(PROMPTS).requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_has_a_gradient(checkpointing):
    given = params("v1")
    given["unet_config"]["params"]["use_checkpoint"] = checkpointing
    given["cond_stage_config"]["params"] = {
        **given["cond_stage_config"]["params"],
        "use_checkpoint": checkpointing,
    }
    model = small(**{key: given[key] for key in ("unet_config", "cond_stage_config")})
    model.configure_model()
    text, latents = outputs(model.train())
    (latents.square().mean() + text.square().mean()).backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # A's gradient is zero as long as B is
            assert parameter.grad.abs().max() > 0, name
        assert ".lora_" in name or parameter.grad is None, name
    (group,) = model.configure_optimizers().param_groups
    assert len(group["params"]) == 2 * len(adapted_layers(model.state_dict()))


def test_a_stable_diffusion_2_gets_adapters_on_its_unet():
    model = small("v2", cond_stage_trainable=False)
    plain = model.state_dict()
    model.configure_model()
    state = model.state_dict()
    assert set(merge_adapters(state, 6.0)) == set(plain)
    assert all(key.startswith("lora_unet_") for key in adapters_alone(state, 6.0))


# Files


def test_merged_weights_compute_what_the_adapted_model_does(base, adapted):
    merged = merge_adapters(adapted.state_dict(), 6.0)
    assert list(merged) == list(base.state_dict())
    model = LatentDiffusion(**params("v1")).eval().requires_grad_(False)
    model.load_state_dict(merged)
    for found, expected, before in zip(outputs(model), outputs(adapted), outputs(base)):
        assert rel(found, expected) < 1e-5
        assert rel(before, expected) > 0.05


def test_diffusers_loads_the_adapters(base, adapted, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(base, params("v1"), tmp_path / "pipeline")
    write_weights(
        tmp_path / "lora.safetensors", adapters_alone(adapted.state_dict(), 6.0), {}, {"steps": 4}
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    tokens = adapted.cond_stage_model.tokenize(PROMPTS)
    text, latents = outputs(adapted)
    context = pipeline.text_encoder(tokens)[0]
    assert rel(text, context) < 1e-4
    found = pipeline.unet(
        noise(2, 4, 8, 8), torch.tensor([3, 700]), encoder_hidden_states=context
    ).sample
    assert rel(latents, found) < 1e-4


# Runs


def test_only_the_adapters_are_trained(finished):
    first, last = (checkpoint(finished, name)["state_dict"] for name in
                   ("epoch=000000-step=000000002.ckpt", "last.ckpt"))  # fmt: skip
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert moved == {key for key in first if ".lora_" in key}
    own = {
        key.replace(".base_layer.", "."): value
        for key, value in last.items()
        if ".lora_" not in key
    }
    assert same(own, dict(golden.latent_diffusion().state_dict()))
    assert len(checkpoint(finished)["optimizer_states"][0]["state"]) == len(moved)


def test_the_end_of_a_run(workspace, run, caplog):
    folder = workspace.train("ended", *run, "--max_steps", "1")
    file = folder / "checkpoints/lora.safetensors"
    assert f"LoRA     {file}" in caplog.text and "; frozen: UNet" in caplog.text
    state = checkpoint(folder)["state_dict"]
    assert same(load_file(file), adapters_alone(state, 6.0))
    assert len(load_file(file)) == 3 * len(adapted_layers(state))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert json.loads(header["training"])["lora"] == LORA
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "6.0")
    assert (header["ss_v2"], header["ss_steps"], header["ss_output_name"]) == (
        "False",
        "1",
        folder.name,
    )
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("3", "4")
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize(
    "more", [[], [UNET_CHECKPOINTING, TEXT_CHECKPOINTING, "model.params.optimizer=muon"]]
)
def test_a_resumed_lora_run_repeats_the_uninterrupted_one(workspace, run, more):
    name = f"resumed{len(more)}"
    straight = workspace.train(name + "-straight", *run, "--max_steps", "5", *more)
    parts = workspace.train(name, *run, "--max_steps", "3", *more)
    workspace.resume(parts, "--max_steps", "5")
    ours, theirs = checkpoint(parts), checkpoint(straight)
    assert ours["global_step"] == 5
    assert same(ours["state_dict"], theirs["state_dict"])
    assert same(ours["optimizer_states"], theirs["optimizer_states"])
    assert same(
        *(load_file(folder / "checkpoints/lora.safetensors") for folder in (parts, straight))
    )


def test_a_run_cannot_go_on_with_other_adapters(workspace, finished, caplog):
    assert main.main(["-r", str(finished), "--max_steps", "5", "model.params.lora.rank=2"]) == 1
    assert re.search(r"model\.params\.lora: .*'rank': 4.* in the run, now .*'rank': 2", caplog.text)


def test_sampling_and_initial_weights_have_the_adapters_merged(workspace, run, finished, caplog):
    last = finished / "checkpoints/last.ckpt"
    state = checkpoint(finished)["state_dict"]
    merged = merge_adapters(state, 6.0)
    assert same(dict(load_model(last).state_dict()), merged)
    flags = [
        "--ddim_steps",
        "2",
        "--n_iter",
        "1",
        "--n_samples",
        "1",
        "--outdir",
        str(workspace.path / "out"),
    ]
    assert stable_txt2img.main(["--ckpt", str(last), "--prompt", PROMPTS[0], *flags]) == 0
    again = checkpoint(workspace.train("from-lora", "--max_steps", "1", *run[:-1], str(last)))[
        "state_dict"
    ]
    assert f"{len(merged)} tensors used" in caplog.text
    for layer in adapted_layers(again):
        assert torch.equal(again[f"{layer}.base_layer.weight"], merged[f"{layer}.weight"])


def test_an_init_word_is_not_in_the_lora_file(workspace, run, caplog):
    workspace.train("init-word", *run, "--init_word", "dog", "--max_steps", "1")
    assert "lora.safetensors will not hold the changed embeddings" in caplog.text


def test_converting_a_lora_run(finished, tmp_path, caplog):
    last, merged, lora = (
        finished / "checkpoints/last.ckpt",
        tmp_path / "m.safetensors",
        tmp_path / "l.safetensors",
    )
    assert convert.main(["--ckpt", str(last), "--output", str(merged)]) == 0
    assert same(load_file(merged), merge_adapters(checkpoint(finished)["state_dict"], 6.0))
    with safe_open(merged, "pt") as file:
        assert "lora" not in json.loads(file.metadata()["config"])["model"]["params"]
    assert same(dict(load_model(merged).state_dict()), load_file(merged))
    assert convert.main(["--ckpt", str(last), "--adapters", "--output", str(lora)]) == 0
    assert same(load_file(lora), load_file(finished / "checkpoints/lora.safetensors"))


@pytest.mark.parametrize("more, message", [
    (["--weights", "ema"], "--adapters: does not go with --weights"),
    (["--only", "model."], "--adapters: does not go with --only"),
    (["--output", "folder"], "--adapters writes a .safetensors file"),
])  # fmt: skip
def test_adapters_and_other_flags(finished, tmp_path, caplog, more, message):
    last = finished / "checkpoints/last.ckpt"
    flags = ["--ckpt", str(last), "--adapters", "--output", str(tmp_path / "l.safetensors"), *more]
    assert convert.main(flags) == 1
    assert message in caplog.text


def test_files_without_adapters_or_without_their_scale(base, finished, tmp_path, caplog):
    torch.save({"state_dict": base.state_dict()}, plain := tmp_path / "plain.ckpt")
    torch.save({"state_dict": checkpoint(finished)["state_dict"]}, bare := tmp_path / "bare.ckpt")
    output = ["--output", str(tmp_path / "l.safetensors")]
    assert convert.main(["--ckpt", str(plain), "--adapters", *output]) == 1
    assert f"{plain}: no adapters in it" in caplog.text
    assert convert.main(["--ckpt", str(bare), *output]) == 1
    assert (
        f"{bare}: a LoRA run's checkpoint without the config that ran: give it with --config"
        in caplog.text
    )


# What cannot be


@pytest.mark.parametrize("lora, message", [
    ({"rank": 0}, "lora.rank: expected 1 or more, got 0"),
    ({"rank": 1.5}, "lora.rank: expected int, got 1.5"),
    ({"alpha": 0}, "lora.alpha: expected a positive number, got 0"),
    ({"alpha": float("nan")}, "lora.alpha: expected a positive number, got nan"),
    ({"rnk": 8}, "lora.rnk: unknown key for LoraOptions (did you mean 'rank'?); accepted: "
                 "rank, alpha"),
])  # fmt: skip
def test_wrong_options(lora, message):
    with pytest.raises(UserError) as raised:
        small(lora=lora)
    assert str(raised.value) == message


def test_alpha_is_the_rank_by_default():
    model = small(lora={"rank": 3})
    assert (model.lora.rank, model.lora.alpha) == (3, 3.0)
    assert small(lora={}).lora.rank == 8


def test_models_that_take_no_adapters(monkeypatch):
    with pytest.raises(
        UserError,
        match=r"FrozenOpenCLIPEmbedder takes no adapters: set .*cond_stage_trainable: false",
    ):
        small("v2")
    with pytest.raises(UserError, match=r"^lora: .*use_ema: false"):
        small(use_ema=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the package 'peft': pip install peft"):
        small()


def test_refused_before_anything_is_written(workspace, caplog):
    assert main.main(workspace.arguments("refused", "model.params.lora.rank=0")) == 1
    assert "error: model.params.lora.rank: expected 1 or more, got 0" in caplog.text
    assert not list(workspace.logs.glob("*_refused"))


def test_a_difference_that_is_no_number_is_refused(base):
    state = {key: value.clone() for key, value in base.state_dict().items()}
    before = {key: value.clone() for key, value in state.items()}
    next(value for key, value in state.items() if key.endswith("attn1.to_q.weight"))[0, 0] = float(
        "nan"
    )
    with pytest.raises(UserError, match="no numbers: the weights are broken"):
        extract_lora(before, state, 4)
