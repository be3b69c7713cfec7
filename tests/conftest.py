"""Every test runs with the shapes of the model's signatures checked, offline."""

import gc
import os
import sys

from tests.support.in_memory import keep_files_in_memory

# Keep compiled files, for the processes that tests start too: without them each import of torch and
# its company takes 15 seconds of processor instead of 6. Some containers forbid it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

keep_files_in_memory()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from jaxtyping import install_import_hook

import tests.support.typechecker  # noqa: F401 - the hook looks it up by name

install_import_hook(["ldm.modules", "ldm.models"], "tests.support.typechecker.typechecker")

import pytest
import torch

from tests.support import golden, processors

# One thread, too: the models are so small that a second one costs more than it brings, most of all
# on a busy machine.
processors.pretend()


# What takes longest begins: then two processes that share the files end at about the same time.
LONGEST = (
    "test_exactness.py",
    "test_miniature.py",
    "test_training.py",
    "test_stops.py",
    "test_memory.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """Leave what is imported out of the search for garbage: it is two thirds of a million things,
    and looking through them takes a fifteenth of the time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let everything end as it would."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def other_rounding():
    """Compute with the rounding of another processor, where the environment asks for one."""
    with processors.rounding():
        yield


@pytest.fixture(scope="session")
def kept_golden_model():
    """The golden files' `LatentDiffusion`, made once."""
    return golden.latent_diffusion()


@pytest.fixture
def golden_model(kept_golden_model):
    """The same in training mode, whatever the test before left it in; tests must leave its weights
    as they are.
    """
    return kept_golden_model.train()


@pytest.fixture
def fresh_golden_model():
    """The same, for tests that train it."""
    return golden.latent_diffusion()


@pytest.fixture
def one_thread():
    """Compute on one thread, as the processes of `tests.support.together` do, whatever
    TEST_THREADS says: other sums round otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
