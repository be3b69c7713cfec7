"""Textual-inversion files as other programs write them: which words mean them, in prompts and in
a training.
"""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints.embeddings import read_embeddings
from ldm.errors import UserError
from ldm.modules.embedding_manager import EmbeddingManager, token_of
from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from tests.support import golden

WIDTH = 32
VECTOR = torch.linspace(-1, 1, WIDTH)
SEVERAL = torch.stack([VECTOR, -VECTOR, VECTOR.flip(0)])


@pytest.fixture
def embedder():
    encoder = FrozenCLIPEmbedder(text_config=golden.TEXT_CONFIG)
    golden.load_golden_weights(encoder)
    return encoder


def rows(embedder):
    return embedder.token_embedding.weight.detach().clone()


def changed(before, after):
    return (before != after[: len(before)]).any(dim=1).nonzero().flatten().tolist()


def load(embedder, path):
    return EmbeddingManager(embedder).load(read_embeddings(path))


def start_from(embedder, path, identifier="sks"):
    return EmbeddingManager(embedder).start_from(read_embeddings(path), identifier)


def seen(embedder, prompt):
    """The vectors that the text encoder is given for a prompt, without start, end and padding."""
    ids = embedder.tokenize([prompt])[0]
    end = int((ids == tokenizer.END).nonzero()[0])
    return embedder.token_embedding.weight[ids[1:end]].detach()


def test_tokens_of_words():
    assert token_of("sks") == tokenizer.encode("sks")[0]
    for word, count in (("xylophonist-like", "[0-9]+"), ("", "0"), ("two words", "2")):
        with pytest.raises(UserError, match=f"'{word}' is {count} tokens, not one"):
            token_of(word)


@pytest.mark.parametrize("word", ["dog", "golden retriever"])
@pytest.mark.parametrize("placeholder", ["sks", "shs"])
def test_the_placeholder_starts_as_another_word(embedder, word, placeholder):
    before = rows(embedder)
    EmbeddingManager(embedder).initialize(word, placeholder)
    after = rows(embedder)
    assert changed(before, after) == [token_of(placeholder)]
    torch.testing.assert_close(
        after[token_of(placeholder)], before[tokenizer.encode(word)].mean(dim=0)
    )
    assert embedder.transformer.text_model.embeddings.token_embedding.weight.requires_grad


def test_words_that_cannot_be_used(embedder):
    before, manager = rows(embedder), EmbeddingManager(embedder)
    with pytest.raises(UserError, match="--init_word: an empty word"):
        manager.initialize(" ", "sks")
    with pytest.raises(UserError, match="'two words' is 2 tokens"):
        manager.initialize("dog", "two words")
    assert torch.equal(rows(embedder), before)


# Files: what they hold, and the words that mean it

