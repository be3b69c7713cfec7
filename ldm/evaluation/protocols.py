"""Named protocols: everything that a score is a function of, besides the pictures.

Papers print scores that do not compare, because each changes the encoder, the preprocessing, the
text or the pairing. A protocol pins all four, and a score carries its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldm.errors import UserError, nearest

ALL, ONE = "all pairs", "one reference"
PAIRINGS = (ALL, ONE)
KEPT, REMOVED = "kept", "removed"
IDENTIFIERS = (KEPT, REMOVED)
NO_COMPARISON = "compares with nothing else"


@dataclass(frozen=True)
class Preprocessing:
    """Scale the shorter side to `resize` pixels by Pillow's bicubic filter, then cut the middle
    `crop` x `crop` pixels out.
    """

    resize: int
    crop: int


@dataclass(frozen=True)
class Protocol:
    """What pins a score.

    Args:
        dino: the architecture and weights of the encoder of DINO and PRES, a name of timm's.
        clip: those of CLIP-I and CLIP-T, `architecture/weights` of open_clip's.
        lpips: the network of DIV, a name of lpips's.
        dino_pixels, clip_pixels: how pictures are made ready for these encoders.
        lpips_pixels: how they are made ready for LPIPS; of one size, so that pictures compare.
        identifier: whether a prompt's identifier ("sks") is kept in the text of CLIP-T.
        pairing: which real pictures a picture is compared with: all, or the only one.
        images: pictures of each prompt that the protocol asks for; None for any number.
        source: where the protocol is from, and what it leaves open.
    """

    name: str
    dino: str
    clip: str
    lpips: str = "alex"
    dino_pixels: Preprocessing = Preprocessing(256, 224)
    clip_pixels: Preprocessing = Preprocessing(224, 224)
    lpips_pixels: Preprocessing = Preprocessing(256, 256)
    identifier: str = REMOVED
    pairing: str = ALL
    images: int | None = 4
    source: str = ""

    def having(self, **changes: object) -> Protocol:
        """Return this protocol with other values, under the name `custom`.

        Raises:
            UserError: a value that is not known.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        if not given:
            return self
        for key, known in (("pairing", PAIRINGS), ("identifier", IDENTIFIERS)):
            if key in given and given[key] not in known:
                raise UserError(f"{key} {given[key]!r}: accepted: {', '.join(known)}")
        changed = replace(self, **given)  # type: ignore[arg-type]
        if changed == self:
            return self
        changes_of = ", ".join(sorted(given))
        return replace(changed, name="custom", source=f"{self.name} with another {changes_of}")


PAPER = Protocol(
    "paper",
    dino="vit_small_patch16_224.dino",
    clip="ViT-B-32-quickgelu/openai",
    source="Ruiz et al., DreamBooth, section 4.1. It names ViT-S/16 for DINO and no CLIP: ViT-B/32 "
    "is what others take. It does not say whether the identifier is in the text.",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        PAPER,
        Protocol(
            "kosmos-g",
            dino="vit_small_patch16_224.dino",
            clip="ViT-L-14-quickgelu/openai",
            source="Pan et al., Kosmos-G, and the scores in its published code.",
        ),
        Protocol(
            "dreambench++",
            dino="vit_small_patch8_224.dino",
            clip="ViT-B-32-quickgelu/openai",
            pairing=ONE,
            identifier=KEPT,
            images=None,
            source="Peng et al., DreamBench++, and its published code: one reference picture a "
            "subject, and prompts without an identifier.",
        ),
        replace(PAPER, name="custom", images=None, source="Whatever the flags say."),
    )
}
# The pictures of the miniature are 64 x 64: its own encoders read nothing else.
MINIATURE = Protocol(
    "miniature",
    dino="EfficientNet-Lite0",
    clip="the miniature's CLIP",
    lpips="EfficientNet-Lite0",
    dino_pixels=Preprocessing(64, 64),
    clip_pixels=Preprocessing(64, 64),
    lpips_pixels=Preprocessing(64, 64),
    images=None,
    source=f"The miniature's own encoders: {NO_COMPARISON}.",
)
PROTOCOLS[MINIATURE.name] = MINIATURE


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name; raise a `UserError` for another."""
    if name not in PROTOCOLS:
        hint = nearest(name, PROTOCOLS)
        raise UserError(f"protocol '{name}': unknown{hint}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def without_identifier(prompt: str, identifier: str) -> str:
    """Return a prompt without its identifier: "a sks dog" becomes "a dog"."""
    words = [word for word in prompt.split() if word != identifier]
    return " ".join(words)
