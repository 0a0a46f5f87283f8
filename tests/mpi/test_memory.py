"""The ranks of a node hold one copy of a data set; it changes no bit, and a job that is killed leaves nothing of it."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

from benchmarks.memory import MB, measure
from mpifed.doctor.files import LEFT_BEHIND
from tests.launch import run_module
from tests.mpi.equality import differences, outcome

pytestmark = [pytest.mark.mpi_skip, pytest.mark.timeout(300)]

OWN = (
    "data.name=tests.unit.test_shared:photographs_of_shape",
    "data.partition.name=iid",
    "data.public_held_out=0.25",
    "algorithm.name=feddf",
    "algorithm.steps=20",
    "clients=6",
    "participation=0.5",
    "rounds=3",
    "checkpoint.every_rounds=1",
)


@pytest.mark.parametrize("share", ["auto", "off"])
def test_four_ranks_and_one_copy_of_64_megabytes(share: str, tmp_path: Path) -> None:
    """By the proportional size of the ranks, which adds up to what they use together: one copy, or four.

    Half a copy is left for labels, index lists and what the allocator keeps.
    """
    keys = ["data.name=benchmarks.memory:noise", "participation=0.5", "clients=400", "algorithm.name=fedavg"]
    found = measure(4, [*keys, f"data.share={share}"], tmp_path / "memory.json")
    together = sum(rank["held"]["pss"] - rank["before"]["pss"] for rank in found) / MB
    if share == "auto":
        assert 0.9 * 64 < together < 1.5 * 64
        assert all(rank["held"]["pss"] - rank["before"]["pss"] < 0.5 * 64 * MB for rank in found)
    else:
        assert 4 * 0.9 * 64 < together < 4.5 * 64


def shared_memory() -> set[str]:
    """What is in /dev/shm but what MPI libraries, of other jobs too, make there and may leave when a rank is killed."""
    theirs = (*LEFT_BEHIND, "mpifed-turns-*", "mpifed-doctor-*")
    return {name for name in os.listdir("/dev/shm") if not any(fnmatch(name, pattern) for pattern in theirs)}


def test_the_same_bits_though_the_reader_is_killed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """Rank 0, which read the data for all, dies in round 2; resumed, the run equals one with a copy on each rank."""
    before, killed, apart = shared_memory(), tmp_path / "killed", tmp_path / "apart"
    run_module(3, "mpifed.run", *OWN, "data.share=off", f"out={apart}", timeout=120)
    die = {"MPIFED_FAILPOINT": "server.before:2:0"}
    finished = run_module(3, "mpifed.run", *OWN, f"out={killed}", timeout=120, env=die, check=False)
    assert finished.returncode != 0
    assert shared_memory() <= before
    run_module(3, "mpifed.run", "--resume", str(killed), timeout=120)
    assert differences(outcome(apart), outcome(killed)) == []
