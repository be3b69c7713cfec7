"""Prompts in the web UI's syntax: what each spelling means, how long ones are cut, what the embedding
is.
"""

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizer import encode
from ldm.modules.encoders.weighting import WeightedText, chunks_of, parse, reads_differently
from tests.support import golden
from tests.support.families import TEXT_V2

UP, DOWN = 1.1, 1 / 1.1


def pieces(prompt):
    """Return text and weight of each piece, in a list for each part between breaks."""
    return [[(p.text, pytest.approx(p.weight)) for p in part] for part in parse(prompt)]


@pytest.fixture(scope="module", params=["v1", "v2"])
def encoder(request):
    torch.manual_seed(0)
    if request.param == "v1":
        found = FrozenCLIPEmbedder(text_config=golden.TEXT_CONFIG)
        norm = found.transformer.text_model.final_layer_norm
    else:
        found = FrozenOpenCLIPEmbedder(text_config=TEXT_V2)
        norm = found.model.ln_final
    # A new norm gives the mean 0. One that was trained does not.
    torch.nn.init.uniform_(norm.bias, 0, 0.5)
    return found.eval().requires_grad_(False)


# What is written, and what it means


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", [[]]),
        ("a plain text, with: signs", [[("a plain text, with: signs", 1)]]),
        ("a (red) dog", [[("a ", 1), ("red", UP), (" dog", 1)]]),
        ("a ((red)) dog", [[("a ", 1), ("red", UP**2), (" dog", 1)]]),
        ("a (red:1.5) dog", [[("a ", 1), ("red", 1.5), (" dog", 1)]]),
        ("a (red : .5 ) dog", [[("a ", 1), ("red ", 0.5), (" dog", 1)]]),
        ("a (red:-1) dog", [[("a ", 1), ("red", -1), (" dog", 1)]]),
        ("a [red] dog", [[("a ", 1), ("red", DOWN), (" dog", 1)]]),
        ("a [[red]]", [[("a ", 1), ("red", DOWN**2)]]),
        ("((red:2) dog)", [[("red", 2 * UP), (" dog", UP)]]),
        ("(red [dog])", [[("red ", UP), ("dog", UP * DOWN)]]),
        ("(un)(known)", [[("unknown", UP)]]),
        (r"\(red\) \[dog\] \\ \a", [[(r"(red) [dog] \ a", 1)]]),
        (r"(red \(dark\):2)", [[("red (dark)", 2)]]),
        ("(red dog", [[("red dog", UP)]]),
        ("red) dog]:2)", [[("red) dog]:2)", 1)]]),
        ("a dog BREAK a cat", [[("a dog", 1)], [("a cat", 1)]]),
        ("(a dog BREAK a cat:2)", [[("a dog", 2)], [("a cat", 2)]]),
        ("BREAKING a dog", [[("BREAKING a dog", 1)]]),
    ],
)
def test_a_spelling_means(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a [dog:cat:0.5]", r"'\[dog:cat:0\.5\]' is prompt editing"),
        ("a [dog|cat]", "alternating words"),
        ("a dog AND a cat", "composed prompts"),
        ("a dog <lora:sks:0.8>", "'<lora:sks:0.8>' is an extra network"),
        ("a (dog:1.2.3)", r"weight ':1\.2\.3\)' is no number"),
    ],
)
def test_what_the_web_ui_reads_as_something_else_is_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        parse(prompt)


# Chunks


def lengths(prompt):
    return [len(chunk.ids) for chunk in chunks_of(prompt, 75)]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", [0]),
        ("dog " * 75, [75]),
        ("dog " * 76, [75, 1]),
        ("dog " * 151, [75, 75, 1]),
        ("dog BREAK cat cat", [1, 2]),
        ("dog BREAK", [1]),
        ("BREAK dog", [0, 1]),
        ("dog BREAK BREAK cat", [1, 0, 1]),
        # Twenty tokens before the end there is a comma: what follows it moves.
        ("dog " * 60 + ", " + "cat " * 20, [61, 20]),
        ("dog " * 55 + ", " + "cat " * 20, [56, 20]),
        ("dog " * 54 + ", " + "cat " * 21, [75, 1]),
        # A comma that does not fit moves nothing.
        ("dog, " + "dog " * 73 + ", cat", [75, 2]),
    ],
)
def test_a_long_prompt_is_cut_into_chunks(prompt, expected):
    assert lengths(prompt) == expected


