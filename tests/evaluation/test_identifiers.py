"""The search for rare words, and what a model is found to know of them."""

import random
import struct

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ldm.errors import UserError
from ldm.evaluation import identifiers
from ldm.evaluation.identifiers import find_identifiers, identifier_of, is_screened, known_of
from ldm.evaluation.vocabularies import clip_vocabulary, read_vocabulary, shared_window
from ldm.modules.encoders import tokenizer
from ldm.tiny.miniature import WEIGHTS
from scripts import find_identifier

WORDS = {"dog", "photo", "of", "a"}
TINY = str(WEIGHTS)
LETTERS = "bcdfgklmnprstvz"


@pytest.fixture(scope="module")
def clip():
    return clip_vocabulary()


def t5_pieces():
    """What stands in a file such as T5's: special pieces, then shorter and longer ones."""
    chance = random.Random(0)
    texts = {"".join(chance.choices(LETTERS, k=chance.choice([2, 3]))) for _ in range(400)}
    plain = [*LETTERS, *sorted(texts), "longer"]
    return ["<pad>", "</s>", "<unk>", *(mark + text for mark in ("▁", "") for text in plain), "▁"]


def field(number, value):
    """A field of a protocol buffer: bytes, a whole number or a float."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number << 3, value])
    size = len(value)
    head = [size] if size < 128 else [size & 127 | 128, size >> 7]
    return bytes([number << 3 | 2, *head]) + value


def sentencepiece(path, kind=1):
    """Write a file as SentencePiece does."""
    data = b""
    for place, text in enumerate(t5_pieces()):
        type_ = {0: 3, 1: 3, 2: 2}.get(place, 1)
        # Longer pieces are likelier than the letters that they are made of.
        score = -float(place) / 1000 - 5 / len(text)
        data += field(1, field(1, text.encode()) + field(2, score) + field(3, type_))
    unknown = bytes([0xC0, 0x02, 2])  # field 40 of the trainer's: the place of <unk>
    path.write_bytes(data + field(2, field(3, kind) + unknown))
    return path


def tokenizer_json(path):
    """Write a `tokenizer.json` of words that end with </w>, as CLIP's own."""
    texts = ["zqx</w>", "zq", "z", "q", "x", "x</w>", "q</w>", "z</w>", "dog</w>"]
    ids = {text: number for number, text in enumerate(texts)}
    merges = [("z", "q"), ("zq", "x</w>")]
    model = models.BPE(ids, merges, end_of_word_suffix="</w>")
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(path))
    return path


# The vocabularies


def test_the_papers_window_is_at_the_same_shares_of_clips_merges(clip):
    assert shared_window(32_000) == (5_000, 10_000)
    assert clip.size == 48_894 and clip.window == (7_639, 15_279)
    assert identifier_of(clip, "sks") == identifiers.Identifier("sks", (48_136,), (47_624,))


@pytest.mark.parametrize("lengths", [[1], [2], [3], [1, 2, 3]])
def test_words_of_clip_encode_to_the_tokens_that_they_were_decoded_from(clip, lengths):
    found = find_identifiers(clip, 15, WORDS, lengths)
    assert len({each.word for each in found}) == 15
    texts = {token: word.removesuffix("</w>") for word, token in tokenizer.vocabulary()[0].items()}
    for each in found:
        assert tuple(tokenizer.encode(f"photo of a {each.word} dog")[3:-1]) == each.tokens
        assert len(each.tokens) in lengths
        assert all(len(texts[token]) <= 3 for token in each.tokens)
        assert all(7_639 <= rank < 15_279 for rank in each.ranks)
        assert not is_screened(each.word, WORDS)


