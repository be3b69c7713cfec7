"""A world of two things, and the YAML of a dataset of it."""

from PIL import Image, ImageDraw


def draw_sprites(root):
    """Draw two discs of each of two classes, so that a world can be trained on."""
    for class_word, colour in (("dog", "brown"), ("owl", "gray")):
        (root / class_word).mkdir()
        for family in ("noto", "twemoji"):
            image = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(image).ellipse((4, 4, 60, 60), fill=colour)
            image.save(root / class_word / f"{family}-{class_word}.png")
    return root


def world(sprites, length=6, **params):
    """Return the YAML of a dataset of these sprites."""
    return {
        "target": "ldm.tiny.world.World",
        "params": {"sprites": str(sprites), "size": 16, "length": length, "labels": True, **params},
    }
