"""Read a caption of the tiny world back: what it says of the picture."""

from ldm.tiny.accessories import ACCESSORIES
from ldm.tiny.captions import VIEWED, Words
from ldm.tiny.colours import COLOURS
from ldm.tiny.materials import MATERIALS, PATTERNS
from ldm.tiny.scenes import SCENES
from ldm.tiny.styles import ALIASES
from ldm.tiny.toys import BUILDERS

SAID_OF_VIEW = {
    view: [before.replace("{}", "").strip() or behind for before, behind in ways]
    for view, ways in VIEWED.items()
}


def read_words(caption: str) -> Words:
    """Find each kind of words in a caption; raise where a kind is said twice or nothing says the
    class.
    """
    names = {style: sorted(names, key=len, reverse=True) for style, names in ALIASES.items()}
    accessory = _only(caption, {words: [words] for words in ACCESSORIES})
    rest = caption.replace(accessory, "") if accessory else caption
    scene = _only(rest, {words: [words] for words in SCENES})
    rest = rest.replace(scene, "") if scene else rest
    style = _only(rest, names)
    for name in names.get(style, ()):
        rest = rest.replace(name, "")  # a stained glass window is not of glass
    return Words(
        class_word=_only(rest, {word: [f" {word}"] for word in BUILDERS}),
        scene=scene,
        accessory=accessory,
        colour=_only(rest, {word: [f" {word} "] for word in COLOURS}),
        material=_only(rest, {word: [f" {word} "] for word in (*MATERIALS, *PATTERNS)}),
        view=_only(rest, SAID_OF_VIEW),
        style=style,
    )


def _only(text: str, wordings: dict[str, list[str]]) -> str:
    """Return which of the keys is said in one of its wordings, "" for none; of nested ones the
    longest.
    """
    padded = f" {text.replace(',', ' ,')} "
    found = {
        key: max(map(len, said))
        for key, ways in wordings.items()
        if (said := [w for w in ways if w in padded])
    }
    if not found:
        return ""
    longest = max(found.values())
    (winner,) = [key for key, size in found.items() if size == longest]
    return winner
