"""diffusers as the judge: what it computes with our exported folders, and what comes back from it.

With the environment variable FULL_SIZE set, Stable Diffusion 1 at its full size is judged, too (10
GB of memory):

    FULL_SIZE=1 python -m pytest tests/test_diffusers.py -k "full and not lora"
"""

import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.checkpoints.diffusers_format import to_diffusers
from ldm.checkpoints.families import CONFIGS
from ldm.checkpoints.lora import extract_lora, factors, lora_layers, merge_lora
from ldm.checkpoints.pipeline_folder import config_of_pipeline, read_pipeline, save_pipeline
from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import convert
from tests.support import golden
from tests.support.families import PROMPTS, noise, params
from tests.support.golden import rel

diffusers = pytest.importorskip("diffusers")

FAMILIES = [
    "v1",
    "v2",
    "v2-v",
    "v1-inpainting",
    "v2-inpainting",
    *["full-v1"] * bool(os.environ.get("FULL_SIZE")),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def ours(family):
    model = LatentDiffusion(**params(family))
    golden.load_golden_weights(model)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(ours, family, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "pipeline"
    save_pipeline(ours, params(family), path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_kind_of_pipeline(theirs, family):
    kind = "StableDiffusionInpaintPipeline" if "inpainting" in family else "StableDiffusionPipeline"
    assert type(theirs).__name__ == kind


def test_the_unet(ours, theirs):
    channels = ours.model.diffusion_model.in_channels
    width = ours.get_learned_conditioning(PROMPTS).shape[-1]
    x, context, t = noise(2, channels, 8, 8), noise(2, 77, width, seed=1), torch.tensor([3, 700])
    expected = theirs.unet(x, t, encoder_hidden_states=context).sample
    assert rel(ours.model.diffusion_model(x, t, context=context), expected) < 1e-4


def test_the_autoencoder(ours, theirs):
    x, z = noise(2, 3, 32, 32), noise(2, 4, 8, 8)
    assert rel(ours.encode_first_stage(x).mode(), theirs.vae.encode(x).latent_dist.mode()) < 1e-4
    expected = theirs.vae.decode(z / theirs.vae.config.scaling_factor).sample
    assert rel(ours.decode_first_stage(z), expected) < 1e-4


def test_tokens_and_text_encoder(ours, theirs):
    prompts = [*PROMPTS, "an Eiffel-Tower's 3 cafés, " * 30]
    tokens = theirs.tokenizer(
        prompts,
        padding="max_length",
        max_length=theirs.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    assert torch.equal(tokens, ours.cond_stage_model.tokenize(prompts))
    assert rel(ours.get_learned_conditioning(prompts), theirs.text_encoder(tokens)[0]) < 1e-4


def test_a_picture(ours, theirs, family):
    """The same DDIM image for the same noise."""
    x_T, side = noise(1, 4, 8, 8), 8 * ours.downsampling
    common = {
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "latents": x_T.clone(),
        "output_type": "pt",
    }
    c, uc = ours.get_learned_conditioning(PROMPTS[:1]), ours.get_learned_conditioning([""])
    if "inpainting" in family:
        image, mask = noise(1, 3, side, side, seed=3).clamp(-1, 1), torch.zeros(1, 1, side, side)
        mask[..., : side // 2] = 1
        # Their masked image is encoded with noise of a generator; here that generator is asked for
        # the same.
        masked = image * (mask < 0.5)
        generator = torch.Generator().manual_seed(7)
        latents = theirs.vae.encode(masked).latent_dist.sample(generator) * ours.scale_factor
        concat = torch.cat([torch.nn.functional.interpolate(mask, (8, 8)), latents], 1)
        c, uc = ({"c_concat": [concat], "c_crossattn": [text]} for text in (c, uc))
        found = theirs(PROMPTS[0], image=image, mask_image=mask, height=side, width=side, strength=1.0,
                       generator=torch.Generator().manual_seed(7), **common).images  # fmt: skip
    else:
        found = theirs(PROMPTS[0], height=side, width=side, **common).images
    samples, _ = DDIMSampler(ours).sample(
        5,
        1,
        (4, 8, 8),
        c,
        x_T=x_T,
        verbose=False,
        unconditional_guidance_scale=4.0,
        unconditional_conditioning=uc,
    )
    image = (ours.decode_first_stage(samples) / 2 + 0.5).clamp(0, 1)
    assert (image - found).abs().max() < 1e-4


def test_the_way_back(ours, folder, theirs, tmp_path):
    """From our folder and from the one that diffusers saves, bit for bit; what it does not read
    stays missing.
    """
    theirs.save_pretrained(tmp_path / "theirs")
    state = ours.state_dict()
    for path in (folder, tmp_path / "theirs"):
        found = read_pipeline(path, state)
        assert all(torch.equal(value, state[key]) for key, value in found.items())
        missing = {
            key for key in state if key.startswith(("model.", "first_stage", "cond_stage"))
        } - set(found)
        unread = [
            f"cond_stage_model.{key}" for key in getattr(ours.cond_stage_model, "optional_keys", ())
        ]
        assert all(key.endswith("position_ids") or key.startswith(tuple(unread)) for key in missing)


def test_a_folder_that_is_there(ours, family, folder):
    with pytest.raises(UserError, match="is there already"):
        save_pipeline(ours, params(family), folder)


def test_a_folder_that_is_no_pipeline(ours, tmp_path):
    with pytest.raises(UserError, match=r"not a diffusers pipeline: unet/ has no weights"):
        read_pipeline(tmp_path, ours.state_dict())


def test_the_command_both_ways(ours, family, folder, tmp_path):
    """From a pipeline to a file and to a pipeline again."""
    OmegaConf.save(
        {
            "model": {
                "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
                "params": params(family),
            }
        },
        tmp_path / "c.yaml",
    )
    file, again = tmp_path / "model.safetensors", tmp_path / "again"
    assert (
        convert.main(
            ["--ckpt", str(folder), "--config", str(tmp_path / "c.yaml"), "--output", str(file)]
        )
        == 0
    )
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in load_file(file).items())
    # The blocks of v2's text tower that nobody reads are not in a pipeline, and not missed.
    assert convert.main(["--ckpt", str(file), "--output", str(again)]) == 0
    for part in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        assert (again / f"{part}.safetensors").read_bytes() == (
            folder / f"{part}.safetensors"
        ).read_bytes()


def test_a_pipeline_without_a_config(folder, family, tmp_path, caplog):
    """Only the full-size ones are recognised."""
    if family == "full-v1":
        assert config_of_pipeline(folder) == CONFIGS / "v1-inference.yaml"
        return
    assert convert.main(["--ckpt", str(folder), "--output", str(tmp_path / "m.safetensors")]) == 1
    assert "give --config" in caplog.text
    assert (
        convert.main(
            ["--ckpt", str(folder), "--output", str(tmp_path / "m.safetensors"), "--keep_ema"]
        )
        == 1
    )
    assert "--keep_ema: is for checkpoint files" in caplog.text


# LoRA


@pytest.fixture
def tuned(ours):
    """The weights after a change of rank 2 in every layer that a LoRA can change: all but norms
    and embeddings.
    """
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    parts = to_diffusers(state)
    for part, key in lora_layers(parts):
        weight = parts[part][key]
        m, n = weight.flatten(1).shape
        change = torch.randn(m, 2, generator=random) @ torch.randn(2, n, generator=random)
        weight += 0.3 * change.reshape(weight.shape) / n**0.5
    return state


def test_an_exported_lora_changes_their_model_as_ours(ours, family, folder, tuned, tmp_path):
    pytest.importorskip("peft")
    path = tmp_path / "lora.safetensors"
    save_file(extract_lora(ours.state_dict(), tuned, rank=2), path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    changed = LatentDiffusion(**params(family)).requires_grad_(False)
    changed.load_state_dict(tuned, strict=False)
    channels = ours.model.diffusion_model.in_channels
    tokens = ours.cond_stage_model.tokenize(PROMPTS)
    context = pipeline.text_encoder(tokens)[0]
    assert rel(changed.get_learned_conditioning(PROMPTS), context) < 1e-3
    x, t = noise(2, channels, 8, 8), torch.tensor([3, 700])
    expected = pipeline.unet(x, t, encoder_hidden_states=context).sample
    found = changed.eval().model.diffusion_model(x, t, context=context)
    before = ours.model.diffusion_model(x, t, context=context)
    assert rel(found, expected) < 1e-3
    assert rel(before, expected) > 0.05


def test_merging_gives_the_tuned_weights_back(ours, tuned):
    lora = extract_lora(ours.state_dict(), tuned, rank=2)
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    assert merge_lora(state, lora) == len(lora) / 3
    for key, value in state.items():
        torch.testing.assert_close(value, tuned[key], atol=1e-5, rtol=1e-4)
    merge_lora(state, lora, strength=-1.0)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(state[key], ours.state_dict()[key], atol=1e-5, rtol=1e-4)


def test_the_nearest_matrix_of_a_rank():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    down, up = factors(matrix, 2)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    down, up = factors(matrix, 8)
    assert down.shape == (3, 3)


def test_a_lora_of_another_model(ours):
    state = ours.state_dict()
    strange = {f"lora_unet_x.lora_{way}.weight": torch.zeros(2, 2) for way in ("up", "down")}
    with pytest.raises(UserError, match="'lora_unet_x' of the LoRA is no layer"):
        merge_lora(state, strange)
    with pytest.raises(UserError, match="holds no `lora_up`"):
        merge_lora(state, {"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="rank 0"):
        extract_lora(state, state, 0)
