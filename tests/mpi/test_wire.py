"""Wire counters on real MPI: MPICH over TCP, where the kernel counts, and Open MPI, which counts itself.

Open MPI is tested in an environment of its own (the fixture `open_mpi`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpifed.storage.record import read_record
from mpifed.storage.run_folder import RunFolder
from tests.launch import ROOT, in_environment, launch, mpirun, run_ranks

pytestmark = pytest.mark.mpi_skip

OVER_TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "MPIR_CVAR_NOLOCAL": "1"}
"""MPICH: TCP between all ranks, no shared memory."""
BYTES = 2_000_000


def found_on(python: str, ranks: int, env: dict[str, str], **arguments: Any) -> list[dict[str, Any]]:
    """`wire_checks.measured(**arguments)` of every rank, in the environment of that python."""
    code = "import json, sys; from tests.launch import run_ranks; print(json.dumps(run_ranks(**json.load(sys.stdin))))"
    task = {"function": "tests.mpi.wire_checks:measured", "ranks": ranks, "timeout": 60, "env": env}
    found: list[dict[str, Any]] = json.loads(in_environment(python, code, task | {"arguments": arguments}))
    return found


# --- the kernel's counts ----------------------------------------------------------------------------------------------
def check_tcp(found: list[dict[str, Any]], ranks: int) -> None:
    """A broadcast brings BYTES to every other rank, a gather from every other rank. Headers are added: at least the
    payload, and of messages of 2 MB not 10 % more. A reduction may scatter the vector, add its parts apart, and gather
    them (Rabenseifner's algorithm), which moves up to as much again.
    """
    assert [one["source"] for one in found] == ["tcp_info"] * ranks, found
    payload = (ranks - 1) * BYTES
    for name, most in (("broadcast", 1.1), ("gather", 1.1), ("reduce", 2.1)):
        by_rank, flows = found[0][name]
        sent, received = sum(count[0] for count in by_rank), sum(count[1] for count in by_rank)
        assert payload <= sent <= most * payload, name
        assert abs(sent - received) < 1000, name  # a barrier's last bytes may be counted before or after
        assert sum(size for _, _, size in flows) == sent
    assert found[0]["gather"][0][0][1] >= payload  # at rank 0
    assert {(sender, receiver) for sender, receiver, size in found[0]["gather"][1] if size >= BYTES} == {
        (rank, 0) for rank in range(1, ranks)
    }
    assert found[0]["microseconds"] < 5000  # 60 on an idle core


@pytest.mark.skipif(mpirun()[1] != "mpich", reason="the settings are MPICH's")
def test_mpich_over_tcp() -> None:
    check_tcp(found_on(sys.executable, 3, OVER_TCP, wanted="auto", nbytes=BYTES), 3)


def test_open_mpi_over_tcp(open_mpi: str) -> None:
    check_tcp(found_on(open_mpi, 3, {"OMPI_MCA_btl": "tcp,self"}, wanted="tcp_info", nbytes=BYTES), 3)


@pytest.mark.skipif(mpirun()[1] != "mpich", reason="the settings are MPICH's")
def test_a_run_over_tcp_and_its_resume(tmp_path: Path) -> None:
    """A model of 64 * 4000 + 4000 + 4000 * 10 + 10 = 300,010 parameters, 1.2 MB: what comes down to the other rank is
    on the wire, with headers. The sums of a resumed run go on, and what it said to begin with is in no round."""
    out = tmp_path / "run"
    job = [
        "-m",
        "mpifed.run",
        "algorithm.name=fedavg",
        "rounds=1",
        "model.hidden=[4000]",
        "local.steps=1",
        "evaluate.every_rounds=0",
    ]
    launch(2, [*job, f"out={out}"], timeout=120, env=OVER_TCP)
    launch(2, ["-m", "mpifed.run", "--resume", str(out), "rounds=3"], timeout=120, env=OVER_TCP)

    record = read_record(out / "run.h5")
    ledger, wire, flows = record.ledger, record.wire, record.wire_flows
    assert record.provenance["wire"] == "tcp_info"
    for round_ in (1, 2, 3):
        came_down = (ledger["round"] == round_) & (ledger["direction"] == "down") & (ledger["rank"] > 0)
        payload = ledger["mpi_received"][came_down].sum()
        assert payload == 4 * 300_010
        sent = wire["sent"][(wire["round"] == round_) & (wire["direction"] == "down")].sum()
        received = wire["received"][(wire["round"] == round_) & (wire["direction"] == "down")].sum()
        assert payload <= sent <= 1.1 * payload and payload <= received <= sent
    for way in ("down", "up", "control"):
        assert flows["sent"][flows["direction"] == way].sum() == wire["sent"][wire["direction"] == way].sum() > 0
    assert record.metrics["bytes.wire.source"] == ["tcp_info"] * 3
    assert sum(record.metrics["bytes.wire.sent"]) == wire["sent"].sum()
    summary = RunFolder.open(out).read_summary()
    assert summary is not None and summary["bytes"]["wire"]["sent"] == wire["sent"].sum()
    assert summary["bytes"]["wire"]["rounds"] == 3 and summary["resumed"] == 1


def test_open_mpi_counts_a_run(open_mpi: str, tmp_path: Path) -> None:
    """`measure_wire=mpi_t` turns the counters on by itself. Down comes exactly the model, to the other rank."""
    out = tmp_path / "run"
    job = [
        "-m",
        "mpifed.run",
        "algorithm.name=fedavg",
        "rounds=2",
        "local.steps=1",
        "evaluate.every_rounds=0",
        "measure_wire=mpi_t",
    ]
    code = "import json, sys; from tests.launch import launch; launch(**json.load(sys.stdin))"
    in_environment(open_mpi, code, {"ranks": 2, "args": [*job, f"out={out}"], "timeout": 120})
    record = read_record(out / "run.h5")
    assert record.provenance["wire"] == "mpi_t"
    down = record.wire["direction"] == "down"
    assert record.wire["sent"][down].sum() == 2 * 4 * 4810
    assert set(record.wire_flows["receiver"][record.wire_flows["direction"] == "up"]) == {0}


def test_shared_memory_is_not_measured() -> None:
    """One node's ranks move nothing over TCP: that is not called zero bytes."""
    for found in run_ranks(
        "tests.mpi.wire_checks:measured", 2, timeout=60, arguments={"wanted": "auto", "nbytes": 1000}
    ):
        assert found["source"] is None
        assert "shared memory" in found["reason"]
        assert "broadcast" not in found


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("ip") is None or mpirun()[1] != "mpich",
    reason="network namespaces as hosts need root, iproute2 and MPICH",
)
def test_two_hosts() -> None:
    """Namespaces with links of their own: the kernel's counts are at least MPI's and no more than the interfaces'."""
    command = [sys.executable, "-m", "benchmarks.hosts", "--hosts", "2", "--mbit", "200", "--systems", "FedAvg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as required" in done.stdout


# --- Open MPI's own counts --------------------------------------------------------------------------------------------
def test_open_mpi_counts_exactly(open_mpi: str) -> None:
    """A broadcast and a gather move the payload once for every other rank; also through shared memory."""
    ranks = 4
    found = found_on(open_mpi, ranks, {}, wanted="auto", nbytes=BYTES, monitoring=True)
    assert [one["source"] for one in found] == ["mpi_t"] * ranks, found
    broadcast, flows = found[0]["broadcast"]
    assert [count[1] for count in broadcast] == [0] + [BYTES] * (ranks - 1)
    assert sum(size for _, _, size in flows) == (ranks - 1) * BYTES
    gather, flows = found[0]["gather"]
    assert gather == [[0, (ranks - 1) * BYTES, 0]] + [[BYTES, 0, 0]] * (ranks - 1)
    assert sorted(flows) == [[rank, 0, BYTES] for rank in range(1, ranks)]


def test_open_mpi_without_monitoring_is_not_measured(open_mpi: str) -> None:
    for found in found_on(open_mpi, 2, {}, wanted="mpi_t", nbytes=1000):
        assert found["source"] is None and "OMPI_MCA_pml_monitoring_enable=1" in found["reason"]
