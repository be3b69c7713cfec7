"""The autoencoder's objective: pixels, perceptual distance, KL and a patch discriminator.

Rombach et al., 2112.10752, appendix G.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import ParameterError, UserError, nearest
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

Images = Float[Tensor, "b c h w"]
Scalar = Float[Tensor, ""]

# Perceptual distance

VGG16_FILE = "vgg16-397923af.pth"
# Indices of VGG16's convolutions in torchvision's `features`, by resolution. LPIPS compares the
# last of each.
VGG16_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class LPIPS(nn.Module):
    """Learned perceptual distance of images in [-1, 1], of VGG16's features (Zhang et al.,
    1801.03924).

    The weights are buffers that are not saved: no optimizer changes them, and a checkpoint needs
    no copy.

    Args:
        vgg_path: torchvision's VGG16 weights; by default where torchvision would have cached them.

    Raises:
        UserError: that file is missing or something else. Nothing is ever downloaded.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg_path: str | None = None):
        super().__init__()
        vgg = load_vgg16(vgg_path)
        linear = load_linear_weights()
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False
        )
        for level, convs in enumerate(VGG16_CONVS):
            self.register_buffer(
                f"linear{level}", linear[f"lin{level}.model.1.weight"], persistent=False
            )
            for conv in convs:
                for name in ("weight", "bias"):
                    self.register_buffer(
                        f"{name}{conv}", vgg[f"features.{conv}.{name}"], persistent=False
                    )

    def forward(
        self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 1 1 1"]:
        """Return the distance of each pair."""
        distances = []
        for level, (fx, fy) in enumerate(zip(self._features(x), self._features(y))):
            difference = (_unit(fx) - _unit(fy)) ** 2
            distances.append(
                F.conv2d(difference, self.get_buffer(f"linear{level}")).mean((2, 3), keepdim=True)
            )
        return torch.stack(distances).sum(0)

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        h = (x - self.shift) / self.scale
        for level, convs in enumerate(VGG16_CONVS):
            h = F.max_pool2d(h, 2) if level else h
            for conv in convs:
                weight, bias = self.get_buffer(f"weight{conv}"), self.get_buffer(f"bias{conv}")
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            yield h


def _unit(features: Tensor) -> Tensor:
    # float32: squares of a half-precision feature map overflow.
    features = features.float()
    # Inside the root, so that the gradient at a pixel without any feature is zero and not NaN.
    norm = (features.square().sum(1, keepdim=True) + 1e-20).sqrt()
    return features / (norm + 1e-10)


def load_vgg16(path: str | None = None) -> dict[str, Tensor]:
    """Read VGG16's weights from `path` or torchvision's cache; a `UserError` if there are none."""
    file = Path(path).expanduser() if path else Path(torch.hub.get_dir(), "checkpoints", VGG16_FILE)
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; the perceptual loss needs torchvision's VGG16 weights "
            f"({VGG16_FILE}): "
            "name them with lossconfig.params.lpips_path, or do without by "
            "lossconfig.params.perceptual_weight: 0"
        )
    weights = torch.load(file, map_location="cpu", weights_only=True)
    last = f"features.{VGG16_CONVS[-1][-1]}.weight"
    if last not in weights:
        raise UserError(
            f"{file}: no VGG16 weights of torchvision ({VGG16_FILE}): it has no '{last}'"
        )
    return weights


def load_linear_weights() -> dict[str, Tensor]:
    """Read the weight of each VGG channel, from the original file, which torchmetrics ships."""
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    return torch.load(file, map_location="cpu", weights_only=True)


# Adversarial losses of the discriminator's logits


def hinge_loss(real: Tensor, fake: Tensor) -> Scalar:
    """Return the hinge loss: real logits should exceed 1, fake ones fall below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Scalar:
    """Return the binary cross-entropy."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_loss,
    "vanilla": vanilla_loss,
}
PIXEL_LOSSES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


