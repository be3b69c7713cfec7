"""Textual-inversion files: the words and the vectors in what other programs write, and read.

| written by | what the file holds |
|---|---|
| LDM, AUTOMATIC1111's web UI, sd-scripts (`.pt`) | `string_to_param`, mostly of the word `*` |
| sd-scripts (`.safetensors`) | `emb_params`, without a word |
| diffusers (`.bin`, `.safetensors`) | for each word a vector, or several as rows |

Web UIs call an embedding by the name of its file, so that this is a word, too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints import other_files
from ldm.checkpoints.layouts import NEW_WORDS
from ldm.checkpoints.reading import read_checkpoint
from ldm.checkpoints.unpickle import Stub
from ldm.errors import UserError
from ldm.files import save_checkpoint, write_atomically
from ldm.modules.embedding_manager import ANY_WORD, Embedding, in_vocabulary
from ldm.modules.encoders import tokenizer

log = logging.getLogger(__name__)

IN_FOLDERS = ("learned_embeds.safetensors", "learned_embeds.bin")
PICTURES = (".png", ".webp", ".jxl", ".avif")
NO_WORD = "emb_params"
# How the names of new words' vectors begin in the checkpoint of a run that learns them.
ROWS = f"{NEW_WORDS}string_to_param_dict."
NAME = "learned_embeds.safetensors"  # what diffusers looks for in a folder
LAYOUTS = ("webui", "ldm")  # of .pt files
# The text encoders by whose names files for several of them keep their vectors.
SEVERAL_ENCODERS = ("clip_l", "clip_g", "t5xxl")
WHOLE_MODEL = re.compile(r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.")


def read_embeddings(path: str | Path) -> list[Embedding]:
    """Return the embeddings in a textual-inversion file, or in a folder with `learned_embeds.*`.

    Raises:
        UserError: no such file, or one of a kind that is not read.
    """
    file = path = Path(path)
    if path.is_dir():
        file = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
        if file == path:
            raise UserError(
                f"{path}: a folder without an embedding: expected {' or '.join(IN_FOLDERS)} in it"
            )
    if file.suffix.lower() in PICTURES:
        raise UserError(
            f"{path}: an embedding inside a picture is not read: save it as .pt or .safetensors"
        )
    content = read_checkpoint(file)
    vectors = vectors_of(content)
    encoders = [name for name in SEVERAL_ENCODERS if name in vectors]
    if encoders:
        raise UserError(
            f"{path}: an embedding of Stable Diffusion XL or 3 ({', '.join(encoders)}), "
            "which fits no model of this project"
        )
    other_kind = what_else(content)
    if other_kind or not vectors or any(value.ndim > 2 for value in vectors.values()):
        raise UserError(f"{path}: no textual-inversion embedding in it{other_kind}")
    return [
        embedding_of(key, value, path, alone=len(vectors) == 1) for key, value in vectors.items()
    ]


def warn_if_unused(path: str | Path, words: Sequence[str], prompts: Sequence[str]) -> None:
    """Warn if none of an embedding's words is in any of the prompts."""
    text = " ".join(prompts).lower()
    if not any(word.lower() in text for word in words):
        named = " or ".join(f"'{word}'" for word in words)
        log.warning("%s: without effect: no prompt has %s", path, named)


def read_words(path: Path) -> dict[str, Tensor]:
    """Return the new words of a run's checkpoint, or of an embedding file, and their vectors.

    Raises:
        UserError: there are none in it.
    """
    if path.is_file():
        content = read_checkpoint(path)
        inside = content.get("state_dict", content)
        keys = [key for key in inside if str(key).startswith(ROWS)]
        if keys:
            return {key.removeprefix(ROWS): inside[key] for key in keys}
    found = {}
    for embedding in read_embeddings(path):
        any_word = ANY_WORD if ANY_WORD in embedding.words else embedding.words[0]
        found[embedding.own_word or any_word] = embedding.vectors
    return found


