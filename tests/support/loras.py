"""LoRA files as other programs write them, and what merging them must give."""

import torch

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
