"""Routes on real MPI: the bits of a run do not depend on them, and each kind's bytes on the wire are those handed over.

Everything is one launch of five ranks that talk over TCP and pretend to be on three nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from mpifed.comm.communicator import Communicator
from mpifed.job import Job, load
from mpifed.storage.record import Record, read_record
from tests.algorithm_table import ROWS, job_of, run, with_changes
from tests.launch import mpirun, run_ranks
from tests.mpi.equality import differences, outcome
from tests.mpi.equality import train as train_all

pytestmark = pytest.mark.mpi_skip

PLACES = ["a", "b", "a", "b", "c"]
OVER_TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "MPIR_CVAR_NOLOCAL": "1"}

LONG = load(
    None,
    [
        *("algorithm.name=scaffold", "rounds=2", "clients=6", "local.steps=2", "model.hidden=[2000]"),
        *("evaluate.every_rounds=0", "checkpoint.every_rounds=0"),
    ],
)
"""Two fields each way of 150,010 elements, which are added exactly: 600,040 bytes down, 1,200,080 up."""
ELEMENTS = 64 * 2000 + 2000 + 2000 * 10 + 10

JOBS: dict[str, Job] = {"scaffold": LONG} | {
    row.id: job_of(row, rounds=2) for row in ROWS if row.id in ("fedftg", "fedmd")
}
ROUTES = {"scaffold": ("flat", "tree", "hierarchical"), "fedftg": ("hierarchical",), "fedmd": ("hierarchical",)}


def train(commands: Sequence[Sequence[str]]) -> list[int]:
    """On every rank: `tests.mpi.equality.train`, each rank on the node where it pretends to be."""
    with patch.object(Communicator, "host", lambda comm: PLACES[comm.rank]):
        return train_all(commands)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("collectives")
    found, commands = {}, []
    for name, job in JOBS.items():
        for route in ROUTES[name]:
            changed = with_changes(job, f"collectives={route}", "turns=off")
            if (name, route) == ("scaffold", "tree"):  # two messages up, of one kind each
                changed = with_changes(changed, 'collectives={down = "tree", "up.update" = "tree"}')
            file = folder / f"{name}-{route}.toml"
            file.write_text(changed.to_toml())
            found[name, route] = folder / f"{name}-{route}"
            commands.append([str(file), f"out={found[name, route]}"])
    codes = run_ranks(
        "tests.mpi.test_collectives:train", len(PLACES), timeout=240, arguments={"commands": commands}, env=OVER_TCP
    )
    assert codes == [[0] * len(commands)] * len(PLACES)
    return found


@pytest.mark.parametrize("name", JOBS)
def test_the_bits_do_not_depend_on_the_route(name: str, runs: Mapping[tuple[str, str], Path], tmp_path: Path) -> None:
    """Against one rank without MPI; and what is handed to MPI is what five threads hand over."""
    alone = run(JOBS[name], tmp_path / "alone")
    for route in ROUTES[name]:
        assert differences(alone, outcome(runs[name, route])) == [], route
    job = with_changes(JOBS[name], "collectives=hierarchical")
    threads = run(job, tmp_path / "threads", len(PLACES), hosts=PLACES)
    assert _exchanged(threads.ledger) == _exchanged(outcome(runs[name, "hierarchical"]).ledger)


def _exchanged(ledger: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    return [entry for entry in ledger if entry[2] != "control"]


def wire(record: Record, direction: str) -> dict[str, int]:
    """Bytes on the wire by kind, over all rounds and ranks."""
    columns = record.wire
    own = columns["direction"] == direction
    return {
        str(kind): int(columns["sent"][own & (columns["kind"] == kind)].sum())
        for kind in np.unique(columns["kind"][own])
    }


@pytest.mark.skipif(mpirun()[1] != "mpich", reason="the settings are MPICH's")
def test_wire_bytes_by_kind(runs: Mapping[tuple[str, str], Path]) -> None:
    """Two rounds of four models down, and of four sums up along a route: of each kind at least the payload, and less
    than 1 % more; down both kinds travel in one message, and stand under both names."""
    down, up = 2 * 4 * 2 * 4 * ELEMENTS, 2 * 4 * 8 * ELEMENTS
    for route in ("flat", "tree", "hierarchical"):
        record = read_record(runs["scaffold", route] / "run.h5")
        assert record.provenance["wire"] == "tcp_info"
        found = wire(record, "down")
        assert list(found) == ["control+model"] and down <= found["control+model"] < 1.01 * down, route
        found = wire(record, "up")
        assert list(found) == ["control_update", "update"]
        assert all(up <= size < 1.01 * up for size in found.values()), (route, found)
        control = wire(record, "control")
        assert list(control) == ["control"] and 0 < control["control"] < 200_000
    flows = read_record(runs["scaffold", "hierarchical"] / "run.h5").wire_flows
    pairs = {
        (int(sender), int(receiver))
        for way, sender, receiver, sent in zip(*flows.values(), strict=True)
        if way == "down" and sent >= 2 * 2 * 4 * ELEMENTS
    }
    assert pairs == {(0, 1), (0, 2), (0, 4), (1, 3)}
