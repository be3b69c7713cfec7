"""The training of inpainting models: their masks, their loss, and what they start from."""

import pytest
import torch
import torch.nn.functional as F

import main
from ldm.callbacks.fixed_loss import FixedLoss
from ldm.checkpoints.families import FIRST, widened
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.inpainting import SHAPES, RandomMasks, inpaints, masked_channels
from ldm.rng import SampleRandom, derive_seed
from ldm.sampling.text_to_image import Recipe, text_to_image
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.support import golden
from tests.support.golden import rel
from tests.support.models import SIZE, batch, build, gradients, in_float64, step
from tests.support.runs import Workspace, checkpoint

NINE = ["model.params.conditioning_key=hybrid", "model.params.unet_config.params.in_channels=9"]


@pytest.fixture(scope="module")
def model():
    """Nine input channels; tests must leave its weights as they are."""
    return build({"in_channels": 9, "use_checkpoint": False}, conditioning_key="hybrid")


# Masks


def test_a_mask_is_a_function_of_its_seed():
    masks = RandomMasks()
    together = masks.draw([7, 8, 9], 3, 16, 24)
    assert together.shape == (3, 1, 16, 24)
    assert torch.equal(masks.draw(torch.tensor([9, 7]), 2, 16, 24), together[[2, 0]])
    torch.manual_seed(0)
    first = masks.draw(None, 8, 16, 24)
    assert not torch.equal(first, masks.draw(None, 8, 16, 24))
    torch.manual_seed(0)
    assert torch.equal(first, masks.draw(None, 8, 16, 24))


def test_masks_are_shapes_and_the_given_share_hides_everything():
    masks = RandomMasks().draw(range(400), 400, 32, 32)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    covered = masks.mean(dim=(1, 2, 3))
    assert (covered > 0).all()
    assert (covered == 1).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert covered[covered < 1].std() > 0.1
    assert (RandomMasks(1.0).draw([1, 2], 2, 8, 8) == 1).all()
    assert RandomMasks(0.0).draw(range(50), 50, 1, 1).shape == (50, 1, 1, 1)
    with pytest.raises(UserError, match="mask_everything: expected a share from 0 to 1, got 2"):
        LatentDiffusion(**{**golden.CONFIG, "mask_everything": 2})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_each_shape_leaves_something_to_see(shape, monkeypatch):
    monkeypatch.setattr("ldm.models.diffusion.inpainting.SHAPES", (shape,))
    covered = RandomMasks(0.0).draw(range(40), 40, 32, 32).mean(dim=(1, 2, 3))
    assert ((covered > 0) & (covered < 1)).all()


# The loss


