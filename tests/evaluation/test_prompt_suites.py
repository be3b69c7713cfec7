"""Suites of prompts: they parse, and the miniature's say nothing that its world has no words
for.
"""

import pytest

from ldm.errors import UserError
from ldm.evaluation.prompt_suites import FOLDER, filled, read_suite
from ldm.tiny.accessories import ACCESSORIES
from ldm.tiny.captions import PHOTO, VIEWED, with_article
from ldm.tiny.colours import COLOURS
from ldm.tiny.materials import MATERIALS, PATTERNS
from ldm.tiny.scenes import SCENES
from ldm.tiny.styles import ALIASES

REAL, TINY = sorted(FOLDER.glob("*.yaml")), sorted((FOLDER / "tiny").glob("*.yaml"))
APPLICATIONS = {"recontext", "art", "views", "properties", "accessories", "expressions", "hybrids"}


def words_of_the_world():
    """Every word that a caption of the world may have, and the identifier."""
    phrases = [
        *(text for text, _ in PHOTO),
        *(part for ways in VIEWED.values() for way in ways for part in way),
        *(with_article(name) for names in ALIASES.values() for name in names),
        *SCENES,
        *ACCESSORIES,
        *COLOURS,
        *MATERIALS,
        *PATTERNS,
        "a painting of in the style of",
        "a dog sks",
    ]
    return {word for phrase in phrases for word in phrase.replace("{}", "").split()}


def test_every_application_has_a_suite():
    assert {path.stem for path in REAL} >= APPLICATIONS
    assert APPLICATIONS - {"expressions", "hybrids"} <= {path.stem for path in TINY}


@pytest.mark.parametrize("path", [*REAL, *TINY], ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_suite_parses_and_is_filled(path):
    templates = read_suite(path)
    prompts = filled(templates, "dog")
    assert len(set(prompts)) == len(templates) >= 5
    assert all(
        "dog" in prompt and "{" not in prompt and prompt == prompt.strip() for prompt in prompts
    )
    if path.stem != "class":
        assert all("sks dog" in prompt for prompt in prompts)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_the_miniatures_suites_use_words_of_its_world_alone(path):
    known = words_of_the_world()
    for prompt in filled(read_suite(path), "dog"):
        assert set(prompt.split()) <= known, f"{prompt}: {set(prompt.split()) - known}"


def test_the_miniatures_suites_have_every_word_of_its_world():
    said = " ".join(template for path in TINY for template in read_suite(path))
    for word in (*COLOURS, *MATERIALS, *PATTERNS, *ACCESSORIES, *VIEWED, *ALIASES):
        assert word in said, word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a {subjet} in the snow", "unknown field {subjet}.*did you mean 'subject'"),
        ("- a dog", "names neither {subject} nor {class}"),
        ("- a {subject", "is no template"),
        ("prompts: none", "expected a YAML list of prompts"),
        ("- [a]", "expected a YAML list of prompts"),
        ("- '", "cannot read this suite"),
        ("- a {subject!x}", "without a format"),
        ("- a {subject:9d}", "without a format"),
        ("\tx:", "cannot read this suite"),
    ],
)
def test_a_suite_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_suite(path)
    with pytest.raises(UserError, match="cannot read this suite"):
        read_suite(tmp_path / "nowhere.yaml")
