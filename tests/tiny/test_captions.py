"""Captions: the paper's phrasing, and no more words than were asked for."""

import numpy as np
import pytest

from ldm.tiny.captions import VIEWED, Words, compose_caption, with_article
from ldm.tiny.styles import ALIASES, STYLES
from ldm.tiny.views import VIEWS
from tests.tiny.reading import read_words


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("dog", "a dog"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("orange car", "an orange car"),
        ("red glasses", "red glasses"),
    ],
)
def test_articles(noun, phrase):
    assert with_article(noun) == phrase


def said(words, count=300):
    return {compose_caption(np.random.default_rng(n), words) for n in range(count)}


def test_the_papers_phrases_come_up():
    assert "a photo of a red dog in the snow" in said(Words("dog", "in the snow", colour="red"))
    assert "a dog wearing a red hat" in said(Words("dog", accessory="wearing a red hat"))
    assert "a striped red vase on the beach" in said(
        Words("vase", "on the beach", "red", "striped")
    )
    assert "a painting of a dog in the style of a pencil sketch" in said(
        Words("dog", style="pencil sketch")
    )
    assert "pixel art of a dog" in said(Words("dog", style="pixel art"))
    behind = said(Words("dog", "in the snow", view="from behind"))
    assert {
        "a photo of a dog from behind in the snow",
        "a back view of a dog in the snow",
    } <= behind


@pytest.mark.parametrize("view", ["", *VIEWS])
@pytest.mark.parametrize("style", ["", "pixel art", "oil painting"])
def test_a_caption_says_what_it_was_given_and_nothing_else(view, style):
    if style and not any(behind for _, behind in VIEWED.get(view, (("", "-"),))):
        pytest.skip("the world draws no close-up in a style")
    for words in (
        Words("dog", "in the snow", "red", "", "wearing sunglasses", view, style),
        Words("stuffed animal", "", "", "golden", "", view, style),
        Words("glasses", "on a red background", "pink", "spotted", "", view, style),
    ):
        for caption in said(words, 60):
            assert read_words(f" {caption}") == words, caption


def test_every_style_and_view_has_words():
    assert set(ALIASES) == set(STYLES) and set(VIEWED) == set(VIEWS)
