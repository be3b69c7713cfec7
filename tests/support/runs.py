"""A run small enough for a test: the golden files' model on pictures of noise."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoints.reading import read_checkpoint
from tests.support import golden

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
# The golden model with a layer of each kind: a test of a run is not about the model. Attention is in
# the UNet's middle.
SMALL_UNET = {"channel_mult": [1], "attention_resolutions": [], "context_dim": 8}
SMALL_TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SMALL_AUTOENCODER = {"ch_mult": [1, 1]}


def pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of different pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(folder / f"{number}.png")
    return folder


def config(tmp_path: Path, **overrides: Any) -> Path:
    """A complete YAML in the reference's shape; `overrides` are `section__key=value`, levels split
    by `__`.
    """
    unet = {**golden.RECORDED["unet_config"]["params"], **SMALL_UNET, "use_checkpoint": False}
    text = {**golden.TEXT_CONFIG, **SMALL_TEXT}
    return _written(tmp_path, unet, text, SMALL_AUTOENCODER, overrides)


def golden_config(tmp_path: Path, **overrides: Any) -> Path:
    """The same YAML with the golden files' model, for tests that load or count its weights."""
    unet = golden.RECORDED["unet_config"]["params"]
    return _written(tmp_path, unet, golden.TEXT_CONFIG, {}, overrides)


def _written(
    tmp_path: Path,
    unet: dict[str, Any],
    text: dict[str, Any],
    autoencoder: dict[str, Any],
    overrides: dict[str, Any],
) -> Path:
    model = copy.deepcopy(golden.RECORDED)
    model["image_size"] = SIZE // 2
    model["unet_config"]["params"] = unet
    model["first_stage_config"]["params"]["ddconfig"] |= autoencoder
    model["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": text},
    }
    dataset = {"target": "ldm.data.personalized.PersonalizedBase"}
    plain = {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": model,
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 1,
                "num_workers": 0,
                "train": {**dataset, "params": {"size": SIZE, "set": "train", "repeats": 2}},
                "reg": {
                    **dataset,
                    "params": {"size": SIZE, "set": "train", "reg": True, "repeats": 10},
                },
            },
        },
        "lightning": {
            # A page takes half a second, which is as long as the steps.
            "callbacks": {"run_page": None},
            "modelcheckpoint": {"params": {"every_n_train_steps": 2}},
            "trainer": {"max_steps": 4, "precision": "32-true", "enable_progress_bar": False},
        },
    }
    merged = OmegaConf.merge(
        plain, OmegaConf.from_dotlist([f"{k.replace('__', '.')}={v}" for k, v in overrides.items()])
    )
    path = tmp_path / "micro.yaml"
    OmegaConf.save(merged, path)
    return path


def without_class_images(arguments: list[str]) -> list[str]:
    """A command line without the folder of class images."""
    where = arguments.index("--reg_data_root")
    return arguments[:where] + arguments[where + 2 :]


class Workspace:
    """A folder with subject photos, class images and a config, in which the training command can be
    called.
    """

    def __init__(
        self,
        path: Path,
        subject: int = 3,
        prior: int = 4,
        make_config: Callable[[Path], Path] = config,
    ):
        self.path = path
        self.make_config = make_config
        self.photos = pictures(path / "photos", subject, seed=1)
        self.class_images = pictures(path / "class_images", prior, seed=2)
        self.logs = path / "logs"

    def arguments(self, name: str, *more: str, base: Path | None = None) -> list[str]:
        """The command line of a new run; in `more`, HERE stands for this folder."""
        yaml = str(base or self.make_config(self.path))
        command = ["--base", yaml, "-t", "-n", name, "-l", str(self.logs)]
        more = tuple(word.replace("HERE", str(self.path)) for word in more)
        # Several subjects have folders of their own.
        if any(word.startswith("data.params.concepts=") for word in more):
            self.second_subject()
            return [*command, *more]
        folders = ["--data_root", str(self.photos), "--reg_data_root", str(self.class_images)]
        return [*command, *folders, "--class_word", "dog", *more]

    def second_subject(self) -> None:
        """Make photos and class images of another subject, `photos2` and `class_images2`."""
        for folder, count, seed in (("photos2", 2, 3), ("class_images2", 3, 4)):
            if not (self.path / folder).exists():
                pictures(self.path / folder, count, seed)

    def train(self, name: str, *more: str, base: Path | None = None) -> Path:
        """Train in this process; the run folder."""
        assert main.main(self.arguments(name, *more, base=base)) == 0
        return self.run(name)

    def resume(self, run: Path, *more: str) -> None:
        """Go on with a run in this process."""
        assert main.main(["-r", str(run), *more]) == 0

    def run(self, name: str) -> Path:
        """The folder of the run with this name."""
        # Behind a time, before which a single subject's folder is named.
        (folder,) = [*self.logs.glob(f"photos*_{name}"), *self.logs.glob(f"[0-9]*_{name}")]
        return folder


def checkpoint(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """What a checkpoint of a run holds."""
    return read_checkpoint(run / "checkpoints" / name)


def csv_rows(run: Path) -> list[dict[str, str]]:
    """The logged rows of all starts of a run, in order."""
    rows: list[dict[str, str]] = []
    for path in sorted(run.glob("csv/*/metrics.csv")):
        with open(path, newline="") as file:
            rows += csv.DictReader(file)
    return rows


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of training steps."""
    return [row for row in csv_rows(run) if row.get("train/loss_total")]


def same(first: Any, second: Any) -> bool:
    """Whether nested containers hold the same values, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_resumes_exactly(workspace, name, *more, at=2, steps=4):
    """Check that a run that is stopped and resumed ends where the uninterrupted one does; return
    both folders.
    """
    straight = workspace.train(f"{name}-straight", "--max_steps", str(steps), *more)
    parts = workspace.train(f"{name}-parts", "--max_steps", str(at), *more)
    workspace.resume(parts, "--max_steps", str(steps))
    ours, theirs = checkpoint(parts), checkpoint(straight)
    assert ours["global_step"] == steps
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(ours[key], theirs[key]), key
    losses = {row["step"]: row["train/loss_total"] for row in metrics(straight)}
    assert losses == {row["step"]: row["train/loss_total"] for row in metrics(parts)}
    return straight, parts
