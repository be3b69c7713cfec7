"""What the tests of studies share."""

import pytest

import main
from ldm.errors import UserError
from tests.support.runs import Workspace


@pytest.fixture(scope="package")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="package")
def base_model(workspace):
    """The golden model's weights after a step."""
    return workspace.train("base", "--max_steps", "1") / "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Run the training command in this process: a new one imports for as long as it trains.

    Returns:
        the arguments of each call.
    """
    calls = []

    def train(arguments, log_file):
        calls.append(list(arguments))
        if status := main.main(list(arguments)):
            raise UserError(f"{log_file}: the training ended with status {status}")

    monkeypatch.setattr("ldm.studies.training.train", train)
    return calls


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")
