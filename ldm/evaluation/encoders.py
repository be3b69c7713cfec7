"""The encoders of the published protocols, from packages, hub names or local files.

Nothing is downloaded in silence or replaced: an encoder that is not there is one clear line.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.evaluation.protocols import PAPER, Preprocessing, Protocol

log = logging.getLogger(__name__)

Pictures = Sequence[Image.Image]
Features = Float[Tensor, "b d"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH = 32
HASH_DIGITS = 12
# What a folder of a hub calls its weights.
IN_FOLDERS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# DINO's own names of its encoders, as its hub has them, and timm's of the same weights.
DINO_NAMES = {
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
}
# What training code puts before the names of an encoder's weights.
PREFIXES = ("module.", "backbone.", "teacher.", "student.")


@dataclass(frozen=True)
class Encoders:
    """What scores pictures: each maps pictures, or texts, to one row each.

    Args:
        dino: pictures to features; for DINO and PRES.
        clip_image, clip_text: pictures and texts to features; for CLIP-I and CLIP-T.
        distance: two equally long lists of pictures to distances; for DIV.
        hashes: of each encoder's weights, by name. A score carries them.
    """

    dino: Callable[[Pictures], Features] | None
    clip_image: Callable[[Pictures], Features] | None
    clip_text: Callable[[Sequence[str]], Features] | None
    distance: Callable[[Pictures, Pictures], Tensor] | None
    hashes: Mapping[str, str]


def preprocess(
    pixels: Preprocessing, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """Return the published preprocessing: Pillow's bicubic scaling, the middle, mean and std."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(pixels.resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(pixels.crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def weights_hash(network: nn.Module) -> str:
    """Return digits that name a network's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


class _Network:
    """Read pictures in batches with a network, whatever their number and order."""

    def __init__(
        self,
        network: nn.Module,
        pixels: Preprocessing,
        statistics: Sequence[Sequence[float]],
        device: torch.device | str,
    ):
        self.network = network.to(device).eval().requires_grad_(False)
        self.ready, self.device = preprocess(pixels, *statistics), device
        self.hash = weights_hash(network)

    def tensor(self, pictures: Pictures) -> Tensor:
        """Return pictures as the network reads them."""
        return torch.stack([self.ready(picture.convert("RGB")) for picture in pictures])

    @torch.no_grad()
    def features(self, pictures: Pictures, encode: Callable[[Tensor], Tensor]) -> Features:
        """Return unit vectors of pictures, on the CPU."""
        rows = []
        for start in range(0, len(pictures), BATCH):
            part = self.tensor(pictures[start : start + BATCH]).to(self.device)
            rows.append(F.normalize(encode(part).float(), dim=-1).cpu())
        return torch.cat(rows)


class Dino(_Network):
    """A vision transformer of DINO (Caron et al., 2104.14294): its class token, a unit vector.

    Args:
        architecture: its name in timm, or in DINO's own hub.
        weights: a file, or a hub's folder; None for those that timm finds under the name.
    """

    def __init__(
        self,
        architecture: str,
        weights: str | Path | None = None,
        pixels: Preprocessing = PAPER.dino_pixels,
        device: torch.device | str = "cpu",
    ):
        import timm

        architecture = DINO_NAMES.get(architecture, architecture)
        try:
            network = timm.create_model(architecture, pretrained=weights is None, num_classes=0)
        except Exception as error:  # the hub's client raises whatever its transport does
            raise _not_there("DINO", architecture, "--dino", error) from error
        if weights is not None:
            _fill(network, weights, f"the DINO encoder {architecture}")
        super().__init__(network, pixels, IMAGENET, device)

    def __call__(self, pictures: Pictures) -> Features:
        return self.features(pictures, self.network)


class Clip(_Network):
    """A CLIP (Radford et al., 2103.00020) of open_clip's.

    Args:
        name: `architecture/weights` in open_clip.
        weights: a file, or a hub's folder; None for those of the name.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        pixels: Preprocessing = PAPER.clip_pixels,
        device: torch.device | str = "cpu",
    ):
        import open_clip

        architecture, _, tag = name.partition("/")
        if open_clip.get_model_config(architecture) is None:
            raise UserError(f"CLIP '{architecture}': open_clip knows no such architecture")
        # Without them, open_clip would draw weights at random, and say so in a log at most.
        if weights is None and not tag:
            raise UserError(
                f"CLIP '{name}': names no weights: give architecture/weights, such as {PAPER.clip}"
            )
        pretrained = str(weights_file(weights)) if weights is not None else tag
        try:
            network = open_clip.create_model(architecture, pretrained=pretrained)
        except Exception as error:  # as above
            if weights is not None:
                raise UserError(
                    f"{weights}: not the weights of CLIP {architecture}: {_first(error)}"
                ) from error
            raise _not_there("CLIP", name, "--clip", error) from error
        self.tokenize = open_clip.get_tokenizer(architecture)
        super().__init__(network, pixels, OPENAI, device)

    def __call__(self, pictures: Pictures) -> Features:
        encode: Any = self.network.encode_image
        return self.features(pictures, encode)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Features:
        """Return unit vectors of texts."""
        encode: Any = self.network.encode_text
        rows = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenize(list(texts[start : start + BATCH])).to(self.device)
            rows.append(F.normalize(encode(tokens).float(), dim=-1).cpu())
        return torch.cat(rows)


