"""From prompts and a recipe to embeddings and guidance; the weaker model that guides a tuned one."""

from argparse import ArgumentParser

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.guidance import Guidance, Interval, Projection, Rescale
from ldm.sampling import flags, text_to_image
from ldm.sampling.prompting import guidance_of, read_prompts
from ldm.sampling.text_to_image import Recipe, guide_of, load_guide
from tests.support.models import build

LONG = "dog " * 100


@pytest.fixture(scope="module")
def model():
    return build(use_ema=False).eval().requires_grad_(False)


@pytest.fixture
def base(monkeypatch):
    """Make a base model, which every name of a checkpoint means; its weights are the model's + 1."""

    def make(**params):
        found = build(**{"use_ema": False, **params}).eval().requires_grad_(False)
        for part in (found.model, found.cond_stage_model):
            for parameter in part.parameters():
                parameter += 1
        monkeypatch.setattr(text_to_image, "load_model", lambda *_, **__: found)
        load_guide.cache_clear()
        return found

    yield make
    load_guide.cache_clear()


# Texts


def test_without_weighting_prompts_are_read_as_they_are(model):
    texts = read_prompts(model, ["a (red:2) dog"], "[blue]", Recipe())
    assert torch.equal(texts.cond, model.get_learned_conditioning(["a (red:2) dog"]))
    assert torch.equal(texts.uncond, model.get_learned_conditioning(["[blue]"]))
    assert texts.guidance == Guidance()


def test_weighted_prompts_and_negative_prompts_are_of_one_length(model):
    recipe = Recipe(weighting="a1111")
    texts = read_prompts(model, ["a dog", LONG], "(blue:2)", recipe)
    assert texts.cond.shape == texts.uncond.shape == (2, 154, 32)
    blue = read_prompts(model, ["(blue:2)"], "", recipe).cond
    assert torch.equal(texts.uncond[0], torch.cat([blue[0], blue[0]]))
    assert not torch.allclose(blue, model.get_learned_conditioning(["blue"]), atol=1e-2)


def test_without_guidance_no_negative_prompt_is_read(model):
    assert read_prompts(model, ["a dog"], "blue", Recipe(scale=1.0)).uncond is None


def test_an_unknown_weighting_is_refused(model):
    with pytest.raises(UserError, match="unknown 'compel'; accepted: a1111"):
        read_prompts(model, ["a dog"], "", Recipe(weighting="compel"))


# The weaker model


def weights(model):
    return {name: p.clone() for name, p in model.model.named_parameters()}


def test_the_guide_is_the_base_model_or_between_the_two(model, base):
    base_weights = weights(base())
    half = weights(load_guide(model, "base.ckpt", 0.25))
    for name, tuned in model.model.named_parameters():
        torch.testing.assert_close(half[name], 0.75 * base_weights[name] + 0.25 * tuned)
    base()
    for name, found in weights(load_guide(model, "base.ckpt", 0.0)).items():
        assert torch.equal(found, base_weights[name])


def test_the_guide_reads_the_negative_prompt_itself(model, base):
    found = base()
    recipe = Recipe(guide_ckpt="base.ckpt")
    texts = read_prompts(model, ["a dog"], "blue", recipe, guide_of(model, recipe))
    assert torch.equal(texts.uncond, found.get_learned_conditioning(["blue"]))
    assert torch.equal(texts.cond, model.get_learned_conditioning(["a dog"]))
    assert texts.guidance.weak == found.apply_model


def test_without_guidance_no_guide_is_loaded(model):
    assert guide_of(model, Recipe(scale=1.0, guide_ckpt="none.ckpt")) is None
    assert guide_of(model, Recipe()) is None


@pytest.mark.parametrize(
    "params, problem",
    [
        ({"parameterization": "v"}, "predicts v, not eps"),
        ({"linear_end": 0.02}, "has another noise schedule"),
        ({"unet": {"channel_mult": [1, 2, 2]}}, r"has another model\."),
    ],
)
def test_a_guide_of_another_kind_is_refused(model, base, params, problem):
    base(**params)
    with pytest.raises(UserError, match=rf"guide base\.ckpt: {problem}"):
        load_guide(model, "base.ckpt", 0.5)


# Recipes and flags


def test_a_recipe_says_all_of_its_guidance():
    recipe = Recipe(rescale=0.7, interval=[0.3, 5.0], apg=[0.5])
    assert recipe.apg == (0.5, 7.5, -0.75) and hash(recipe)
    expected = Guidance(Rescale(0.7), Interval(0.3, 5.0), Projection(0.5, 7.5, -0.75))
    assert guidance_of(recipe) == expected
    assert guidance_of(Recipe()) == Guidance()


def parsed(*arguments):
    parser = ArgumentParser()
    flags.add_prompt_flags(parser)
    flags.add_recipe_flags(parser)
    return flags.parse(parser, arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rescale 2", "rescale: expected a number from 0 to 1"),
        ("--interval 5 1", "expected 0 <= low < high, got 5 1"),
        ("--apg 0 -1", "norm must be at least 0"),
        ("--apg 0 1 0 3", "at most ETA NORM MOMENTUM, got 4 numbers"),
        ("--apg --scale 1", "--scale 1 is no guidance"),
        ("--guide_ckpt none.ckpt", "--guide_ckpt none.ckpt: no such checkpoint"),
        ("--guide_mix 0.5", "is of --guide_ckpt, which is not given"),
        ("--guide_mix 1", "from 0 to below 1"),
    ],
)
def test_guidance_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        flags.check_recipe_flags(parsed(*arguments.split()))
