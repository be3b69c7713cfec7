"""New words whose vectors are learned (Textual Inversion), and models that are tuned around them."""

import copy

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.new_rows import FIRST_NEW
from ldm.util import instantiate_from_config
from tests.support import families, golden
from tests.support.models import batch, loader, small_trainer, step

TARGET = "ldm.modules.embedding_manager.EmbeddingManager"
PARAMS = {
    "placeholder_strings": ["*", "<my-dog>"],
    "initializer_words": ["dog", "golden retriever"],
    "num_vectors_per_token": 2,
}


def words(**more):
    return {"target": TARGET, "params": {**PARAMS, **more}}


def build(family="v1", config=None, **more):
    params = families.params(family) | {"cond_stage_trainable": True} | more
    params["personalization_config"] = config or words()
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    model = instantiate_from_config({"target": target, "params": params}, "model")
    golden.load_golden_weights(model)
    model.embedding_manager.start_as_words()
    return model.train()


def plain_step(model, examples):
    """Return the loss of a batch, and the gradient of every row of a table that has new ones.

    A table with the rows behind it, looked up by torch alone, and the loss as it is written.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    encoder, manager = model.cond_stage_model, model.embedding_manager
    table = torch.cat([encoder.token_embedding.weight, *manager.words.values()])
    layer = nn.Embedding(*table.shape, _weight=table.clone())
    layer.weight.requires_grad_(True)
    size = len(table) - sum(len(rows) for rows in manager.words.values())
    encoder.replace_token_embedding(layer)
    tokens = encoder.tokenize(examples["caption"])
    tokens = torch.where(tokens >= FIRST_NEW, tokens - FIRST_NEW + size, tokens)
    raw = {**examples, "image": examples["image"]}
    seen = model.encode_first_stage(raw["image"].permute(0, 3, 1, 2))
    from ldm.modules.losses.batch import Batch

    draws = model.objective.draws(Batch.of(raw), seen.mean.shape[1:], 1000, torch.device("cpu"))
    x = model.get_first_stage_encoding(seen, draws.eps)
    a = model.schedule.alphas_cumprod[draws.t][:, None, None, None]
    noisy = a.sqrt() * x + (1 - a).sqrt() * draws.noise
    output = model.model(noisy, draws.t, c_crossattn=[encoder.embed(tokens)])
    loss = ((output - draws.noise) ** 2).mean()
    loss.backward()
    return loss.detach(), layer.weight.grad[size:]


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_the_gradient_of_new_rows_is_that_of_a_plain_table(family):
    model = build(family)
    examples = batch(1, 2, caption="photo of a * beside <my-dog>")
    expected, gradient = plain_step(model, examples)
    loss, _ = step(model, examples)
    loss.backward()
    ours = torch.cat([rows.grad for rows in model.embedding_manager.words.values()])
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert ours.shape == (4, model.cond_stage_model.token_embedding.embedding_dim)
    assert (ours.abs().amax(dim=1) > 0).all()
    scale = gradient.abs().max()
    torch.testing.assert_close(ours, gradient, rtol=0, atol=float(1e-5 * scale))


@pytest.mark.parametrize("pivotal", [False, True])
def test_new_words_alone_train_or_stay_while_the_model_does(pivotal):
    model = build(config=words(pivotal=pivotal))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.learning_rate = 1e-3
    small_trainer(max_steps=2).fit(model, loader(*[batch(n, caption="a *") for n in (1, 2)]))
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    rows = {
        f"embedding_manager.string_to_param_dict.{word}" for word in model.embedding_manager.words
    }
    if pivotal:
        assert not moved & rows
        assert {name.split(".")[0] for name in moved} == {"model", "cond_stage_model"}
    else:
        assert moved == rows  # the other one by weight decay alone
        assert {p.shape for g in model.optimizers().param_groups for p in g["params"]} == {(2, 32)}
        assert not any(part.training for part in (model.model, model.cond_stage_model))


def test_what_a_new_word_starts_as():
    model = build()
    table, found = model.cond_stage_model.token_embedding.weight, model.embedding_manager.words
    assert torch.equal(found["*"], table[tokenizer.encode("dog")].expand(2, -1))
    mean = table[tokenizer.encode("golden retriever")].mean(dim=0)
    assert torch.equal(found["<my-dog>"], mean.expand(2, -1))
    tokens = model.cond_stage_model.tokenize("<MY-DOG>, *")[0, 1:6].tolist()
    first = FIRST_NEW
    assert tokens == [first + 2, first + 3, *tokenizer.encode(","), first, first + 1]
    # As a prompt with the words that they start as, in whose place several vectors stand.
    one = build(config=words(num_vectors_per_token=1))
    assert torch.equal(*one.cond_stage_model(["photo of a *", "photo of a dog"]))


@pytest.mark.parametrize("given, message", [
    ({"placeholder_strings": []}, "placeholder_strings: no new word: give one"),
    ({"placeholder_strings": "*"}, "placeholder_strings: expected a list of words"),
    ({"placeholder_strings": ["a b"]}, "'a b' is no word"),
    ({"placeholder_strings": ["a.b"]}, "'a.b' is no word"),
    ({"placeholder_strings": ["*", "*"]}, "'[*]' is there twice"),
    ({"placeholder_strings": ["keys"]}, "'keys' is a name that a parameter cannot have"),
    ({"placeholder_strings": ["training"]}, "'training' is a name that a parameter cannot have"),
    ({"initializer_words": "dog"}, "initializer_words: expected a list of words, got 'dog'"),
    ({"initializer_words": ["dog"]}, "initializer_words: 1 for 2 placeholder_strings"),
    ({"num_vectors_per_token": 0}, "num_vectors_per_token: expected 1 or more"),
    ({"num_vectors_per_token": 76}, "76 vectors, a prompt has room for 75"),
    ({"initializer_words": None}, "'[*]' has no word to start as: give --init_word"),
])  # fmt: skip
def test_words_that_cannot_be_are_refused(given, message):
    if "placeholder_strings" in given:
        given = {"initializer_words": None, **given}
    with pytest.raises(UserError, match=message):
        build(config=words(**given))


@pytest.mark.parametrize("more", [
    {"use_ema": True}, {"lora": {"rank": 2}}, {"freeze": ["*"]}, {"preservation": "dop"},
])  # fmt: skip
def test_what_trains_the_model_does_not_go_with_words_alone(more):
    (name,) = more
    with pytest.raises(UserError, match=f"{name}: personalization_config trains new words alone"):
        build(**more)


@pytest.mark.parametrize(
    "words, end, lost",
    [
        (73, "<my-dog>", ""),
        (74, "<my-dog>", "<my-dog>"),
        (75, "dog with <my-dog> toy", "dog with <my-dog> toy"),
        (75, "dog", "dog"),
    ],
)
def test_what_is_cut_off_is_quoted_with_its_new_words(words, end, lost):
    added = {"<my-dog>": [FIRST_NEW, FIRST_NEW + 1]}
    assert tokenizer.lost_text("a " * words + end, 77, added) == lost