def embedding_of(key: str, vectors: Tensor, path: Path, alone: bool) -> Embedding:
    """Return a file's entry as an embedding with the words that mean it.

    Args:
        key: the word that the file gives it.
        alone: it is the only one, so that the file's name means it, too.
    """
    name = path.stem if path.is_file() else path.name
    rows = vectors.detach().reshape(-1, vectors.shape[-1])
    if key in (ANY_WORD, NO_WORD):
        words = [name, ANY_WORD] if key == ANY_WORD else [name]
        return Embedding(tuple(words if alone else words[1:] or words), rows, str(path))
    words = [key]
    # The name of a file that has a word of its own must not take a word's meaning away.
    if alone and name.lower() != key.lower() and not in_vocabulary(name):
        words.append(name)
    return Embedding(tuple(words), rows, str(path), own_word=key)


# Writing


def files_of_words(words: Mapping[str, Tensor], path: Path, layout: str = LAYOUTS[0]) -> list[Path]:
    """Return the files that `write_words` writes."""
    if len(words) == 1 or (path.suffix == ".pt" and layout == "ldm"):
        return [path]
    count = len(words)
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def write_words(words: Mapping[str, Tensor], path: Path, layout: str = LAYOUTS[0]) -> list[Path]:
    """Write words and their vectors, (n, d) each, and return the files.

    A `.safetensors` file is diffusers' and has one word, so that of several words each gets a
    number behind its file's name. A `.pt` file has the layout of the web UIs, which is of one word,
    too, or LDM's, which takes several.

    Raises:
        UserError: another suffix, a layout that is not known, or a disk that is too small.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: expected a name that ends in .safetensors or .pt")
    if layout not in LAYOUTS:
        raise UserError(f"{layout}: no layout of .pt files; accepted: {', '.join(LAYOUTS)}")
    rows = {word: vectors.detach().cpu().contiguous() for word, vectors in words.items()}
    files = files_of_words(words, path, layout)
    if path.suffix == ".pt" and layout == "ldm":
        save_checkpoint(_as_ldm(rows), path)
        return files
    for file, (word, vectors) in zip(files, rows.items()):
        _write_one(word, vectors, file)
    return files


def _write_one(word: str, vectors: Tensor, file: Path) -> None:
    if file.suffix == ".pt":
        # A web UI calls it by the file's name; the word is always a star.
        name = word if word != ANY_WORD else file.stem
        save_checkpoint(
            {
                "string_to_token": {ANY_WORD: 265},
                "string_to_param": {ANY_WORD: vectors},
                "name": name,
            },
            file,
        )
        return
    write_atomically(file, lambda path: save_file({word: vectors}, path), vectors.nbytes)


def _as_ldm(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what LDM's `EmbeddingManager.load` reads."""
    tokens = {word: torch.tensor(tokenizer.encode(word)[0]) for word in rows}
    parameters = {word: nn.Parameter(vectors) for word, vectors in rows.items()}
    return {"string_to_token": tokens, "string_to_param": nn.ParameterDict(parameters)}


# Reading


def vectors_of(content: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the vectors in a read file by word; none if it is no embedding's."""
    named = content.get("string_to_param", content)
    if isinstance(named, Stub):  # a pickled ParameterDict
        state = named.state if isinstance(named.state, dict) else {}
        named = state.get("_parameters") or state
    named = named if isinstance(named, Mapping) else {}
    vectors = {
        str(word).strip(): value
        for word, value in named.items()
        if isinstance(value, Tensor) and value.ndim
    }
    return {word: value for word, value in vectors.items() if word}


def what_else(content: Mapping[str, Any]) -> str:
    """Return what a file without an embedding is instead, as far as its keys say; empty if they
    do not.
    """
    inside = content.get("state_dict", content)
    keys = [str(key) for key in inside] if isinstance(inside, Mapping) else []
    if other_files.LORA.fits(keys):
        return ": it is a LoRA, which scripts/convert.py merges into a model"
    if any(WHOLE_MODEL.match(key) for key in keys):
        return ": it is a whole model, for --ckpt"
    if other_files.is_hypernetwork(content):
        return ": it looks like a hypernetwork, which is not read"
    return ""
