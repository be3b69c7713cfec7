"""Every test runs with the shapes of the model's signatures checked, on two threads, offline."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from jaxtyping import install_import_hook

install_import_hook(["ldm.modules", "ldm.models"], "beartype.beartype")

import pytest

from tests import golden

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden_model():
    """The golden files' `LatentDiffusion`, in training mode; tests must leave its weights as they are."""
    return golden.latent_diffusion()


@pytest.fixture
def fresh_golden_model():
    """The same, for tests that train it."""
    return golden.latent_diffusion()
