"""Whiten an autoencoder's latents: mean 0, variance 1 and uncorrelated channels.

The noise schedule is made for such latents.

    python scripts/tiny/whiten_latents.py --ckpt logs/.../checkpoints/last.ckpt \\
        --output models/tiny/first_stage.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file

from ldm.checkpoints.checkpoint import find_config
from ldm.checkpoints.loading import instantiate_filled
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config

BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", required=True, type=Path, help="a checkpoint of an autoencoder's training"
    )
    parser.add_argument("--output", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="images to measure latents on (default: %(default)s)",
    )
    return parser


@torch.no_grad()
def statistics(model: AutoencoderKL, dataset: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean (z,) and covariance (z, z) of the channels of `count` images' latents."""
    means = []
    for start in range(0, count, BATCH):
        examples = [dataset[i]["image"] for i in range(start, min(start + BATCH, count))]
        images = torch.stack([torch.as_tensor(image) for image in examples])
        mean = model.encode(rearrange(images, "b h w c -> b c h w").contiguous()).mean
        means.append(rearrange(mean, "b z h w -> z (b h w)"))
    latents = torch.cat(means, 1).double()
    return latents.mean(1), latents.cov()


def whiten(args: argparse.Namespace) -> None:
    """Measure the latents, fold the whitening into the autoencoder, and write it."""
    # The autoencoder, without the loss of its training.
    content = read_checkpoint(args.ckpt)
    config: Mapping[str, Any] = find_config(content, args.ckpt) or {}
    if "model" not in config or "data" not in config:
        raise UserError(
            f"{args.ckpt}: it does not say what it was trained on; "
            "give a checkpoint that main.py wrote"
        )
    params = {**config["model"]["params"], "lossconfig": {"target": "torch.nn.Identity"}}
    weights = state_dict_of(content, args.ckpt)
    state = {key: value for key, value in weights.items() if not key.startswith("loss.")}
    without_loss = {"target": config["model"]["target"], "params": params}
    model, _ = instantiate_filled(without_loss, state, args.ckpt)
    model.eval()

    # Measured on the images that it was trained on, before and after.
    dataset = instantiate_from_config(config["data"]["params"]["train"], "data.params.train")
    count = min(args.images, len(dataset))
    mean, covariance = statistics(model, dataset, count)
    print(f"before: means {_listed(mean)}; deviations {_listed(covariance.diag().sqrt())}")
    model.whiten(mean, covariance)
    mean, covariance = statistics(model, dataset, count)
    print(f"after:  means {_listed(mean)}; deviations {_listed(covariance.diag().sqrt())}")

    whitened = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_atomically(args.output, lambda temporary: save_file(whitened, temporary))
    print(args.output)


def _listed(values: torch.Tensor) -> str:
    """Return numbers as text, with three digits each."""
    return ", ".join(f"{value:.3g}" for value in values.tolist())


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: whiten(args))


if __name__ == "__main__":
    sys.exit(main())
