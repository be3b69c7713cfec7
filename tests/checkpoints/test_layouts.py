"""What people's files of one model have in common is the model: every layout builds the same one,
and so does what our own command writes from it.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.ema import has_averages
from ldm.checkpoints.layouts import ema_name, with_our_names
from ldm.checkpoints.loading import instantiate_filled
from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.sampling.text_to_image import load_model
from ldm.training.initial_weights import Start, build_model
from scripts import convert
from tests.support import families, golden
from tests.support.runs import same

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SCHEDULE = NoiseSchedule.names()
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def model():
    found = LatentDiffusion(**families.params("v1"))
    golden.load_golden_weights(found)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    return families.yaml(tmp_path_factory.mktemp("config"))


def renamed(state, old, new):
    """The tensors with a part of their names replaced."""
    return {key.replace(old, new): value for key, value in state.items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def rounded(state, *keys):
    """The tensors, some of them in half precision."""
    return {key: value.half() if key in keys else value for key, value in state.items()}


def worn(state):
    """Positions as averaging in half precision leaves them."""
    return {**state, POSITIONS: state[POSITIONS].half() - 0.03}


OLD_CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
COUNTERS = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

LAYOUTS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "global_step": 3},
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": state, "optimizer": None},
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "state_dict in model": lambda state: {"model": {"state_dict": state}},
    "three networks": lambda state: without(state, *SCHEDULE, POSITIONS),
    "of the schedule, "
    "alphas_cumprod": lambda state: without(state, *(set(SCHEDULE) - {"alphas_cumprod"})),
    "a rounded schedule": lambda state: rounded(state, *SCHEDULE),
    "a rounded part of "
    "the schedule": lambda state: rounded(without(state, *SCHEDULE[2:]), *SCHEDULE[:2]),
    "rounded positions": worn,
    "counters of EMA": lambda state: {**state, **COUNTERS},
    "DDP": lambda state: prefixed(state, "module."),
    "Fabric and DeepSpeed": lambda state: {"module": prefixed(state, "_forward_module.")},
    "compiled and DDP": lambda state: prefixed(state, "_orig_mod.module."),
    "compiled UNet": lambda state: renamed(state, UNET, UNET + "_orig_mod."),
    "compiled parts inside": lambda state: renamed(state, ".attn1.", ".attn1._orig_mod."),
    "FSDP": lambda state: renamed(prefixed(state, "_fsdp_wrapped_module."), UNET, UNET + "_fsdp_wrapped_module."),
    "recomputed blocks": lambda state: renamed(state, "_blocks.0.", "_blocks.0._checkpoint_wrapped_module."),
    "a model in a model": lambda state: prefixed(state, "model."),
    "an unknown word before all": lambda state: prefixed(state, "ldm_net."),
    "older CLIP": lambda state: renamed(state, *OLD_CLIP),
    "older CLIP under "
    "DDP": lambda state: {"model": prefixed(renamed(without(state, POSITIONS), *OLD_CLIP), "module.")},
    "generative-models": lambda state: renamed(state, "cond_stage_model.", "conditioner.embedders.0."),
    "of an older "
    "LDM": lambda state: {**state, "logvar": torch.zeros(1000), "lvlb_weights": torch.ones(1000)},
}  # fmt: skip
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def write(state, layout, folder):
    """A file of a layout; its suffix is one after the other of those that people use."""
    suffix = SUFFIXES[list(LAYOUTS).index(layout) % len(SUFFIXES)]
    path = folder / f"model{suffix}"
    content = LAYOUTS[layout](state)
    if suffix == ".safetensors" and all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)  # also under the name of a .safetensors, as renamed files are
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model_and_what_it_writes_we_read(
    layout, state, model, yaml, tmp_path
):
    path, output = write(state, layout, tmp_path), tmp_path / "converted.safetensors"
    assert same(dict(load_model(path, yaml).state_dict()), state)
    assert convert.main(["--ckpt", str(path), "--config", str(yaml), "--output", str(output)]) == 0
    assert same(dict(load_model(output).state_dict()), state)  # which says itself what it fits


@pytest.mark.parametrize("layout", ["three networks", "older CLIP under DDP", "rounded positions"])
def test_a_training_starts_from_every_layout(layout, state, tmp_path):
    config = families.config()
    found, report = build_model(
        RunConfig(config), Start(write(state, layout, tmp_path)), resumes=False
    )
    assert same(dict(found.state_dict()), state)
    assert ("13 built from the config" in report) == (layout == "three networks")


@pytest.mark.parametrize("layout", ["three networks", "counters of EMA", "DDP"])
def test_a_lora_of_every_layout(layout, state, yaml, tmp_path):
    base, tuned, output = (
        write(state, layout, tmp_path),
        tmp_path / "tuned.ckpt",
        tmp_path / "lora.safetensors",
    )
    key = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.save({"state_dict": {**state, key: state[key] + 1}}, tuned)
    command = [
        "--ckpt",
        str(tuned),
        "--lora_base",
        str(base),
        "--config",
        str(yaml),
        "--output",
        str(output),
    ]
    assert convert.main([*command, "--rank", "1"]) == 0
    assert all("mid_block" in name for name in load_file(output))  # the one layer that differs


def test_a_safetensors_file_under_another_name(state, yaml, tmp_path):
    save_file(state, tmp_path / "model.ckpt")
    assert same(dict(load_model(tmp_path / "model.ckpt", yaml).state_dict()), state)


def test_averages_keep_the_names_of_what_they_average(state, tmp_path):
    averages = {
        f"model_ema.{ema_name(key)}": value + 1
        for key, value in state.items()
        if key.startswith(UNET)
    }
    both = {**state, **averages, **COUNTERS}
    compiled = renamed(both, UNET, UNET + "_orig_mod.")
    compiled = {
        key.replace("model_ema.diffusion_model", "model_ema.diffusion_model_orig_mod"): value
        for key, value in compiled.items()
    }
    for found in (with_our_names(prefixed(both, "module."), "x"), with_our_names(compiled, "x")):
        assert found.keys() == both.keys() and has_averages(found)


def test_counters_of_averages_are_no_averages(state, yaml, tmp_path, caplog):
    """As sd-v1-4.ckpt has them."""
    torch.save({"state_dict": {**state, **COUNTERS}}, path := tmp_path / "v1-4.ckpt")
    checkpoint = Checkpoint.open(path, yaml)
    assert "averaged" not in str(checkpoint)
    assert (
        checkpoint.for_sampling().state.keys() == checkpoint.trained().state.keys() == state.keys()
    )
    assert checkpoint.for_training(keeps_ema=True).state.keys() == state.keys()
    with pytest.raises(UserError, match="no averaged weights"):
        checkpoint.ema()
    command = ["--ckpt", str(path), "--config", str(yaml), "--output", str(tmp_path / "x.ckpt")]
    assert convert.main([*command, "--keep_ema"]) == 1
    assert "no averaged weights" in caplog.text and not (tmp_path / "x.ckpt").exists()


def test_averages_start_with_the_configs_decay(state):
    params = {**families.params("v1"), "use_ema": True, "ema_decay": 0.5}
    target = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    found, _ = instantiate_filled(target, state, "x.ckpt")
    assert found.model_ema.decay == 0.5


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_positions_are_numbers_whatever_they_were_stored_as(stored, state, model):
    """The text of a model whose positions were cut to 0, 0, 1, ... is another one."""
    damaged = {**state, POSITIONS: state[POSITIONS].to(stored) - 0.2}
    found = with_our_names(damaged, "x")
    assert found[POSITIONS].dtype == torch.int64 and torch.equal(found[POSITIONS], state[POSITIONS])
    # Where a state dict is loaded without its names being looked at, it is rounded.
    filled, _ = instantiate_filled({**families.config()["model"]}, damaged, "x.ckpt")
    prompts = ["photo of a sks dog"]
    expected = model.get_learned_conditioning(prompts)
    torch.testing.assert_close(filled.eval().get_learned_conditioning(prompts), expected)


def test_positions_that_are_something_else_are_said(state, caplog):
    with_our_names({**state, POSITIONS: state[POSITIONS].flip(-1)}, "x.ckpt")
    assert "x.ckpt: its" in caplog.text and "position_ids' are not 0, 1, 2" in caplog.text


def test_two_names_of_one_tensor_are_not_chosen_between(state):
    key = UNET + "out.2.weight"
    with pytest.raises(UserError, match=rf"x\.ckpt: '{key}' and 'module\.{key}' are both '{key}'"):
        with_our_names({**state, "module." + key: state[key]}, "x.ckpt")


def test_two_models_in_one_file_are_refused(state):
    both = prefixed(state, "student.net.") | prefixed(state, "teacher.")
    named = r"x\.ckpt: it holds more than one model, under 'student\.net\.' and 'teacher\.'"
    with pytest.raises(UserError, match=named):
        with_our_names(both, "x.ckpt")


def test_names_that_are_not_known_are_named(state, yaml, tmp_path):
    torch.save(renamed(state, "first_stage_model.", "stage_one."), tmp_path / "x.ckpt")
    with pytest.raises(
        UserError,
        match=r"x\.ckpt: \d+ of the model's \d+ tensors are missing.* it has no autoencoder",
    ):
        load_model(tmp_path / "x.ckpt", yaml)
    torch.save({"weights of the net": state}, tmp_path / "x.ckpt")
    with pytest.raises(
        UserError, match=r"x\.ckpt: no weights in it; its keys are weights of the net"
    ):
        load_model(tmp_path / "x.ckpt", yaml)


# The noise schedule


def other_schedule(**more):
    schedule = NoiseSchedule.create(1000, "linear", 0.001, 0.02, **more)
    return {name: getattr(schedule, name) for name in SCHEDULE}


def test_a_whole_schedule_of_the_files_own_stays_and_is_said(state, yaml, tmp_path, caplog):
    torch.save({**state, **other_schedule()}, tmp_path / "x.ckpt")
    found = load_model(tmp_path / "x.ckpt", yaml)
    assert torch.equal(found.betas, other_schedule()["betas"])
    assert "its noise schedule is not the config's: that of the file is used" in caplog.text


def test_a_part_of_another_schedule_is_refused(state, yaml, tmp_path):
    part = {"alphas_cumprod": other_schedule()["alphas_cumprod"]}
    torch.save({**without(state, *SCHEDULE), **part}, tmp_path / "x.ckpt")
    with pytest.raises(
        UserError,
        match=r"x\.ckpt: it has only alphas_cumprod of its noise schedule, which is not the",
    ):
        load_model(tmp_path / "x.ckpt", yaml)


@pytest.mark.parametrize(
    "layout", ["three networks", "a rounded schedule", "of the schedule, alphas_cumprod"]
)
def test_zero_terminal_snr_is_the_configs(layout, state):
    params = {**families.params("v1"), "parameterization": "v", "zero_terminal_snr": True}
    target = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    found, _ = instantiate_filled(target, LAYOUTS[layout](state), "x.ckpt")
    assert found.alphas_cumprod[-1] == 0
    assert torch.equal(found.betas, LatentDiffusion(**params).betas)


# The text encoder of version 2


@pytest.fixture(scope="module")
def second():
    found = LatentDiffusion(**families.params("v2"))
    golden.load_golden_weights(found)
    return found.eval().requires_grad_(False)


def test_version_2_with_names_of_transformers(second, tmp_path):
    from ldm.checkpoints.diffusers_format import CLIP_TEXT, OPEN_CLIP_TEXT, part
    from ldm.modules.encoders.names import open_clip_to_transformers

    state = second.state_dict()
    text = open_clip_to_transformers(part(state, OPEN_CLIP_TEXT))
    rest = {key: value for key, value in state.items() if not key.startswith(OPEN_CLIP_TEXT)}
    torch.save(
        {**rest, **{CLIP_TEXT + key: value for key, value in text.items()}}, tmp_path / "x.ckpt"
    )
    found = load_model(tmp_path / "x.ckpt", families.yaml(tmp_path, "v2"))
    expected = second.get_learned_conditioning(families.PROMPTS)
    assert torch.equal(found.get_learned_conditioning(families.PROMPTS), expected)


@pytest.mark.parametrize("layout", ["generative-models", "DDP", "three networks"])
def test_version_2_in_other_layouts(layout, second, tmp_path):
    state = {key: value.clone() for key, value in second.state_dict().items()}
    torch.save(LAYOUTS[layout](state), tmp_path / "x.ckpt")
    found = load_model(tmp_path / "x.ckpt", families.yaml(tmp_path, "v2"))
    assert same(dict(found.state_dict()), state)
