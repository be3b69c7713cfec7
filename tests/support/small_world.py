"""A world of two things, the YAML of a dataset of it, and a run of any model on that."""

from omegaconf import OmegaConf
from PIL import Image, ImageDraw

import main


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


def trained(tmp_path, target, params, dataset, batch_size, steps, more=()):
    """Train a model by the command, at a rate of 1e-3; return the run's folder."""
    yaml = {
        "model": {"base_learning_rate": 1e-3, "target": target, "params": params},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": batch_size, "num_workers": 0, "train": dataset},
        },
        "lightning": {"trainer": {"max_steps": steps, "enable_progress_bar": False}},
    }
    OmegaConf.save(yaml, base := tmp_path / "trained.yaml")
    command = ["--base", str(base), "-t", "-l", str(tmp_path / "logs"), "-n", "it", *more]
    assert main.main(command) == 0
    (run,) = tmp_path.glob("logs/*_it")
    return run