class Lpips(_Network):
    """The learned perceptual distance of pictures (Zhang et al., 1801.03924).

    Args:
        name: of its backbone: alex, vgg or squeeze.
        weights: of the backbone, torchvision's file; None for torchvision's own download.
    """

    def __init__(
        self,
        name: str = "alex",
        weights: str | Path | None = None,
        pixels: Preprocessing = PAPER.lpips_pixels,
        device: torch.device | str = "cpu",
    ):
        try:
            import lpips
        except ImportError as error:
            raise UserError("DIV needs the package lpips: pip install lpips") from error
        try:
            network = lpips.LPIPS(net=name, pnet_rand=weights is not None, verbose=False)
        except Exception as error:
            raise _not_there("LPIPS", name, "--lpips", error) from error
        if weights is not None:
            _fill_backbone(network, weights)
        super().__init__(network, pixels, HALF, device)

    @torch.no_grad()
    def __call__(self, first: Pictures, second: Pictures) -> Float[Tensor, " b"]:
        rows = []
        for start in range(0, len(first), BATCH):
            part = slice(start, start + BATCH)
            pair = (self.tensor(pictures[part]).to(self.device) for pictures in (first, second))
            rows.append(self.network(*pair).flatten().float().cpu())
        return torch.cat(rows)


def load_encoders(
    protocol: Protocol,
    files: Mapping[str, str | None],
    wanted: Sequence[str] = ("dino", "clip", "lpips"),
    device: torch.device | str = "cpu",
) -> Encoders:
    """Load a published protocol's encoders.

    Args:
        files: the local weights of `dino`, `clip` and `lpips`, where they are given.
        wanted: which of the three to load.

    Raises:
        UserError: one of them is not on this machine, or a file holds something else.
    """
    dino = clip = distance = None
    if "dino" in wanted:
        dino = Dino(protocol.dino, files.get("dino"), protocol.dino_pixels, device)
    if "clip" in wanted:
        clip = Clip(protocol.clip, files.get("clip"), protocol.clip_pixels, device)
    if "lpips" in wanted:
        distance = Lpips(protocol.lpips, files.get("lpips"), protocol.lpips_pixels, device)
    found = {"DINO": dino, "CLIP": clip, "LPIPS": distance}
    hashes = {name: encoder.hash for name, encoder in found.items() if encoder is not None}
    return Encoders(dino, clip, clip.text if clip else None, distance, hashes)


def weights_file(given: str | Path) -> Path:
    """Return the file of weights that is given, or that lies in a folder in a hub's layout."""
    path = Path(given)
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: no weights in this folder; looked for {', '.join(IN_FOLDERS)}"
            )
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder of weights")
    return path


def _fill(network: nn.Module, given: str | Path, what: str) -> None:
    """Load a file's weights into a network, all of them."""
    path = weights_file(given)
    state = _plain(read_checkpoint(path), path)
    wanted = network.state_dict().keys()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(
            f"{path}: not the weights of {what}: {len(missing)} of {len(wanted)} tensors are "
            f"missing, such as {missing[0]}"
        )
    try:
        network.load_state_dict({key: state[key].float() for key in wanted})
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of {what}: {_first(error)}") from error


def _plain(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return a file's tensors without what training code puts before their names."""
    for key in ("teacher", "student", "model"):  # DINO's full checkpoints
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = dict(state_dict_of(dict(content), path))
    for prefix in PREFIXES:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fill_backbone(network: nn.Module, given: str | Path) -> None:
    """Load torchvision's file of a classifier into the backbone of LPIPS."""
    path = weights_file(given)
    state = _plain(read_checkpoint(path), path)
    backbone: Any = network.net  # type: ignore[attr-defined]
    # LPIPS cuts torchvision's `features` into slices, and keeps the layers' numbers.
    wanted = {key: f"features.{key.partition('.')[2]}" for key in backbone.state_dict()}
    missing = [name for name in wanted.values() if name not in state]
    if missing:
        raise UserError(f"{path}: not the backbone of LPIPS: no {missing[0]} in it")
    try:
        backbone.load_state_dict({key: state[name].float() for key, name in wanted.items()})
    except RuntimeError as error:
        raise UserError(f"{path}: not the backbone of LPIPS: {_first(error)}") from error


def _not_there(kind: str, name: str, flag: str, error: Exception) -> UserError:
    """Return the line for an encoder that is not on this machine."""
    return UserError(
        f"{kind} {name}: not on this machine, and not to be had from its hub "
        f"({_first(error)}); give its file with {flag} FILE"
    )


def _first(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].strip()[:160]
