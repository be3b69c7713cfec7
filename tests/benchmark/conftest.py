"""What the tests of the benchmark share."""

import pytest

from ldm.benchmark import rows


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: the importing takes a fresh one longer than the measuring."""
    monkeypatch.setattr(
        rows, "in_own_process", lambda function, *arguments, environment=None: function(*arguments)
    )
    monkeypatch.setattr(rows, "matmul_rate", lambda device, dtype, threads, clock: 1e12)
