"""Tests on real MPI, in two ways: started by plain pytest, and together on the world of a launch of pytest itself.

    python -m pytest tests/mpi                              starts every mpirun that it needs
    mpirun -n 4 python -m pytest --with-mpi tests/mpi       runs the tests marked `mpi` on these four ranks

The marks are those of pytest-mpi, and a test with a mark belongs to one of the two ways: `mpi` are left out of plain
pytest, where the same checks run under an mpirun of their own; tests that start an mpirun are `mpi_skip`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

from mpifed.comm.communicator import Communicator

LIMIT = 120
"""Seconds after which a test on the world is ended, and with it all ranks."""


def _on_the_world(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other_way = "mpi_skip" if _on_the_world(config) else "mpi"
    left_out = [item for item in items if item.get_closest_marker(other_way)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:  # pytest-mpi takes the name of this folder, a keyword of every test in it, for the mark
        item.own_markers[:] = [mark for mark in item.own_markers if "--with-mpi" not in mark.kwargs.get("reason", "")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A rank that fails says so and ends the others: they may wait for it, and its next test would meet their last."""
    report = yield
    if report.failed and item.get_closest_marker("mpi") and _on_the_world(item.config):
        comm: Communicator = item.funcargs["world"]  # type: ignore[attr-defined]
        print(f"rank {comm.rank}: {item.nodeid} failed\n{report.longreprtext}", file=sys.stderr, flush=True)
        comm.abort(1)
    return report


@pytest.fixture(scope="session")
def world() -> Communicator:
    """The communicator of the ranks that pytest itself runs on."""
    from mpifed.comm.mpi import Mpi

    return Mpi()
