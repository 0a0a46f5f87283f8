"""One undisturbed run, with which everything that was broken and went on is compared."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.kills import Sweep

RANKS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def broken_runs(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A folder of runs to break, the job run undisturbed on three ranks and on one; its seed is printed."""
    made = Sweep(tmp_path_factory.mktemp("faults"), RANKS, seed=time.time_ns() % 10**6)
    made.prepare()
    return made