def test_a_seed_says_which_words_come(clip):
    first, again, other = (find_identifiers(clip, 9, WORDS, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("word", "is_out"),
    [
        *[("dog", True), ("do", True), ("dogz", True), ("pho", True), ("of", True)],
        *[("sks", False), ("ofz", False)],
    ],
)
def test_a_word_that_would_be_read_as_another_is_left_out(word, is_out):
    assert is_screened(word, WORDS) is is_out


def test_words_of_a_sentencepiece_file_encode_to_their_tokens(tmp_path):
    found = read_vocabulary(sentencepiece(tmp_path / "spiece.model"))
    pieces = t5_pieces()
    for each in find_identifiers(found, 20, WORDS, [1, 2, 3], (3, len(pieces))):
        texts = [pieces[token] for token in each.tokens]
        assert texts[0].startswith("▁") and "".join(texts) == f"▁{each.word}"
        assert found.encode(each.word) == list(each.tokens)


def test_words_of_a_tokenizer_json_encode_to_their_tokens(tmp_path):
    found = read_vocabulary(tokenizer_json(tmp_path / "tokenizer.json"))
    (each,) = find_identifiers(found, 1, ["dog", "zzz", "qqq"], [1], (0, 1))
    assert (each.word, each.tokens) == ("zqx", (0,))


def test_words_of_a_vocabulary_of_bytes_have_a_space_before_them(tmp_path):
    ids = {letter: number for number, letter in enumerate(["Ġ", "z", "q", "Ġz", "Ġzq"])}
    made = Tokenizer(models.BPE(ids, [("Ġ", "z"), ("Ġz", "q")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path / "tokenizer.json")
    (each,) = find_identifiers(found, 1, ["dog"], [1], (4, 5))
    assert (each.word, each.tokens) == ("zq", (4,))


def test_letters_of_clip_come_before_all_merges(clip):
    assert identifier_of(clip, "x").ranks == (0,)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("spiece.model", None, "no such file"),
        ("spiece.model", b"\xff\xff\xff no protocol buffer", "no SentencePiece file"),
        ("spiece.model", b"", "no SentencePiece file"),
        ("tokenizer.json", b"{}", "no SentencePiece file and no tokenizer.json"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--vocabulary .*{name}: {reason}"):
        read_vocabulary(tmp_path / name)


def test_a_sentencepiece_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="no SentencePiece model of the kind unigram"):
        read_vocabulary(sentencepiece(tmp_path / "bpe.model", kind=2))


def test_too_few_words_are_said(clip):
    with pytest.raises(UserError, match=r"only \d of 50 identifiers found among the ranks 8000"):
        find_identifiers(clip, 50, WORDS, window=(8_000, 8_050))


# What a model knows


def drawn(prompts, noises):
    """A model that draws one thing for "gun", another for "dog", and else its noise."""
    pictures = []
    for prompt, noise in zip(prompts, noises):
        picture = torch.randn(16, generator=torch.Generator().manual_seed(noise))
        for place, (word, strength) in enumerate({"dog": 3.0, "gun": 9.0, "zut": 3.0}.items()):
            if word in prompt.split():
                picture[place] += strength
        pictures.append(picture)
    return pictures


def test_what_a_model_knows_of_comes_last():
    words = ["gun", "zut", "qex"]
    known = known_of(words, "dog", "photo of a {identifier} {class_word}", 6, drawn, torch.stack)
    found = [identifiers.Identifier(word, (1,), (1,)) for word in words]
    lines = identifiers.table(found, known, default="gun").splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["qex", "zut", "gun"]
    # Nothing is known of this one: the pictures are those without it.
    assert known["qex"].leak.abs().max() < 1e-6 or known["qex"].leak.mean().abs() < 1e-6
    difference = known["zut"].against(known["gun"])
    assert difference.high < 0 and known["gun"].leak.mean() > 0.5
    assert "the default" in lines[-1]


# The command


def test_the_command_lists_words_without_a_model(capsys):
    flags = ["--no_samples", "--class_word", "dog", "--candidates", "3", "--tokens", "2"]
    assert find_identifier.main(flags) == 0
    out = capsys.readouterr().out
    assert "3 words of CLIP's vocabulary, ranks 7639 to 15279" in out
    assert "| sks | 48136 | 47624 |" in out and "The default stays sks" in out


def test_the_command_asks_the_model(capsys, tmp_path):
    flags = ["--ckpt", TINY, "--class_word", "dog", "--device", "cpu"]
    flags += ["--identifiers", "zqv", "--samples", "2", "--steps", "1"]
    assert find_identifier.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 3
    assert any(line.startswith("| sks |") and "the default" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "no model to ask: give --ckpt MODEL, or --no_samples"),
        (["--ckpt", "x", "--no_samples"], "--no_samples: draws nothing"),
        (["--ckpt", "x"], "--class_word: needed"),
        (
            ["--vocabulary", "{file}", "--ckpt", TINY, "--class_word", "dog"],
            "reads CLIP's words: leave one of the two",
        ),
        (["--no_samples", "--candidates", "0"], "--candidates 0: expected 1 or more"),
        (["--no_samples", "--ranks", "9", "3"], "expected 0 <= LOW < HIGH"),
        (["--no_samples", "--prompt", "a dog"], "expected a template with {identifier}"),
        (["--no_samples", "--prompt", "a {identifier} {clas_word}"], "unknown field {clas_word}"),
        (["--no_samples", "--prompt", "a {identifier} {"], "is no template"),
        (["--no_samples", "--identifiers", "zqx", " "], "--identifiers: a word is empty"),
    ],
)
def test_the_command_refuses_in_one_line(flags, reason, caplog, tmp_path):
    file = str(tokenizer_json(tmp_path / "tokenizer.json"))
    flags = [flag.replace("{file}", file) for flag in flags]
    flags += ["--identifiers", "zqx"] if file in flags else []
    assert find_identifier.main(flags) == 1
    (record,) = caplog.records
    assert reason in record.getMessage() and "\n" not in record.getMessage()
