"""What the tests of the callbacks share."""

import pytest

from tests.support.runs import Workspace


@pytest.fixture(scope="package")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("watched"))


@pytest.fixture(scope="package")
def plain(workspace):
    """A run that nothing watches."""
    return workspace.train("plain", "lightning.callbacks.first_step=null")


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")
