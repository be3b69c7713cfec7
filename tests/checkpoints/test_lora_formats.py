"""LoRA files as other programs write them: each is merged as its own program would, or refused
by its name.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.lora import merge_lora
from ldm.checkpoints.lora_formats import read_lora
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.support import golden
from tests.support.families import params
from tests.support.loras import (
    ATTENTION,
    BLOCK,
    PROGRAMS,
    TEXT,
    THEIR_TEXT,
    UNET,
    assert_merged,
    copied,
    factors,
    product,
    underscored,
    written,
)


@pytest.fixture(scope="module")
def state():
    """A small model's tensors."""
    model = LatentDiffusion(**params("v1"))
    golden.load_golden_weights(model)
    return dict(model.state_dict())


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_programs_names(state, program, alpha):
    tensors, expected = written(state, program, alpha)
    found = copied(state)
    assert merge_lora(found, tensors) == len(expected)
    assert_merged(found, state, expected)


def test_a_convolution_split_into_three(state):
    """LyCORIS' LoCon with `use_tucker`: 1x1 down, 3x3 between, 1x1 up."""
    key = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    random = torch.Generator().manual_seed(0)
    m, n = state[key].shape[:2]
    shapes = {"down": (2, n, 1, 1), "mid": (2, 2, 3, 3), "up": (m, 2, 1, 1)}
    parts = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.lora_{part}.weight": value for part, value in parts.items()}
    found = copied(state)
    merge_lora(found, tensors)
    # What three convolutions in a row do to an image is what the merged one adds.
    image = torch.randn(1, n, 5, 5, generator=random)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(image, parts["down"]), parts["mid"], padding=1), parts["up"])
    torch.testing.assert_close(
        conv(image, found[key] - state[key], padding=1), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    "layer, reshaped", [("middle_block.1.proj_in", (2, 64)), ("time_embed.2", (2, 128, 1, 1))]
)
def test_a_linear_layer_is_a_convolution_of_one_pixel(state, layer, reshaped):
    key = f"{UNET}{layer}.weight"
    down, up = factors(state[key].flatten(1))
    tensors = {f"diffusion_model.{layer}.lora_A.weight": down.reshape(reshaped)}
    tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
    found = copied(state)
    merge_lora(found, tensors)
    change = (found[key] - state[key]).flatten(1)
    torch.testing.assert_close(change, up @ down, atol=1e-5, rtol=1e-5)


def test_the_text_encoder_of_stable_diffusion_2():
    """open_clip keeps q, k and v in one matrix; the layer that SD 2 does not read may be in a
    file, too.
    """
    model = LatentDiffusion(**params("v2"))
    golden.load_golden_weights(model)
    state, found = dict(model.state_dict()), copied(model.state_dict())
    key = "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight"
    down, up = factors(torch.zeros(64, 64))
    name = "lora_te_text_model_encoder_layers_2_self_attn_v_proj"
    merge_lora(found, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    torch.testing.assert_close(found[key][128:], state[key][128:] + up @ down)
    assert torch.equal(found[key][:128], state[key][:128])


def test_half_precision_weights_are_added_in_full(state):
    key = f"{UNET}time_embed.2.weight"
    half = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    down, up = factors(state[key])
    name = "lora_unet_time_embedding_linear_2"
    merge_lora(half, {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()})
    expected = state[key].half().float() + product(down.half().float(), up.half().float())
    assert torch.equal(half[key], expected.half())


# ---- scales that stand beside the tensors
# ---------------------------------------------------------------------


@pytest.mark.parametrize("config, scale", [
    ({"r": 2, "lora_alpha": 8}, 4.0),
    ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
    ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 6}}, 3.0),
    ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"o_q": 6}}, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_peft(state, tmp_path, config, scale, suffix):
    ours, theirs = next(iter(ATTENTION.items()))
    key = f"{UNET}{ours}.weight"
    down, up = factors(state[key])
    name = f"base_model.model.{theirs}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    file = tmp_path / f"adapter_model.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    for path in (tmp_path, file):
        found = copied(state)
        assert merge_lora(found, read_lora(path)) == 1
        assert_merged(found, state, {key: state[key] + scale * product(down, up)})


def test_a_folder_with_both_networks_of_peft(state, tmp_path):
    """As peft's example of DreamBooth writes it: a folder each, whose names do not say the
    network.
    """
    text, unet = f"{TEXT}mlp.fc1.weight", f"{UNET}time_embed.2.weight"
    expected = {}
    for folder, key, name in (
        ("unet", unet, "time_embedding.linear_2"),
        ("text_encoder", text, THEIR_TEXT + "mlp.fc1"),
    ):
        down, up = factors(state[key])
        (tmp_path / folder).mkdir()
        tensors = {
            f"base_model.model.{name}.lora_{ab}.weight": value
            for ab, value in zip("AB", (down, up))
        }
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(
            json.dumps({"lora_alpha": 4, "r": 2})
        )
        expected[key] = state[key] + 2 * product(down, up)
    found = copied(state)
    assert merge_lora(found, read_lora(tmp_path)) == 2
    assert_merged(found, state, expected)


def test_the_scale_in_the_header_of_diffusers(state, tmp_path):
    tensors, _ = written(state, "diffusers with peft's names")
    header = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    plain, found = copied(state), copied(state)
    merge_lora(plain, tensors)
    merge_lora(found, read_lora(tmp_path))
    for key in (f"{UNET}time_embed.2.weight", f"{TEXT}mlp.fc1.weight"):
        scale = 3.0 if key.startswith(UNET) else 0.5
        torch.testing.assert_close(
            found[key] - state[key], scale * (plain[key] - state[key]), atol=1e-5, rtol=1e-4
        )


