"""A few words of a T5, as a SentencePiece file and as a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

# Pieces and their scores; T5's first three are special.
PIECES = [
    ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581do", -2.0), ("g", -3.0),
    ("\u2581dog", -2.5), ("s", -3.0), ("\u2581", -4.0),
]  # fmt: skip


def write_words(folder: Path) -> Path:
    """Write `spiece.model` and `tokenizer.json` of the same words into a folder; return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import import_protobuf

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