def test_a_word_of_several_vectors_stays_in_one_chunk():
    def groups_of(text):
        return [[9, 9, 9] if word == "sks" else encode(word) for word in text.split()]

    chunks = chunks_of("dog " * 73 + "(sks:2)", 75, groups_of)
    assert [chunk.ids[-3:] for chunk in chunks] == [encode("dog") * 3, [9, 9, 9]]
    assert chunks[1].weights == [2, 2, 2]


@pytest.mark.parametrize("prompt", ["", "a dog, red: big", "a dog) in the snow"])
def test_plain_words_are_read_as_they_are(prompt):
    assert not reads_differently(prompt)


@pytest.mark.parametrize("prompt", ["(a dog)", r"a \(dog", "a BREAK dog", "dog " * 76])
def test_syntax_and_long_prompts_are_read_differently(prompt):
    assert reads_differently(prompt)


# Embeddings


def reference(encoder, text, weights):
    """Weigh an embedding as the web UI does: multiply, and restore the mean of the whole chunk."""
    z = encoder([text])[0].double()
    weighted = z.clone()
    for place, weight in weights.items():
        weighted[place] = z[place] * weight
    return weighted * (z.mean() / weighted.mean())


def test_the_embedding_is_weighted_and_keeps_its_mean(encoder):
    found = WeightedText(encoder)(["photo of a (red:1.5) [sks dog]"])[0].double()
    # Token 0 is the start: photo of a red sks dog are 1 to 6.
    expected = reference(encoder, "photo of a red sks dog", {4: 1.5, 5: DOWN, 6: DOWN})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = encoder(["photo of a red sks dog"])[0].double()
    assert not torch.allclose(found, plain, atol=1e-2)
    assert found.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


def test_the_embedding_of_a_long_prompt_is_that_of_its_chunks(encoder):
    prompt = "dog " * 60 + ", a (red:2) cat " + "bird " * 30
    found = WeightedText(encoder)([prompt])[0].double()
    expected = [
        encoder(["dog " * 60 + ","])[0].double(),
        reference(encoder, "a red cat " + "bird " * 30, {2: 2}),
    ]
    assert found.shape[0] == 2 * 77
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_an_unweighted_prompt_is_what_it_is_without_the_option(encoder):
    for prompt in ("photo of a sks dog", ""):
        assert torch.equal(WeightedText(encoder)([prompt]), encoder([prompt]))


def test_without_the_option_brackets_are_words(encoder):
    tokens = encoder.tokenize(["a (red:1.5) [dog]"])[0].tolist()
    assert tokens[1 : tokens.index(49407)] == encode("a (red:1.5) [dog]")


def test_a_prompt_does_not_depend_on_the_others(encoder):
    short, long = "a (red:2) dog", "dog " * 100
    both, alone = WeightedText(encoder)([short, long]), WeightedText(encoder)([short])
    assert both.shape[1] == 2 * 77
    # The short one is there twice, which attention takes for once.
    assert torch.equal(both[0], torch.cat([alone[0], alone[0]]))
    queries = torch.randn(3, both.shape[2])

    def read(keys):
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)

    torch.testing.assert_close(read(both[0]), read(alone[0]), rtol=1e-4, atol=1e-5)


def test_words_that_were_added_are_weighted(encoder):
    encoder.added_words = {"my-dog": [320, 1929]}
    try:
        found = WeightedText(encoder)(["photo of (my-dog:2)"])[0].double()
        expected = reference(encoder, "photo of my-dog", {3: 2, 4: 2})
    finally:
        encoder.added_words = {}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
