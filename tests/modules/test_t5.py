"""T5's text encoder: transformers as the judge, and its words from either kind of file."""

import json

import pytest
import torch

from ldm.errors import UserError
from ldm.util import instantiate_from_config

SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
# Pieces and their scores; T5's first three are special.
PIECES = [
    ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581do", -2.0), ("g", -3.0),
    ("\u2581dog", -2.5), ("s", -3.0), ("\u2581", -4.0),
]  # fmt: skip


def embedder(**params):
    target = "ldm.modules.encoders.modules.FrozenT5Embedder"
    given = {"text_config": SHAPE, "max_length": 6, **params}
    return instantiate_from_config({"target": target, "params": given}, "cond_stage_config")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The same words as a SentencePiece file and as a tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import import_protobuf

    folder = tmp_path_factory.mktemp("words")
    model = import_protobuf().ModelProto()
    for number, (piece, score) in enumerate(PIECES):
        added = model.pieces.add()
        added.piece, added.score = piece, score
        added.type = 3 if number < 2 else 2 if number == 2 else 1
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    fast = Tokenizer(models.Unigram(PIECES, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    fast.save(str(folder / "tokenizer.json"))
    return folder


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
    with pytest.raises(UserError, match=r"version: cannot load the folder"):
        embedder(version=str(tmp_path), text_config=None)
