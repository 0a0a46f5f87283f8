"""Shared by all tests: where real data lies, and how much of the slow sweeps to run.

    python -m pytest                                  everything that needs no download
    MPIFED_DATA=~/data python -m pytest               with the tests of real data sets (torchvision's layout)
    python -m pytest --sweep                          whole sweeps in place of their sample

Tests start MPI through `tests.launch`; none has to be run under `mpirun` itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run whole sweeps instead of the sample that CI runs")


def pytest_report_header(config: pytest.Config) -> str:
    root = os.environ.get("MPIFED_DATA")
    return (
        f"real data: {root or 'none, its tests are deselected (set MPIFED_DATA to the root of torchvision data sets)'}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without real data, leave out the tests that ask for it."""
    if os.environ.get("MPIFED_DATA"):
        return
    without = [item for item in items if "data_root" not in getattr(item, "fixturenames", ())]
    if len(without) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(without)])
        items[:] = without


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Root of real data sets in torchvision's layout: `$MPIFED_DATA`. Tests that ask for it are deselected without."""
    root = Path(os.environ["MPIFED_DATA"])
    assert root.is_dir(), f"MPIFED_DATA: {root} is not a folder"
    return root


@pytest.fixture(scope="session")
def sweep(request: pytest.FixtureRequest) -> bool:
    """Whether to run whole sweeps (`--sweep`) or the sample that CI runs."""
    return bool(request.config.getoption("--sweep"))
