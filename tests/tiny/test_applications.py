"""What the demo asks of a subject, and what it says of class words that the world does not have."""

import pytest

from ldm.tiny import applications
from ldm.tiny.accessories import ACCESSORIES
from ldm.tiny.colours import COLOURS
from ldm.tiny.materials import MATERIALS, PATTERNS
from ldm.tiny.styles import STYLES
from ldm.tiny.views import VIEWS


@pytest.mark.parametrize(
    "word, expected, said",
    [
        ("dog", "dog", ""),
        ("Dog", "dog", "calls a Dog 'dog'"),
        ("puppy", "dog", "calls a puppy 'dog'"),
        ("violin", "violin", "has never seen a 'violin'"),
    ],
)
def test_a_class_word_becomes_the_worlds_own(word, expected, said):
    found, line = applications.world_word(word)
    assert found == expected and said in line and bool(line) == bool(said)


def test_every_other_name_stands_for_a_known_thing():
    known = set(applications.known_classes())
    assert set(applications.SAME.values()) <= known
    assert not known & set(applications.SAME)


@pytest.mark.parametrize("class_word", applications.known_classes())
def test_what_is_asked_for_is_in_the_world(class_word):
    rows = applications.applications(class_word)
    words = {*STYLES, *VIEWS, *COLOURS, *MATERIALS, *PATTERNS, *ACCESSORIES}
    assert {word for row in rows.values() for word in row} <= words
    assert all(f"sks {class_word}" in prompt for row in rows.values() for prompt in row.values())


def test_only_what_has_a_head_wears_something():
    wearing = {
        w for w in applications.known_classes() if "accessories" in applications.applications(w)
    }
    assert wearing == applications.WITH_A_HEAD and "vase" not in wearing
