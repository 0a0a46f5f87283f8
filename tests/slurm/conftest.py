"""A Slurm of four nodes for all tests here, and an undisturbed run, with which every interrupted one is compared.

Where Slurm cannot run, these tests are skipped, with the reason; `.ci/run` installs it where it can.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.outcome import Outcome
from tests.launch import run_module
from tests.slurm.cluster import Cluster, SlurmUnavailable, require
from tests.slurm.site import JOB, Site

RANKS = 3


def pytest_report_header(config: pytest.Config) -> str:
    try:
        require()
    except SlurmUnavailable as why:
        return f"Slurm: none, tests/slurm is skipped: {why}"
    return "Slurm: four nodes on this machine, for tests/slurm"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of four cores each."""
    try:
        require()
    except SlurmUnavailable as why:
        pytest.skip(str(why))
    with tempfile.TemporaryDirectory(prefix="mpifed-slurm-") as folder:  # short: it holds munge's socket
        with Cluster(Path(folder), nodes=4) as started:
            yield started
        assert started.processes() == []


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The job on three ranks of this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_module(RANKS, "mpifed.run", JOB, f"out={folder}", timeout=120)
    return Outcome.read(folder)


@pytest.fixture(scope="session")
def site(cluster: Cluster, undisturbed: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Where a user of the cluster works: a folder with `slurm/` in it."""
    return Site(cluster, tmp_path_factory.mktemp("site"), undisturbed)