def test_a_scale_that_nothing_says_is_said(state, tmp_path, caplog):
    tensors, expected = written(state, "peft")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = copied(state)
    merge_lora(found, read_lora(tmp_path))
    assert_merged(found, state, expected)
    assert "no adapter_config.json beside it says the scale" in caplog.text


# ---- what is not read
# -----------------------------------------------------------------------------------------

KINDS = {
    "lora_unet_x.hada_w1_a": "a LoHa",
    "lora_unet_x.hada_t1": "a LoHa",
    "lora_unet_x.lokr_w1": "a LoKr",
    "lora_unet_x.dora_scale": "a DoRA",
    "base_model.model.x.lora_magnitude_vector": "a DoRA",
    "lora_unet_x.on_input": r"an \(IA\)3",
    "base_model.model.x.ia3_l": r"an \(IA\)3",
    "lora_unet_x.oft_diag": "an OFT",
    "lora_unet_x.oft_blocks": "an OFT",
    "base_model.model.x.boft_R.default": "an OFT",
    "lora_unet_x.a1.weight": "a GLoRA",
    "lora_unet_x.w_norm": "a LyCORIS file with differences of norms",
    "lora_unet_x.diff": "a LyCORIS file with differences of whole layers",
    "lora_unet_x.diff_b": "a LyCORIS file with differences of whole layers",
    "bundle_emb.dog.string_to_param.*": "a LoRA with embeddings inside",
    "base_model.model.x.lora_embedding_A": "a LoRA of token embeddings",
    "base_model.model.x.lora_B.bias": "a LoRA with trained layers or biases",
    "base_model.model.x.modules_to_save.weight": "a LoRA with trained layers or biases",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "a LoRA of Stable Diffusion XL",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "a LoRA of Stable Diffusion XL",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "a LoRA of Flux or SD 3",
    "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": "a LoRA of Flux or SD 3",
    "unet:0:up": "a LoRA of cloneofsimo/lora",
    "model.diffusion_model.x.base_layer.weight": "a LoRA run's checkpoint",
}


@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_named_and_nothing_is_merged(state, key):
    tensors, _ = written(state, "sd-scripts")
    found = copied(state)
    with pytest.raises(
        UserError, match=rf"x\.safetensors: {KINDS[key]} \('.*'\), which is not read: \w+"
    ):
        merge_lora(found, {**tensors, key: torch.zeros(2, 2)}, path="x.safetensors")
    assert_merged(found, state, {})


@pytest.mark.parametrize("change, message", [
    ({"lora_unet_time_embed_2.gate": torch.zeros(1)}, "keys are of no kind that is read, first "
                                                      "'lora_unet_time"),
    ({"lora_unet_y.lora_up.weight": torch.zeros(2, 2)}, "'lora_unet_y' has no down: the file "
                                                        "is not whole"),
    ({"lora_unet_y.alpha": torch.tensor(1.0)}, "1 keys are of no kind that is read, first "
                                               "'lora_unet_y.alpha'"),
    ({"lora_unet_conv_in.lora_up.weight": torch.zeros(32, 3, 1, 1)}, "its factors do not fit "
                                                                     "together: down"),
    ({"lora_unet_conv_in.lora_up.weight": torch.zeros(31, 2, 1, 1)}, r"no layer of this model: it "
                                                                     r"is \[31, 4, 3, 3\]"),
    ({"lora_unet_conv_in.lora_up.weight": torch.full((32, 2, 1, 1), torch.nan)}, "has values that are not finite"),
    ({"lora_unet_input_blocks_0_0.lora_down.weight": torch.zeros(2, 4, 3, 3),
      "lora_unet_input_blocks_0_0.lora_up.weight": torch.zeros(32, 2, 1, 1)}, "two differences of one layer"),
    ({f"lora_unet_input_blocks_8_1_{underscored(BLOCK)}_attn2_to_k.lora_{way}.weight": torch.zeros(shape)
      for way, shape in (("down", (2, 2048)), ("up", (64, 2)))},
     r"is no layer of this model \(the file is for Stable Diffusion XL\)"),
])  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(state, change, message):
    tensors, _ = written(state, "sd-scripts")
    if "XL" in message:
        tensors = {}
    found = copied(state)
    with pytest.raises(UserError, match=message):
        merge_lora(found, {**tensors, **change})
    assert_merged(found, state, {})


def test_a_lora_whose_alphas_are_zero_is_refused(state):
    """It would be merged without effect."""
    tensors, _ = written(state, "sd-scripts")
    downs = [key for key in tensors if key.endswith(".lora_down.weight")]
    alphas = {key.replace("lora_down.weight", "alpha"): torch.zeros(()) for key in downs}
    with pytest.raises(UserError, match=r"x: alpha is 0 in every layer"):
        merge_lora(copied(state), tensors | alphas, path="x")


@pytest.mark.parametrize("config, message", [
    ({"peft_type": "LOHA"}, "peft_type LOHA, which is not read"),
    ({"peft_type": "LORA", "use_dora": True}, "use_dora: True, which is not read"),
    ({"modules_to_save": ["conv_in"]}, r"modules_to_save: \['conv_in'\], which is not read"),
])  # fmt: skip
def test_other_kinds_of_peft_are_named(state, tmp_path, config, message):
    tensors, _ = written(state, "peft")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path)


def test_folders_and_files_without_a_lora(state, tmp_path):
    with pytest.raises(
        UserError, match=r"a folder without LoRA weights: expected adapter_model\.safetensors or"
    ):
        read_lora(tmp_path)
    with pytest.raises(UserError, match="a whole model; it holds no `lora_up` and `lora_down`"):
        merge_lora(copied(state), state)
