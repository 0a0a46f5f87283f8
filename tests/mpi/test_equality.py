"""Weights, client states, metrics and logical bytes are the same on any number of ranks, bit for bit.

`reduce = "tree"` adds in another order on another number of ranks: its states are within 1e-6 of the ordered ones. CI
runs a sample of the numbers of ranks; `--sweep`, or `python -m benchmarks.equality`, all of them.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.algorithm_table import ROWS, Outcome, Row, run, with_changes
from tests.launch import ROOT, run_module
from tests.mpi.equality import Runs, cases, differences, distance, outcome, tolerance

pytestmark = [pytest.mark.mpi_skip, pytest.mark.slow, pytest.mark.timeout(3600)]

CASES = cases()
SAMPLE: dict[str, list[int]] = {"ordered": [1, 2, 3, 11], "tree": [3, 11], "resumed": [1, 2]}
EVERYTHING: dict[str, list[int]] = {"ordered": [1, 2, 3, 4, 7, 11], "tree": [1, 2, 3, 4, 7, 11], "resumed": [1, 2, 7]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    chosen = EVERYTHING if request.config.getoption("--sweep") else SAMPLE
    runs = Runs(tmp_path_factory.mktemp("equality"), CASES, **chosen)
    runs.train()
    return runs


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks(name: str, runs: Runs) -> None:
    reference = runs.reference(name)
    assert reference.tensors() and len(reference.rows) == CASES[name].rounds
    found = {ranks: differences(reference, runs.outcome("ordered", ranks, name)) for ranks in runs.ordered[1:]}
    assert found == {ranks: [] for ranks in runs.ordered[1:]}


@pytest.mark.parametrize("name", CASES)
def test_resumed_on_another_number_of_ranks(name: str, runs: Runs) -> None:
    """Two rounds on three ranks, the last on others, against all on one: client states move to other ranks."""
    found = {ranks: differences(runs.reference(name), runs.outcome("resumed", ranks, name)) for ranks in runs.resumed}
    assert found == {ranks: [] for ranks in runs.resumed}


@pytest.mark.parametrize("name", CASES)
def test_tree_is_close_and_costs_the_same(name: str, runs: Runs) -> None:
    reference = runs.reference(name)
    for ranks in runs.tree:
        added_by_mpi = runs.outcome("tree", ranks, name)
        assert distance(reference, added_by_mpi) < tolerance(name), ranks
        assert added_by_mpi.logical() == reference.logical(), ranks


def test_tree_really_adds_in_another_order(runs: Runs) -> None:
    assert any(distance(runs.reference(name), runs.outcome("tree", 3, name)) > 0 for name in CASES)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_without_mpi(row: Row, ranks: int, runs: Runs, tmp_path: Path) -> None:
    """Ranks under mpirun leave what ranks that are threads of this process leave, down to the bytes handed to MPI."""
    without, under = run(CASES[row.id], tmp_path, ranks), runs.outcome("ordered", ranks, row.id)
    assert differences(without, under) == []
    assert without.ledger == under.ledger


def test_killed_and_resumed_on_fewer_ranks(runs: Runs, tmp_path: Path) -> None:
    """Three ranks lose a client's in round 3, the two that go on the server's; one, without mpirun, ends the run."""
    name = "scaffold"
    file, folder = tmp_path / "job.toml", tmp_path / "run"
    file.write_text(with_changes(CASES[name], "checkpoint.every_rounds=1").to_toml())
    first, second = [str(file), f"out={folder}"], ["--resume", str(folder)]
    for ranks, args, rank, point in ((3, first, 1, "client.after"), (2, second, 0, "server.after")):
        fail = {"MPIFED_FAILPOINT": f"{point}:3:{rank}"}
        killed = run_module(ranks, "mpifed.run", *args, timeout=120, env=fail, check=False)
        assert killed.returncode != 0, killed
        assert max(path.name for path in folder.glob("checkpoints/*")) == "round_000002", killed
    alone = [sys.executable, "-m", "mpifed.run", "--resume", str(folder)]
    ended = subprocess.run(
        alone, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0 and "resumed after round 2 of 3" in ended.stdout, ended
    assert differences(runs.reference(name), outcome(folder)) == []


# --- the comparison itself --------------------------------------------------------------------------------------------
def test_a_single_bit_is_noticed() -> None:
    one = Outcome(
        {"model": torch.ones(4)}, {3: {"control": torch.zeros(2)}}, [row(0.5)], [[1, "train", "up", "m", 1, 8]]
    )
    assert differences(one, copy.deepcopy(one)) == [] and distance(one, copy.deepcopy(one)) == 0

    flipped, gone, scored, billed = (copy.deepcopy(one) for _ in range(4))
    flipped.server["model"].view(torch.int32)[2] ^= 1
    del gone.clients[3]
    scored.rows[0]["accuracy"] += 1e-16 + 1e-15
    billed.ledger[0][5] = 9
    assert differences(one, flipped) == ["server/model"]
    assert differences(one, gone) == ["clients/3/control is only in one"]
    assert differences(one, scored) == ["metrics"]
    assert differences(one, billed) == ["logical bytes"]
    minus_zero = copy.deepcopy(one)
    minus_zero.clients[3]["control"].neg_()
    assert differences(one, minus_zero) == ["clients/3/control"]


def test_distance_by_hand() -> None:
    """(3, 4) has norm 5; (3, 4.5) is 0.5 away from it: 0.1."""
    one = Outcome({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {}, [], [])
    other = Outcome({"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}, {}, [], [])
    assert distance(one, other) == pytest.approx(0.1)


def row(accuracy: float) -> dict:
    return {"round": 1, "accuracy": accuracy, "seconds": {"total": 1.0}, "bytes": {"logical": {"up": 8, "down": 0}}}