def test_what_the_unet_reads_beside_the_latent(model):
    images = SampleRandom([1, 2]).randn((2, 3, SIZE, SIZE)).clamp(-1, 1)
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[..., : SIZE // 2] = 1
    channels = masked_channels(model, images, masks)
    side = SIZE // model.downsampling
    assert channels.shape == (2, 5, side, side)
    assert torch.equal(channels[:, :1], F.interpolate(masks, (side, side)))
    # What is hidden does not matter, and what is seen does.
    other = masked_channels(model, torch.where(masks > 0, -images, images), masks)
    assert torch.equal(other, channels)
    assert not torch.equal(masked_channels(model, images, 1 - masks), channels)
    z = model.get_first_stage_encoding(model.encode_first_stage(images * (1 - masks)).mode())
    assert torch.equal(channels[:, 1:], z)


def plain_loss(model, entries):
    """The published loss of one part in plain PyTorch, drawn as the training draws."""
    images, seeds = entries["image"].permute(0, 3, 1, 2), entries["noise_seed"]
    vae, scale, count = model.first_stage_model, model.scale_factor, len(seeds)
    masks = torch.cat([RandomMasks().draw([seed], 1, SIZE, SIZE) for seed in seeds])

    def latent(pictures, eps):
        with torch.no_grad():
            mean, logvar = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)
        return scale * (mean + torch.exp(logvar.clamp(-30, 20) / 2) * eps)

    shape = (count, 4, SIZE // model.downsampling, SIZE // model.downsampling)
    random = SampleRandom(seeds)
    z = latent(images, random.randn(shape))
    t, noise = random.randint(1000, count), random.randn(shape)
    hidden = SampleRandom([derive_seed("masked image", seed) for seed in seeds]).randn(shape)
    acp = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    seen = latent(images * (1 - masks), hidden)
    inputs = torch.cat(
        [acp.sqrt() * z + (1 - acp).sqrt() * noise, F.interpolate(masks, shape[2:]), seen], dim=1
    )
    text = model.cond_stage_model(entries["caption"])
    output = model.model.diffusion_model(inputs, t, context=text)
    return ((output - noise) ** 2).mean()  # over all of the latent, hidden or not


def test_loss_and_gradients_are_those_of_plain_pytorch(monkeypatch):
    unet = {"in_channels": 9, "use_checkpoint": False}
    model = in_float64(build(unet, conditioning_key="hybrid"), monkeypatch)
    parts = batch(1, 2), batch(3, 4, caption="photo of a dog")
    for part in parts:
        part["image"] = part["image"].double()
    loss, logged = step(model, *parts)
    subject, prior = (plain_loss(model, part) for part in parts)
    assert rel(loss, subject + prior) < 1e-9
    assert logged["train/loss"].item() == pytest.approx(subject.item(), rel=1e-9)
    assert logged["train/loss_prior"].item() == pytest.approx(prior.item(), rel=1e-9)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = [model.get_parameter(name) for name in names]
    ours = torch.autograd.grad(loss, trained)
    theirs = torch.autograd.grad(subject + prior, trained)
    for name, gradient, expected in zip(names, ours, theirs):
        # That of a bias before a norm is 0 but for rounding.
        allowed = 1e-6 * expected.abs().max().clamp(min=1e-9)
        assert (gradient - expected).abs().max() < allowed, name


def test_a_mask_changes_the_loss_and_a_resumed_step_draws_it_again(model):
    (first, _), (again, _) = step(model, batch(1)), step(model, batch(1))
    assert torch.equal(first, again)
    model.random_masks = RandomMasks(1.0)
    try:
        assert not torch.equal(step(model, batch(1))[0], first)
    finally:
        model.random_masks = RandomMasks()


def test_cached_latents_are_refused(model, tmp_path, caplog):
    moments = {"moments": torch.zeros(1, 8, 8, 8), "caption": ["a dog"], "noise_seed": [1]}
    with pytest.raises(UserError, match="trains on images, not on cached latents"):
        step(model, moments)
    workspace = Workspace(tmp_path)
    assert main.main(workspace.arguments("cached", *NINE, "data.params.latent_cache=true")) == 1
    assert "data.params.latent_cache: an inpainting model encodes each image anew" in caplog.text


def test_other_numbers_of_channels_are_refused():
    model = build({"in_channels": 5}, conditioning_key="hybrid")  # as models of depth have
    with pytest.raises(UserError, match="reads 5 channels, and one that inpaints 9"):
        step(model, batch(1))


# What is shown of it


def test_pictures_of_a_training_show_what_is_hidden(model):
    pictures = model.log_images(batch(1, 2), ddim_steps=2)
    assert set(pictures) == {"inputs", "masked", "reconstruction", "samples"}
    assert not torch.equal(pictures["masked"], pictures["reconstruction"])


def test_the_fixed_loss_sees_the_masks_and_is_the_same_again(model):
    class Photos(torch.utils.data.Dataset):
        n_images = 2

        def __len__(self):
            return 2

        def __getitem__(self, index):
            found = batch(index)
            return {"image": found["image"][0], "caption": found["caption"][0]}

    losses = [FixedLoss(examples=2, time_steps=2).losses(model, {"train": Photos()}) for _ in "ab"]
    assert losses[0] == losses[1] and set(losses[0]) == {"subject"}


def test_a_picture_of_a_text_alone_is_painted_where_all_is_hidden(model):
    recipe = Recipe(steps=2, scale=3.0, height=SIZE, width=SIZE)
    first, again = (text_to_image(model, ["a dog"], [1], recipe)[0] for _ in "ab")
    assert first.size == (SIZE, SIZE) and first.tobytes() == again.tobytes()


# What it starts from


def test_a_widened_model_computes_what_the_plain_one_does(model):
    plain = build()
    wide = build({"in_channels": 9}, conditioning_key="hybrid")
    wide.load_state_dict(widened(plain.state_dict(), 9))
    assert not inpaints(plain) and inpaints(wide)
    loss, grads = gradients(wide)
    expected, theirs = gradients(plain)
    assert rel(loss, expected) < 1e-6
    name = FIRST
    assert rel(grads[name][:, :4], theirs[name]) < 1e-5
    assert all(grads[name][:, channel].abs().max() > 0 for channel in range(4, 9))
    both = {FIRST: torch.ones(2, 4, 1, 1), "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2, 4, 1, 1)}  # fmt: skip
    assert [value.shape[1] for value in widened(both, 9).values()] == [9, 9]


def test_an_inpainting_run_starts_from_a_plain_model(tmp_path, caplog):
    caplog.set_level("INFO")
    workspace = Workspace(tmp_path)
    plain = workspace.train("plain", "--max_steps", "1")
    weights = str(plain / "checkpoints" / "last.ckpt")
    more = [*NINE, "--actual_resume", weights, "--max_steps", "2"]
    run = workspace.train("wide", *more)
    assert "reads 4 channels; 5 more start from 0" in caplog.text
    state = checkpoint(run)["state_dict"]
    assert state[FIRST].shape[1] == 9 and (state[FIRST][:, 4:] != 0).any()
    arguments = workspace.arguments("lora", *more, "model.params.lora={rank: 2}")
    assert main.main([*arguments, "model.params.use_ema=false"]) == 1
    assert "start a lora from an inpainting model" in caplog.text


def test_ldms_name_and_keys_are_known():
    target = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    assert get_obj_from_str(target) is LatentDiffusion
    of_ldm = {"concat_keys": ["mask", "masked_image"], "finetune_keys": None}
    unet = golden.CONFIG["unet_config"]
    unet = {**unet, "params": {**unet["params"], "in_channels": 9}}
    text = {**golden.CONFIG["cond_stage_config"], "params": {"text_config": golden.TEXT_CONFIG}}
    params = {**golden.CONFIG, **of_ldm, "conditioning_key": "hybrid", "unet_config": unet, "cond_stage_config": text}  # fmt: skip
    with torch.device("meta"):
        assert inpaints(instantiate_from_config({"target": target, "params": params}))