class LPIPSWithDiscriminator(nn.Module):
    """What autoencoder and discriminator minimise; images in [-1, 1].

    Args:
        disc_start: optimizer step from which on there is a discriminator.
        logvar_init: log variance of the pixels in the reconstruction's likelihood.
        kl_weight, pixelloss_weight, perceptual_weight: weights of the terms.
        disc_num_layers, disc_in_channels, disc_ch, use_actnorm: the discriminator's shape.
        disc_factor, disc_weight: the adversarial term's weight is their product, times the ratio of
            the gradients of reconstruction and discriminator at the decoder's last layer.
        disc_loss: hinge or vanilla.
        pixel_loss: l1 or l2.
        lpips_path: see `LPIPS`.

    Raises:
        UserError: a value outside of what is listed here, or no weights for the perceptual loss.
    """

    logvar: Tensor

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        pixel_loss: str = "l1",
        disc_ch: int = 64,
        lpips_path: str | None = None,
    ):
        super().__init__()
        if disc_conditional:
            raise ParameterError("disc_conditional", "not supported; remove it or set it to false")
        self.disc_loss = _choice("disc_loss", disc_loss, DISC_LOSSES)
        self.pixel_loss = _choice("pixel_loss", pixel_loss, PIXEL_LOSSES)
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.kl_weight, self.pixel_weight, self.perceptual_weight = (
            kl_weight,
            pixelloss_weight,
            perceptual_weight,
        )
        # A constant: CompVis declares it a parameter, but no optimizer of theirs holds it.
        self.register_buffer("logvar", torch.tensor(float(logvar_init)))
        self.perceptual_loss = LPIPS(lpips_path) if perceptual_weight > 0 else None
        self.discriminator = make_discriminator(
            disc_in_channels, disc_ch, disc_num_layers, use_actnorm
        )

    def discriminates(self, step: int) -> bool:
        """Return whether the discriminator takes part in this optimizer step."""
        return self.disc_factor > 0 and step >= self.disc_start

    def reconstruction_loss(
        self,
        inputs: Images,
        reconstructions: Images,
        posterior: DiagonalGaussianDistribution,
        split: str,
    ) -> tuple[Scalar, Scalar, dict[str, Tensor]]:
        """Return negative log-likelihood and KL of each sample, their means, and what to log."""
        inputs, reconstructions = inputs.float(), reconstructions.float()
        rec = self.pixel_weight * self.pixel_loss(reconstructions, inputs, reduction="none")
        if self.perceptual_loss is not None:
            rec = rec + self.perceptual_weight * self.perceptual_loss(inputs, reconstructions)
        nll = (rec / self.logvar.exp() + self.logvar).sum() / len(inputs)
        kl = posterior.kl().mean()
        return nll, kl, _log(split, rec_loss=rec.mean(), nll_loss=nll, kl_loss=kl)

    def generator_loss(
        self,
        inputs: Images,
        reconstructions: Images,
        posterior: DiagonalGaussianDistribution,
        step: int,
        last_layer: Tensor,
        split: str = "train",
    ) -> tuple[Scalar, dict[str, Tensor]]:
        """Return the autoencoder's loss: reconstruct, stay near the prior, fool the other."""
        nll, kl, log = self.reconstruction_loss(inputs, reconstructions, posterior, split)
        loss = nll + self.kl_weight * kl
        if self.discriminates(step):
            g_loss = -self.discriminator(reconstructions).float().mean()
            weight = self.disc_weight * adaptive_weight(nll, g_loss, last_layer)
            loss = loss + self.disc_factor * weight * g_loss
            log |= _log(split, g_loss=g_loss, d_weight=weight)
        return loss, log | _log(split, total_loss=loss)

    def discriminator_loss(
        self, inputs: Images, reconstructions: Images, split: str = "train"
    ) -> tuple[Scalar, dict[str, Tensor]]:
        """Return the discriminator's loss, of how it tells images from their reconstructions."""
        real = self.discriminator(inputs).float()
        fake = self.discriminator(reconstructions.detach()).float()
        loss = self.disc_factor * self.disc_loss(real, fake)
        return loss, _log(split, disc_loss=loss, logits_real=real.mean(), logits_fake=fake.mean())


def make_discriminator(in_channels: int, ch: int, layers: int, use_actnorm: bool) -> nn.Module:
    """Make taming-transformers' patch discriminator, initialised as in pix2pix."""
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    return NLayerDiscriminator(in_channels, ch, layers, use_actnorm).apply(weights_init)


def adaptive_weight(nll: Scalar, g_loss: Scalar, last_layer: Tensor) -> Scalar:
    """Return the ratio of two losses' gradient norms at `last_layer` (Esser et al., eq. 7)."""
    nll_grad, g_grad = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll, g_loss)
    )
    return (nll_grad.float().norm() / (g_grad.float().norm() + 1e-4)).clamp(0.0, 1e4).detach()


def _choice(
    key: str, name: str, choices: dict[str, Callable[..., Tensor]]
) -> Callable[..., Tensor]:
    if name not in choices:
        hint = nearest(name, list(choices))
        raise ParameterError(key, f"unknown '{name}'{hint}; accepted: {', '.join(choices)}")
    return choices[name]


def _log(split: str, **values: Tensor) -> dict[str, Tensor]:
    return {f"{split}/{name}": value.detach() for name, value in values.items()}