LAYOUTS = {
    "diffusers.bin": lambda path: torch.save({"sks": VECTOR}, path),
    "diffusers.safetensors": lambda path: save_file({"sks": VECTOR}, path),
    "compvis.pt": lambda path: torch.save(
        {
            "string_to_token": {"sks": torch.tensor(48136)},
            "string_to_param": torch.nn.ParameterDict({"sks": torch.nn.Parameter(VECTOR[None])}),
        },
        path,
    ),
    "plain.pt": lambda path: torch.save(
        {"string_to_param": {"sks": VECTOR[None]}, "name": "x", "step": 3}, path
    ),
    "half.bin": lambda path: torch.save({"sks": VECTOR.double()[None]}, path),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_embedding_files(embedder, name, tmp_path):
    LAYOUTS[name](tmp_path / name)
    before = rows(embedder)
    assert load(embedder, tmp_path / name)[0] == "sks"
    assert changed(before, rows(embedder)) == [token_of("sks")]
    assert torch.equal(rows(embedder)[token_of("sks")], VECTOR)


def test_files_of_several_words(embedder, tmp_path):
    torch.save({"sks": VECTOR, "shs": -VECTOR}, tmp_path / "x-y.bin")
    assert load(embedder, tmp_path / "x-y.bin") == ["sks", "shs"]
    assert torch.equal(rows(embedder)[token_of("shs")], -VECTOR)
    assert torch.equal(seen(embedder, "x-y"), rows(embedder)[tokenizer.encode("x-y")])


def web_ui(vectors, word="*"):
    return {
        "string_to_token": {word: 265},
        "string_to_param": {word: vectors},
        "name": "another-name",
        "step": 500,
    }


# file -> what it holds, and the words that mean it.
FILES = {
    "my-dog.pt": (web_ui(VECTOR[None]), ["my-dog", "*"]),
    "my-dogs.pt": (web_ui(SEVERAL), ["my-dogs", "*"]),
    "my-cat.safetensors": ({"emb_params": SEVERAL}, ["my-cat"]),
    "my-hen.safetensors": ({"emb_params": VECTOR[None].half()}, ["my-hen"]),
    "learned_embeds.bin": ({"<my-dog>": VECTOR}, ["<my-dog>", "learned_embeds"]),
    "learned_embeds.safetensors": ({"<my-dog>": SEVERAL}, ["<my-dog>", "learned_embeds"]),
    "x2.bin": ({"<my own word>": VECTOR}, ["<my own word>", "x2"]),
    "dog.bin": ({"<my-dog>": VECTOR}, ["<my-dog>"]),
    "two.bin": ({"<a-b>": VECTOR, "<a-b-c>": SEVERAL}, ["<a-b>", "<a-b-c>"]),
    "cat.pt": (web_ui(SEVERAL), ["cat", "*"]),
}


def written(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_word_of_a_file_means_its_vectors(embedder, name, tmp_path):
    content, words = FILES[name]
    before = rows(embedder)
    assert load(embedder, written(tmp_path / name, content)) == words
    own = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    for word in words:
        vectors = own.get(
            word, next(iter(own.values())) if own else content.get("string_to_param", {}).get("*")
        )
        vectors = vectors.reshape(-1, WIDTH).float()
        for text in (word, word.upper()):
            assert torch.equal(seen(embedder, text), vectors)
        photo, beach = (
            before[tokenizer.encode("photo of a")],
            before[tokenizer.encode(", on the beach")],
        )
        assert torch.equal(
            seen(embedder, f"photo of a {word}, on the beach"), torch.cat([photo, vectors, beach])
        )
    assert torch.equal(seen(embedder, "photo of a dog"), before[tokenizer.encode("photo of a dog")])


def test_a_word_is_found_only_where_it_stands_for_itself(embedder, tmp_path):
    load(embedder, written(tmp_path / "my-dog.safetensors", {"emb_params": SEVERAL}))
    load(embedder, written(tmp_path / "my-dog-2.safetensors", {"emb_params": -SEVERAL}))
    table = rows(embedder)
    assert torch.equal(seen(embedder, "my-dogs"), table[tokenizer.encode("my-dogs")])
    assert torch.equal(seen(embedder, "tummy-dog"), table[tokenizer.encode("tummy-dog")])
    assert torch.equal(
        seen(embedder, "my-dog's"), torch.cat([SEVERAL, table[tokenizer.encode("'s")]])
    )
    assert torch.equal(seen(embedder, "my-dog-2 my-dog"), torch.cat([-SEVERAL, SEVERAL]))


def test_the_other_text_encoder_finds_them_too(tmp_path):
    text = {"width": 32, "heads": 2, "layers": 2}
    embedder = FrozenOpenCLIPEmbedder(text_config=text).requires_grad_(False)
    before = embedder(["photo of a my-dog"])
    load(embedder, written(tmp_path / "my-dog.pt", web_ui(SEVERAL)))
    ids = embedder.tokenize(["photo of a my-dog"])[0]
    assert torch.equal(embedder.token_embedding.weight[ids[4:7]], SEVERAL)
    assert not torch.equal(embedder(["photo of a my-dog"]), before)


def test_the_report_says_which_words_they_are(embedder, tmp_path, caplog):
    caplog.set_level("INFO")
    load(embedder, written(tmp_path / "my-dog.pt", web_ui(VECTOR[None])))
    assert "my-dog.pt: in prompts, 'my-dog' and '*' mean its vector" in caplog.text
    assert "no longer has its own meaning" not in caplog.text
    load(embedder, written(tmp_path / "cat.pt", web_ui(SEVERAL)))
    assert "in prompts, 'cat' and '*' mean its 3 vectors" in caplog.text
    assert (
        "cat.pt: 'cat' is a word of the vocabulary: in prompts it no longer has its own meaning"
        in caplog.text
    )


def test_a_folder_of_diffusers(embedder, tmp_path):
    folder = tmp_path / "my-concept"
    folder.mkdir()
    with pytest.raises(UserError, match="a folder without an embedding: expected learned_embeds"):
        read_embeddings(folder)
    written(folder / "learned_embeds.bin", {"<my-dog>": VECTOR})
    assert load(embedder, folder) == ["<my-dog>", "my-concept"]


@pytest.mark.parametrize("content, message", [
    ({"sks": torch.ones(31)}, "'sks' has vectors of width 31, this model's text encoder needs 32"),
    ({"sks": torch.ones(1024)}, r"width 1024, this model's text encoder needs 32 \(1024 is Stable "
                                r"Diffusion 2\)"),
    ({"string_to_param": {"sks": torch.ones(76, WIDTH)}}, "'sks' has 76 vectors, a prompt has "
                                                          "room for 75"),
    ({"sks": torch.full((WIDTH,), torch.nan)}, "'sks' has values that are not finite"),
    ({"sks": VECTOR, "shs": torch.ones(31)}, "'shs' has vectors of width 31"),
    ({"name": "x"}, "no textual-inversion embedding in it"),
    ({"": VECTOR}, "no textual-inversion embedding in it"),
    ({"state_dict": {"a": torch.ones(WIDTH)}}, "no textual-inversion embedding in it"),
    ({"string_to_param": 3, "a": torch.ones(1)}, "no textual-inversion embedding in it"),
    ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, r"of Stable Diffusion XL or 3 "
                                                                    r"\(clip_l, clip_g\)"),
    ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "it is a LoRA, which scripts/convert.py "
                                                       "merges into a model"),
    ({"state_dict": {"model.diffusion_model.out.2.bias": VECTOR}}, "it is a whole model, for --ckpt"),
    ({768: ({"linear.weight": VECTOR}, 0), "name": "x"}, "it looks like a hypernetwork, which "
                                                         "is not read"),
])  # fmt: skip
def test_files_that_do_not_fit_change_nothing(embedder, content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    before = rows(embedder)
    for use in (load, start_from):
        with pytest.raises(UserError, match=message):
            use(embedder, tmp_path / "x.pt")
    assert torch.equal(rows(embedder), before)


def test_missing_files_and_pictures(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        read_embeddings(tmp_path / "none.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")
    with pytest.raises(UserError, match=r"dog\.png: an embedding inside a picture is not read"):
        read_embeddings(tmp_path / "dog.png")


# A training that starts from a file: only rows of the vocabulary are in its checkpoint


@pytest.mark.parametrize("name, content, word", [
    ("my-dog.pt", web_ui(VECTOR[None]), "sks"),
    ("dog.pt", web_ui(VECTOR[None]), "sks"),
    ("dog.safetensors", {"emb_params": VECTOR[None]}, "sks"),
    ("learned_embeds.bin", {"<my-dog>": VECTOR}, "sks"),
    ("x.bin", {"shs": VECTOR}, "shs"),
    ("x.bin", {"sks": VECTOR}, "sks"),
])  # fmt: skip
def test_which_row_a_training_starts_with(embedder, name, content, word, tmp_path):
    before = rows(embedder)
    assert start_from(embedder, written(tmp_path / name, content)) == [word]
    after = rows(embedder)
    assert before.shape == after.shape and changed(before, after) == [token_of(word)]
    assert torch.equal(after[token_of(word)], VECTOR)


@pytest.mark.parametrize("content, identifier, message", [
    (web_ui(SEVERAL), "sks", "several vectors for 'sks', which has one"),
    ({"sks": SEVERAL}, "sks", "several vectors for 'sks', which has one"),
    ({"<a>": VECTOR, "<b>": VECTOR}, "sks", "several vectors for 'sks', which has one"),
    (web_ui(VECTOR[None]), "my-dog", "'my-dog' is 3 tokens, not one"),
])  # fmt: skip
def test_what_a_training_cannot_start_from(embedder, content, identifier, message, tmp_path):
    before = rows(embedder)
    with pytest.raises(UserError, match=message):
        start_from(embedder, written(tmp_path / "x.pt", content), identifier)
    assert torch.equal(rows(embedder), before)
