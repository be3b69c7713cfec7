"""T5's text encoder, as Imagen reads texts (2205.11487, section 2.1), and its words from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.errors import ParameterError, nearest
from ldm.files import first_line
from ldm.modules.encoders.modules import TextEncoder, check_text_config
from ldm.modules.encoders.tokenizer import encode_with

T5_LARGE = "google/t5-v1_1-large"
# The fields of transformers' T5Config that differ from its defaults.
T5_LARGE_TEXT: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}
# The fields that count or measure something.
COUNTS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    "relative_attention_num_buckets",
)
END, PAD = 1, 0
# Names of the file of words in a model's folder.
WORDS = ("tokenizer.json", "spiece.model")
# The second name of the table of embeddings, which a file need not have.
TWICE = "transformer.encoder.embed_tokens.weight"

Encode = Callable[[str], list[int]]


class FrozenT5Embedder(TextEncoder):
    """T5's encoder; its last hidden state is the conditioning. The name is LDM's.

    Args:
        version: the default builds T5 v1.1 large without weights, which a checkpoint then fills. A
            local folder or another hub name is loaded by transformers.
        max_length: tokens a text is padded or cut to.
        text_config: fields of transformers' `T5Config` that replace T5 v1.1 large's.
        tokenizer: a `tokenizer.json`, or a SentencePiece file (`spiece.model`); by default that in
            the folder `version`, or of the hub name.
    """

    pad = PAD

    def __init__(
        self,
        version: str = T5_LARGE,
        max_length: int = 77,
        text_config: Mapping[str, object] | None = None,
        tokenizer: str | None = None,
    ):
        super().__init__()
        if max_length < 2:
            raise ParameterError("max_length", f"expected 2 or more, got {max_length}")
        self.max_length, self.version, self.words = max_length, version, tokenizer
        self.transformer = _build_t5(version, text_config)
        # One table under two names: files have one of them, and safetensors refuses both.
        self.transformer.encoder.embed_tokens = self.transformer.shared
        self.optional_keys = (TWICE,)
        self._register_state_dict_hook(_without_second_name)

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return embeddings of token ids, (b, n, d_model)."""
        # As LDM does, the encoder also reads the padding.
        return self.transformer(input_ids=tokens.to(self.device)).last_hidden_state

    def tokenize(self, text: Sequence[str] | str) -> Int[Tensor, "b n"]:
        """Return token ids of the texts: pieces, the end, padding; longer texts are cut."""
        texts = [text] if isinstance(text, str) else text
        tokens = torch.full((len(texts), self.max_length), PAD, dtype=torch.int64)
        for row, one in zip(tokens, texts):
            ids = [*self.encode_words(one)[: self.max_length - 1], END]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    @cached_property
    def encode_words(self) -> Encode:
        """Return what gives the ids of a text's pieces.

        Raises:
            UserError: there is no file of words, or it cannot be read.
        """
        path = _file_of_words(self.version, self.words)
        if path is None:
            raise ParameterError(
                "tokenizer",
                "T5 needs its words: name its tokenizer.json or SentencePiece file (spiece.model)",
            )
        encode = _read_words(path)
        size = int(self.token_embedding.num_embeddings)

        def within(text: str) -> list[int]:
            ids = encode(text)
            if ids and max(ids) >= size:
                raise ParameterError("tokenizer", f"{path}: has a word {max(ids)}, of {size}")
            return ids

        return within

    @property
    def token_embedding(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.transformer.shared


def words_of(encoder: object) -> Encode:
    """Return what gives the ids of a text's words to a text encoder, T5's or CLIP's."""
    if isinstance(encoder, FrozenT5Embedder):
        return encoder.encode_words
    added = encoder.added_words if isinstance(encoder, TextEncoder) else {}
    return lambda text: encode_with(text, added)


def _without_second_name(
    module: nn.Module, state: dict[str, object], prefix: str, _: object
) -> None:
    state.pop(prefix + TWICE, None)


def _build_t5(version: str, text_config: Mapping[str, Any] | None) -> Any:
    from transformers import T5Config, T5EncoderModel

    if version != T5_LARGE and text_config is None:
        try:
            return T5EncoderModel.from_pretrained(version)
        except (OSError, ValueError) as error:
            kind = "folder" if Path(version).exists() else "hub model or local folder"
            problem = f"cannot load the {kind} '{version}': {' '.join(str(error).split())}"
            raise ParameterError("version", problem) from error
    fields = dict(text_config or {})
    accepted = set(T5Config().to_dict())
    for key in fields:
        if key not in accepted:
            raise ParameterError(f"text_config.{key}", f"unknown field{nearest(key, accepted)}")
    fields = {**T5_LARGE_TEXT, **fields}
    check_text_config(fields, COUNTS, "dropout_rate")
    try:
        return T5EncoderModel(T5Config(**fields))
    except Exception as error:  # transformers checks some fields, torch stumbles over others
        raise ParameterError("text_config", " ".join(str(error).split())) from error


# Words


def _file_of_words(version: str, given: str | None) -> Path | None:
    """Return the file of words that is given, or that a folder or a hub model has."""
    if given is not None:
        path = Path(given).expanduser()
        path = _words_in(path) or path
        if not path.is_file():
            raise ParameterError("tokenizer", f"{given}: no such file")
        return path
    if Path(version).is_dir():
        return _words_in(Path(version))
    if version == T5_LARGE:
        return None
    from transformers.utils import cached_file

    for name in WORDS:
        try:
            found = cached_file(version, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:  # no such name, or one that needs a login
            problem = f"cannot load that of '{version}': {first_line(error)}: name a local file"
            raise ParameterError("tokenizer", problem) from error
        if found:
            return Path(found)
    return None


def _words_in(folder: Path) -> Path | None:
    return next((folder / name for name in WORDS if (folder / name).is_file()), None)


def _read_words(path: Path) -> Encode:
    """Return what encodes by a `tokenizer.json` or a SentencePiece file."""
    try:
        read = open_words(path)
    except Exception as error:  # each of the two libraries has errors of its own
        problem = f"{path}: cannot be read: {' '.join(str(error).split())[:200]}"
        raise ParameterError("tokenizer", problem) from error
    return lambda text: read.encode(" ".join(text.split()), add_special_tokens=False).ids


def open_words(path: Path) -> Any:
    """Return the tokenizer, of the package tokenizers, of such a file; raises what that raises."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)) if path.suffix == ".json" else _of_sentencepiece(path)


def _of_sentencepiece(path: Path) -> Any:
    """Return the tokenizer of a SentencePiece file of the kind unigram, as T5's is."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != 1 or not model.pieces:
        raise ValueError("no SentencePiece model of the kind unigram")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    found = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
    charsmap = model.normalizer_spec.precompiled_charsmap
    if charsmap:
        found.normalizer = normalizers.Precompiled(charsmap)
    # Words are marked by what stands for the space before each of them.
    found.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    return found
