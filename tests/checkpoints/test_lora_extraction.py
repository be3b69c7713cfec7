"""Extracting a LoRA from two checkpoints, and the command that merges one."""

import json

import pytest
from safetensors.torch import load_file, save_file

from ldm.checkpoints.lora import extract_lora, merge_lora, not_in_lora
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import convert
from tests.support import golden
from tests.support.families import params
from tests.support.loras import BLOCK, UNET, assert_merged, copied, factors, product, written


@pytest.fixture(scope="module")
def state():
    """A small model's tensors."""
    model = LatentDiffusion(**params("v1"))
    golden.load_golden_weights(model)
    return dict(model.state_dict())


def test_an_extracted_lora_holds_every_layer_that_differs_and_no_other(state):
    tuned = copied(state)
    changed = [
        "out.2",
        "middle_block.1.proj_out",
        "input_blocks.3.0.op",
        f"middle_block.1.{BLOCK}.ff.net.2",
    ]
    for layer in changed:
        tuned[f"{UNET}{layer}.weight"] += product(*factors(tuned[f"{UNET}{layer}.weight"]))
    lora = extract_lora(state, tuned, rank=2)
    assert len(lora) == 3 * len(changed)
    found = copied(state)
    merge_lora(found, lora)
    assert_merged(found, state, {key: tuned[key] for key in tuned})
    assert not_in_lora(state, tuned) == []


def test_rounding_is_no_difference(state):
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    with pytest.raises(UserError, match="no layer differs between the two checkpoints"):
        extract_lora(state, half, 2)


def test_what_a_lora_cannot_hold_is_said(state, tmp_path, capsys):
    tuned = copied(state)
    lost = ["out.2.bias", "out.0.weight"]
    for key in [
        *(UNET + key for key in lost),
        f"{UNET}out.2.weight",
        "first_stage_model.decoder.conv_in.weight",
    ]:
        tuned[key] += 1
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tuned[embedding][7] += 1
    expected = [
        *(UNET + key for key in lost),
        "first_stage_model.decoder.conv_in.weight",
        embedding,
    ]
    assert sorted(not_in_lora(state, tuned)) == sorted(expected)
    save_file(state, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("tuned", "base", "lora")]
    flags = [
        text
        for pair in zip(("--ckpt", "--lora_base", "--output"), map(str, paths))
        for text in pair
    ]
    assert convert.main([*flags, "--rank", "2"]) == 0
    assert "4 tensors differ that a LoRA cannot hold" in capsys.readouterr().out
    assert len(load_file(paths[2])) == 3


def test_the_command_merges_a_folder_of_peft(state, tmp_path, capsys):
    save_file(state, tmp_path / "base.safetensors")
    tensors, expected = written(state, "peft")
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 2}))
    flags = ["--ckpt", str(tmp_path / "base.safetensors"), "--lora", str(tmp_path / "lora")]
    assert convert.main([*flags, "--output", str(tmp_path / "merged.safetensors")]) == 0
    assert f"{len(expected)} layers merged" in capsys.readouterr().out
    assert_merged(load_file(tmp_path / "merged.safetensors"), state, expected)
