"""What the miniature is pretrained with: CLIP, cached latents, whitening, conversion."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import main
from ldm.checkpoints.parts import load_part, load_parts
from ldm.checkpoints.reading import read_checkpoint
from ldm.data.latents import CachedLatents
from ldm.errors import UserError
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import tokenize
from ldm.tiny.clip import CLIP, OF_CLIP_ALONE, with_text_encoder
from ldm.training.prepare import encoder_of
from scripts import convert
from tests.support import runs
from tests.support.models import build
from tests.support.small_world import draw_sprites, trained, world

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP_PARAMS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": TEXT,
}
TEXT_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("sprites"))


# The objective's options


@pytest.mark.parametrize(
    "name, divisor", [("eps", lambda snr: snr), ("x0", lambda snr: 1), ("v", lambda snr: snr + 1)]
)
def test_min_snr_weights_are_those_of_the_clean_latent(name, divisor):
    schedule = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    t = torch.tensor([0, 200, 500, 999])
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    found = PARAMETERIZATIONS[name].min_snr_weight(schedule, t, 5.0)
    torch.testing.assert_close(found * divisor(snr), snr.clamp(max=5.0))


def batch(captions, seeds=None):
    images = torch.randn(
        len(captions), 16, 16, 3, generator=torch.Generator().manual_seed(0)
    ).clamp(-1, 1)
    return {
        "image": images,
        "caption": captions,
        "noise_seed": torch.tensor(seeds or list(range(len(captions)))),
    }


def test_min_snr_weights_the_loss_and_not_the_simple_loss():
    plain, weighted = build(), build(min_snr_gamma=5.0)
    examples = batch(["a dog"] * 12)
    (_, logged), (loss, logged_weighted) = (
        m.shared_step(examples, "val") for m in (plain, weighted)
    )
    assert logged["val/loss_simple"] == logged["val/loss"] == logged_weighted["val/loss_simple"]
    assert loss == logged_weighted["val/loss"] < logged["val/loss"]


def captions_read(model, examples, prefix, among):
    """The caption of each sample, of those `among`, whose embedding the UNet read."""
    with torch.no_grad():
        known = model.get_learned_conditioning(among)
    read = []
    apply_model = model.apply_model
    model.apply_model = lambda x, t, cond: read.append(cond.detach()) or apply_model(x, t, cond)
    model.shared_step(examples, prefix)
    model.apply_model = apply_model
    distances = (read[0][:, None] - known[None]).flatten(2).norm(dim=2)
    assert distances.amin(1).max() < 1e-4 < distances.sort(1).values[:, 1].min()
    return [among[index] for index in distances.argmin(1)]


def test_the_text_encoder_reads_each_distinct_caption_once():
    model, seen = build(), []
    model.get_learned_conditioning = lambda texts: (
        seen.append(list(texts)) or model.cond_stage_model(list(texts))
    )
    model.shared_step((batch(["a sks dog"] * 3), batch(["a dog", "a cat", "a dog"])), "train")
    assert seen == [["a sks dog", "a dog", "a cat"]]
    del model.get_learned_conditioning
    examples = batch(["a dog", "a cat", "a dog"])
    assert captions_read(model, examples, "train", ["a cat", "a dog"]) == [
        "a dog",
        "a cat",
        "a dog",
    ]


def test_caption_dropout_empties_the_same_captions_whatever_the_batch():
    model = build(caption_dropout=0.5)
    captions = [f"a dog {n}" for n in range(16)]
    among = ["", *captions]
    together = captions_read(model, batch(captions), "train", among)
    second_half = captions_read(
        model, batch(captions[8:], seeds=list(range(8, 16))), "train", among
    )
    validation = captions_read(model, batch(captions), "val", among)
    assert 2 <= together.count("") <= 14
    assert together[8:] == second_half
    assert all(text in ("", caption) for text, caption in zip(together, captions))
    assert validation == captions


def test_with_a_prior_only_its_captions_are_dropped():
    model = build(caption_dropout=1.0)
    pair = (batch(["a sks dog"] * 2), batch(["a dog"] * 2))
    assert captions_read(model, pair, "train", ["a sks dog", "a dog", ""]) == [
        "a sks dog",
        "a sks dog",
        "",
        "",
    ]


def test_caption_dropout_leaves_the_other_draws_as_they_are():
    with_dropout, without = build(caption_dropout=1.0), build()
    examples, empty = batch(["a dog", "a cat"]), batch(["", ""])
    assert with_dropout.shared_step(examples, "train")[0] == without.shared_step(empty, "train")[0]


@pytest.mark.parametrize(
    "wrong", [{"caption_dropout": 1.5}, {"ema_decay": -1.0}, {"min_snr_gamma": 0.0}]
)
def test_options_out_of_their_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(**wrong)


# CLIP


def test_clip_reads_only_what_its_captions_hold():
    torch.manual_seed(0)
    model = CLIP(**CLIP_PARAMS).eval()
    captions = ["a photo of a dog", "", "a red car with a mountain in the background"]
    expected = model.clip.encode_text(tokenize(captions), normalize=True)
    torch.testing.assert_close(model.encode_text(captions), expected)


def test_the_text_tower_is_the_text_encoder(tmp_path):
    torch.manual_seed(0)
    model = CLIP(**CLIP_PARAMS).eval()
    embedder = FrozenCLIPEmbedder(text_config=TEXT_FIELDS)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "clip.ckpt")
    report = load_part(embedder, tmp_path / "clip.ckpt")
    assert report.built == ["transformer.text_model.embeddings.position_ids"]
    assert not report.missing and not report.unexpected
    captions = ["a photo of a sks dog", ""]
    clip, tokens = model.clip, tokenize(captions)
    hidden = clip.transformer(
        clip.token_embedding(tokens) + clip.positional_embedding, attn_mask=clip.attn_mask
    )
    torch.testing.assert_close(embedder(captions), clip.ln_final(hidden))


def test_a_checkpoint_without_a_text_tower(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: no text tower"):
        load_parts(
            FrozenCLIPEmbedder(
                text_config=TEXT_FIELDS, ckpt_path=str(tmp_path / "other.safetensors")
            )
        )


def test_clip_trains_through_the_command(sprites, tmp_path):
    dataset = world(sprites, size=32)
    run = trained(tmp_path, "ldm.tiny.clip.CLIP", CLIP_PARAMS, dataset, batch_size=4, steps=2)
    checkpoint = run / "checkpoints" / "last.ckpt"

    tower = tmp_path / "tower.safetensors"
    assert (
        convert.main(["--ckpt", str(checkpoint), "--output", str(tower), "--only", "clip.visual."])
        == 0
    )
    assert all(key.startswith("clip.visual.") for key in load_file(tower))
    embedder = FrozenCLIPEmbedder(text_config=TEXT_FIELDS, ckpt_path=str(checkpoint))
    load_parts(embedder)
    learned = read_checkpoint(checkpoint)["state_dict"]["clip.token_embedding.weight"]
    assert torch.equal(embedder.transformer.text_model.embeddings.token_embedding.weight, learned)


def test_clip_learns_beside_a_text_encoder_that_stays(sprites, tmp_path):
    """The encoder of a diffusion model comes back bit for bit, and the rest learns."""
    torch.manual_seed(0)
    before = CLIP(**CLIP_PARAMS).state_dict()
    encoder = FrozenCLIPEmbedder(text_config=TEXT_FIELDS).state_dict()
    diffusion = {f"cond_stage_model.{key}": value for key, value in encoder.items()}
    start = with_text_encoder(before, diffusion)
    assert start.keys() == before.keys()
    save_file(start, tmp_path / "start.safetensors")
    params = {**CLIP_PARAMS, "freeze_text": True}
    more = ["--actual_resume", str(tmp_path / "start.safetensors")]
    dataset = world(sprites, size=32)
    run = trained(tmp_path, "ldm.tiny.clip.CLIP", params, dataset, 4, 2, more)
    learned = read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]
    for key, value in learned.items():
        stays = not key.startswith(OF_CLIP_ALONE)
        assert torch.equal(value, start[key]) == stays, key
    part = tmp_path / "part.safetensors"
    flags = ["--ckpt", str(run / "checkpoints/last.ckpt"), "--output", str(part)]
    assert convert.main([*flags, "--only", *OF_CLIP_ALONE]) == 0
    kept = load_file(part)
    assert kept.keys() == {key for key in learned if key.startswith(OF_CLIP_ALONE)}
    assert with_text_encoder(kept, diffusion).keys() == learned.keys()


# Cached latents


def cached_config(tmp_path, sprites, **params):
    """The micro run's config with the world's latents for data."""
    path = runs.config(tmp_path, data__params__batch_size=2, lightning__trainer__max_steps=3)
    config = OmegaConf.load(path)
    del config.data.params.reg
    config.model.params.reg_weight = 0
    config.data.params.train = {
        "target": "ldm.data.latents.CachedLatents",
        "params": {
            "path": str(tmp_path / "cache" / "latents.safetensors"),
            "dataset": world(sprites),
            **params,
        },
    }
    OmegaConf.save(config, path)
    return path


def test_training_on_cached_latents(sprites, tmp_path):
    base = cached_config(tmp_path, sprites)
    command = ["--base", str(base), "-t", "-l", str(tmp_path / "logs")]
    assert main.main([*command, "-n", "one"]) == 0
    cache = tmp_path / "cache" / "latents.safetensors"
    written = cache.stat().st_mtime_ns
    (first,) = tmp_path.glob("logs/*_one")

    # The same first stage reads the cache again.
    config = OmegaConf.load(base)
    weights = first / "checkpoints" / "last.ckpt"
    assert main.main([*command, "-n", "two", "--actual_resume", str(weights)]) == 0
    assert cache.stat().st_mtime_ns == written

    # Another data set does not.
    config.data.params.train.params.dataset.params.length = 4
    OmegaConf.save(config, base)
    assert main.main([*command, "-n", "three", "--actual_resume", str(weights)]) == 0
    assert len(load_file(cache)["moments"]) == 4


def test_the_cache_holds_the_posteriors_of_the_images(sprites, tmp_path):
    model = build()
    dataset = CachedLatents(tmp_path / "latents.safetensors", world(sprites))
    dataset.fill(encoder_of(model, torch.device("cpu")))
    dataset.open()
    source = dataset.source
    assert (len(dataset), dataset[3]["caption"]) == (6, source[3]["caption"])
    image = torch.as_tensor(source[3]["image"]).permute(2, 0, 1)[None]
    torch.testing.assert_close(
        dataset[3]["moments"].float(),
        model.encode_first_stage(image).parameters[0],
        atol=2e-3,
        rtol=2e-3,
    )
    # A step on the cache and one on the images have about the same loss.
    images = {"image": torch.stack([torch.as_tensor(source[i]["image"]) for i in range(2)])}
    moments = {"moments": torch.stack([dataset[i]["moments"] for i in range(2)])}
    shared = {"caption": dataset.captions[:2], "noise_seed": torch.tensor([5, 6])}
    losses = [model.shared_step({**half, **shared}, "val")[0] for half in (images, moments)]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    assert set(model.log_images({**moments, **shared}, sample=False)) == {"reconstruction"}


def test_a_cache_of_some_classes(sprites, tmp_path):
    path, config = tmp_path / "latents.safetensors", world(sprites, length=20)
    full = CachedLatents(path, config)
    full.fill(encoder_of(build(), torch.device("cpu")))
    dogs = CachedLatents(path, config, classes=["dog"])
    dogs.open()
    assert 0 < len(dogs) < 20 and all("dog" in caption for caption in dogs.captions)
    with pytest.raises(UserError, match="no examples of unicorn"):
        CachedLatents(path, config, classes=["unicorn"]).open()


def test_a_file_that_is_no_cache(sprites, tmp_path):
    path = tmp_path / "latents.safetensors"
    with pytest.raises(UserError, match="is gone"):
        CachedLatents(path, world(sprites)).fill(None)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a latent cache"):
        CachedLatents(path, world(sprites)).open()
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a latent cache"):
        CachedLatents(path, world(sprites)).open()
