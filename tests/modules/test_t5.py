"""T5's text encoder: transformers as the judge, and its words from either kind of file."""

import json

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.util import instantiate_from_config
from tests.support.words import write_words

SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}


def embedder(**params):
    target = "ldm.modules.encoders.modules.FrozenT5Embedder"
    given = {"text_config": SHAPE, "max_length": 6, **params}
    return instantiate_from_config({"target": target, "params": given}, "cond_stage_config")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json", ""])
def test_words_are_pieces_the_end_and_padding(words, file):
    encoder = embedder(tokenizer=str(words / file))
    tokens = encoder.tokenize(["a  dogs ", "a a a a a a a a"])
    assert tokens.tolist() == [[3, 6, 7, 1, 0, 0], [3, 3, 3, 3, 3, 1]]


def test_embeddings_are_those_of_transformers(words, tmp_path):
    encoder = embedder(tokenizer=str(words)).eval()
    ours = encoder(["a dog"])
    expected = encoder.transformer(input_ids=torch.tensor([[3, 6, 1, 0, 0, 0]])).last_hidden_state
    assert torch.equal(ours, expected) and ours.shape == (1, 6, 32)

    # One table under one name; a folder of transformers gives weights and words.
    state = encoder.state_dict()
    assert "transformer.shared.weight" in state and not any("embed_tokens" in key for key in state)
    encoder.transformer.save_pretrained(tmp_path)
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_bytes((words / name).read_bytes())
    again = embedder(version=str(tmp_path), text_config=None).eval()
    assert torch.equal(again(["a dog"]), ours)


def test_what_is_wrong_with_the_words_is_said(words, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer: T5 needs its words: name its tokenizer\.json"):
        embedder()(["a dog"])
    with pytest.raises(UserError, match=r"tokenizer: .*nowhere: no such file"):
        embedder(tokenizer="nowhere")(["a dog"])
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps({"no": "words"}))
        with pytest.raises(UserError, match=rf"tokenizer: .*{name}: cannot be read"):
            embedder(tokenizer=str(tmp_path / name))(["a dog"])
    with pytest.raises(UserError, match=r"tokenizer: .*has a word 6, of 5"):
        embedder(tokenizer=str(words), text_config={**SHAPE, "vocab_size": 5})(["dog"])
    with pytest.raises(
        UserError, match=r"text_config\.d_modle: unknown field \(did you mean 'd_model'"
    ):
        embedder(text_config={"d_modle": 3})
    with pytest.raises(UserError, match=r"text_config\.num_layers: expected 1 or more, got 0"):
        embedder(text_config={**SHAPE, "num_layers": 0})
    with pytest.raises(UserError, match=r"text_config\.dropout_rate: expected a share from 0 to 1"):
        embedder(text_config={**SHAPE, "dropout_rate": 3})
    with pytest.raises(UserError, match="are for CLIP's text encoders: this model has a T5"):
        EmbeddingManager(embedder())
    with pytest.raises(UserError, match=r"version: cannot load the folder"):
        embedder(version=str(tmp_path), text_config=None)


def test_a_hub_name_without_words_is_one_line(monkeypatch):
    def refused(*_, **__):
        raise OSError("no/such is not a valid model identifier\nand more")

    monkeypatch.setattr("transformers.utils.cached_file", refused)
    with pytest.raises(
        UserError, match=r"cannot load that of 'no/such': no/such is not.*local file$"
    ):
        embedder(version="no/such")(["a dog"])
