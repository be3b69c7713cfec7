"""LoRA files as other programs write them: each is merged as its own program would, or refused
by its name.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.lora import extract_lora, merge_lora, not_in_lora
from ldm.checkpoints.lora_formats import read_lora
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import convert
from tests.support import golden
from tests.support.families import params

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model.encoder.layers.0."
BLOCK = "transformer_blocks.0"
# Our layer -> diffusers' name. One of every kind that has a name of its own.
ATTENTION = {
    f"input_blocks.1.1.{BLOCK}.attn1.to_q": f"down_blocks.0.attentions.0.{BLOCK}.attn1.to_q",
    f"middle_block.1.{BLOCK}.attn2.to_out.0": f"mid_block.attentions.0.{BLOCK}.attn2.to_out.0",
    f"output_blocks.3.1.{BLOCK}.attn2.to_v": f"up_blocks.1.attentions.0.{BLOCK}.attn2.to_v",
}
OTHERS = {
    f"output_blocks.1.1.{BLOCK}.ff.net.0.proj": f"up_blocks.0.attentions.1.{BLOCK}.ff.net.0.proj",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.0.0.skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "input_blocks.4.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.2": "time_embedding.linear_2",
}
TEXT_LAYERS = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]
OLD_TEXT = {"self_attn.q_proj": "self_attn.to_q", "self_attn.out_proj": "self_attn.to_out"}
THEIR_TEXT = "text_model.encoder.layers.0."


def underscored(name):
    return name.replace(".", "_")


def old_processor(name):
    """diffusers' first name of an attention layer's adapter."""
    head, layer = name.removesuffix(".0").rsplit(".", 1)
    return f"{head}.processor.{layer}_lora"


def spelled(unet, text, down, up, layers=ATTENTION | OTHERS, text_layers=TEXT_LAYERS):
    """A program's names: those of the layers from ours and diffusers', and of the factors."""
    names = {f"{UNET}{ours}.weight": unet(ours, theirs) for ours, theirs in layers.items()}
    names |= {f"{TEXT}{layer}.weight": text(layer) for layer in text_layers}
    return names, down, up


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
PROGRAMS = {
    "sd-scripts": spelled(
        lambda ours, theirs: "lora_unet_" + underscored(theirs),
        lambda text: "lora_te_" + underscored(THEIR_TEXT + text),
        *KOHYA,
    ),
    "sd-scripts with LDM's names": spelled(
        lambda ours, theirs: "lora_unet_" + underscored(ours),
        lambda text: "lora_te_" + underscored(THEIR_TEXT + text),
        *KOHYA,
    ),
    "diffusers' processors": spelled(
        lambda ours, theirs: "unet." + old_processor(theirs),
        lambda text: f"text_encoder.{THEIR_TEXT}{OLD_TEXT[text]}_lora",
        ".down.weight",
        ".up.weight",
        ATTENTION,
        list(OLD_TEXT),
    ),
    "diffusers' processors of a UNet alone": spelled(
        lambda ours, theirs: old_processor(theirs),
        lambda text: "",
        ".down.weight",
        ".up.weight",
        ATTENTION,
        [],
    ),
    "diffusers": spelled(
        lambda ours, theirs: f"unet.{theirs}.lora",
        lambda text: f"text_encoder.{THEIR_TEXT}{text}.lora_linear_layer",
        ".down.weight",
        ".up.weight",
    ),
    "diffusers with peft's names": spelled(
        lambda ours, theirs: f"unet.{theirs}",
        lambda text: f"text_encoder.{THEIR_TEXT}{text}",
        *PEFT,
    ),
    "diffusers with transformers 5": spelled(
        lambda ours, theirs: f"unet.{theirs}",
        lambda text: f"text_encoder.{THEIR_TEXT[11:]}{text}",
        *PEFT,
    ),
    "peft": spelled(
        lambda ours, theirs: f"base_model.model.{theirs}",
        lambda text: f"base_model.model.{THEIR_TEXT}{text}",
        *PEFT,
    ),
    "peft in memory": spelled(
        lambda ours, theirs: f"base_model.model.unet.{theirs}",
        lambda text: f"base_model.model.text_encoder.{THEIR_TEXT}{text}",
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
    "ComfyUI": spelled(
        lambda ours, theirs: f"diffusion_model.{ours}", lambda text: "", *PEFT, text_layers=[]
    ),
}


@pytest.fixture(scope="module")
def state():
    """A small model's tensors."""
    model = LatentDiffusion(**params("v1"))
    golden.load_golden_weights(model)
    return dict(model.state_dict())


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def factors(weight, rank=2, seed=0):
    """Random factors of a difference, as programs write them: a convolution's `up` is one of
    1x1.
    """
    random = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, *weight.shape[1:]), generator=random)
    up = torch.randn((len(weight), rank, *[1] * (weight.ndim - 2)), generator=random)
    return down, up


def product(down, up):
    return torch.einsum("mr,rn->mn", up.flatten(1), down.flatten(1)).reshape(
        len(up), *down.shape[1:]
    )


def written(state, program, alpha=None):
    """A program's file with a difference of every layer that it names; what each layer's weight
    becomes.
    """
    names, down_end, up_end = PROGRAMS[program]
    tensors, expected = {}, {}
    for number, (key, name) in enumerate(names.items()):
        down, up = factors(state[key], seed=number)
        tensors |= {name + down_end: down, name + up_end: up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        expected[key] = state[key] + product(down, up) * (1.0 if alpha is None else alpha / 2)
    return tensors, expected


def assert_merged(found, state, expected):
    for key, value in found.items():
        torch.testing.assert_close(value, expected.get(key, state[key]), atol=1e-5, rtol=1e-5)


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


# ---- extraction
# -----------------------------------------------------------------------------------------------


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
