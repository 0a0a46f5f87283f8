"""Logical, MPI and wire bytes of five systems over several hosts, which are network namespaces of one machine.

usage:  python -m benchmarks.hosts [--hosts 2 4] [--mbit 50 200] [--rounds 2] [--ranks 1]
            [--collectives flat tree hierarchical]

A host is a network namespace with an address, a hostname and shared memory of its own, and `--ranks` ranks on it; its
link to the bridge between all is shaped in both directions (tbf). MPI is MPICH over TCP. All systems run in one launch,
one after the other. Wire bytes are those of the ranks' connections (`measure_wire = "tcp_info"`); the interfaces'
bytes, read from outside and of the whole launch with its set-up, have to be more. Needs root and iproute2.

Each system runs once for each of `--collectives` (`library`, unless others are named). Required, with one rank on each
host: of what is more than 1 MB in a round, down or up, wire bytes are at least MPI's and, without those that TCP sent
again, less than 10 % more. With several, what is between ranks of one host crosses no link, and wire bytes are fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpifed.job import ROUTES
from mpifed.progress import megabytes
from mpifed.report.layout import aligned
from mpifed.report.traffic import bytes_of
from mpifed.storage.record import read_record
from mpifed.storage.run_folder import RunFolder
from tests.launch import ROOT, mpirun

COMMON = [
    *(
        "clients=10",
        "model.name=mlp",
        "model.hidden=[4000]",
        "data.public_held_out=0.2",
        "data.partition.name=dirichlet",
    ),
    *(
        "data.partition.alpha=0.5",
        "local.steps=5",
        "local.lr=0.05",
        "evaluate.every_rounds=0",
        "checkpoint.every_rounds=0",
    ),
    *("measure_wire=tcp_info", "turns=off"),
]
"""Handwritten digits and a model of 300,010 parameters, 1.2 MB."""

SYSTEMS = {
    "FedAvg": ["algorithm.name=fedavg"],
    "FedMD": ["algorithm.name=fedmd", "algorithm.subset_size=200"],
    "FedGen": ["algorithm.name=fedgen"],
    "FedFTG": ["algorithm.name=fedftg", "algorithm.channels=16", "algorithm.iterations=2"],
    "FedKD": [
        *("algorithm.name=fedkd", 'client_models=[{name = "mlp", hidden = [64]}]'),
        *('codec={"up.update" = "svd", "down.update" = "svd"}',),
    ],
}
OVER_TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "OMP_NUM_THREADS": "1"}
"""MPICH's default goes round the network between namespaces, through the memory that they share."""
LARGE = 1_000_000
MOST = 1.1
"""Largest ratio of wire to MPI bytes of what is `LARGE` in a round."""


# --- hosts ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Hosts:
    """Namespaces on one bridge. `agent`: a script that MPICH starts in place of ssh."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    agent: Path

    def interface_bytes(self) -> int:
        """Bytes that all hosts have sent over their links."""
        total = 0
        for name in self.names:
            shown = json.loads(_run("ip", "-netns", name, "-json", "-statistics", "link", "show", "eth0"))
            total += int(shown[0]["stats64"]["tx"]["bytes"])
        return total


@contextmanager
def hosts(count: int, mbit: float) -> Iterator[Hosts]:
    """`count` hosts with links of `mbit` Mbit/s in each direction; nothing is left of them."""
    own = os.getpid()
    subnet = f"10.83.{own % 250}"
    bridge = f"mpf{own}b"
    names = tuple(f"mpifed-{own}-{number}" for number in range(1, count + 1))
    addresses = tuple(f"{subnet}.{number}" for number in range(1, count + 1))
    shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb")
    # what a host's own full queue drops, TCP counts as sent, and again when it is sent, and not as retransmitted
    out, back = (*shape, "limit", "32mb"), (*shape, "latency", "100ms")
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{subnet}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, (name, address) in enumerate(zip(names, addresses, strict=True), start=1):
            link = f"mpf{own}v{number}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", link, "master", bridge, "up")
            _run("ip", "-netns", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-netns", name, "link", "set", device, "up")
            _run("tc", "-netns", name, "qdisc", "add", "dev", "eth0", *out)
            _run("tc", "qdisc", "add", "dev", link, *back)
        with tempfile.TemporaryDirectory(prefix="mpifed-hosts-") as folder:
            yield Hosts(names, addresses, _agent(Path(folder), names, addresses, f"{subnet}.254"))
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for process in map(int, found):
                os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def _agent(folder: Path, names: Sequence[str], addresses: Sequence[str], launcher: str) -> Path:
    """A script `agent [-option ...] ADDRESS COMMAND ...` that runs the command on that host."""
    table = folder / "hosts"
    lines = [f"127.0.0.1 localhost\n{launcher} {socket.gethostname()}"]
    lines += [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
    table.write_text("\n".join(lines) + "\n")
    cases = "\n".join(f"  {address}) name={name};;" for address, name in zip(addresses, names, strict=True))
    script = folder / "agent"
    script.write_text(
        "#!/bin/bash\n"
        "while [[ $1 == -* ]]; do shift; done\n"
        f"case $1 in\n{cases}\n  *) exit 1;;\nesac\nshift\n"
        'inside="hostname $name && mount -t tmpfs tmpfs /dev/shm && mount --bind ' + str(table) + ' /etc/hosts && $*"\n'
        'exec ip netns exec "$name" unshare --uts --mount bash -c "$inside"\n'
    )
    script.chmod(0o700)
    return script


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()} (this benchmark needs root and iproute2)")
    return done.stdout


@dataclass(frozen=True)
class System:
    """A system and the route of its messages."""

    name: str
    route: str

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.route}"


# --- runs -------------------------------------------------------------------------------------------------------------
def rank_main(jobs: list[list[str]]) -> int:
    """On every rank: all jobs, one after the other."""
    from mpifed.run import main as run

    return max(run(job) for job in jobs)


def launch(where: Hosts, systems: Sequence[System], rounds: int, ranks: int, out: Path, limit: float) -> None:
    """All systems over these hosts, each into its folder of `out`."""
    jobs = [
        [f"rounds={rounds}", *COMMON, *SYSTEMS[one.name], f"collectives={one.route}", f"out={out / one.folder}"]
        for one in systems
    ]
    launch_module(where, ranks, ["benchmarks.hosts", "--as-rank", json.dumps(jobs)], out / "log", limit)


def launch_module(where: Hosts, ranks: int, module: Sequence[str], output: Path, limit: float) -> None:
    """`python -m MODULE ARGUMENTS` on `ranks` ranks of each host, output into a file; SystemExit where it fails."""
    path, kind = mpirun()
    if kind != "mpich":
        raise SystemExit(f"this benchmark needs MPICH's mpirun, and {path} is not")
    places = ",".join(f"{address}:{ranks}" for address in where.addresses)
    command = [path, "-launcher", "ssh", "-launcher-exec", str(where.agent), "-hosts", places]
    command += ["-n", str(ranks * len(where.names)), sys.executable, "-m", *module]
    environment = os.environ | OVER_TCP | {"PYTHONPATH": str(ROOT)}
    with output.open("w") as log:
        running = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = running.wait(limit)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
    if code != 0:
        raise SystemExit(f"the launch over {len(where.names)} hosts failed ({code}):\n{output.read_text()[-4000:]}")


def table(out: Path, systems: Sequence[System], ranks: int, failed: list[str]) -> list[tuple[str, ...]]:
    """A row for each system and direction; what is required and not so goes to `failed`."""
    rows = []
    for one in systems:
        name, folder = one.name, RunFolder.open(out / one.folder)
        record, metrics = read_record(folder.record), folder.read_metrics()
        seconds = statistics.median(row["seconds"]["total"] for row in metrics)
        for way in ("down", "up"):
            found = bytes_of(record, way)
            assert found.wire is not None, f"{name}: {record.provenance['wire']}"
            rows.append(
                (
                    *((name, one.route) if way == "down" else ("", "")),
                    way,
                    *(megabytes(size) for size in (found.logical, found.mpi_sent, found.mpi_between, found.wire)),
                    "-" if found.ratio is None else f"{found.ratio:.3f}",
                    f"{found.retransmitted:,}",
                    f"{seconds:.2f}" if way == "down" else "",
                )
            )
            once = found.wire - found.retransmitted
            large = found.mpi_between > LARGE * len(metrics)
            if large and ranks == 1 and not found.mpi_between <= once < MOST * found.mpi_between:
                failed.append(f"{name}, {way}: {once:,} bytes on the wire for {found.mpi_between:,} of MPI")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument("--systems", choices=tuple(SYSTEMS), nargs="+", default=tuple(SYSTEMS))
    parser.add_argument("--collectives", choices=ROUTES, nargs="+", default=["library"])
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="of one launch")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.as_rank:
        return rank_main(json.loads(arguments.as_rank))
    failed: list[str] = []
    systems = [System(name, route) for name in arguments.systems for route in arguments.collectives]
    amounts = ("logical MB", "MPI sent MB", "between ranks MB", "wire MB", "wire / MPI", "sent again", "s/round")
    header = ("system", "route", "way", *amounts)
    for count in arguments.hosts:
        for mbit in arguments.mbit:
            with tempfile.TemporaryDirectory() as folder, hosts(count, mbit) as where:
                out = Path(folder)
                launch(where, systems, arguments.rounds, arguments.ranks, out, arguments.limit)
                moved = where.interface_bytes()
                rows = table(out, systems, arguments.ranks, failed)
                wire = sum(bytes_of(read_record(out / one.folder / "run.h5")).wire or 0 for one in systems)
            if moved < wire:
                failed.append(f"{count} hosts: {wire:,} bytes on the wire, but {moved:,} through the interfaces")
            print(
                f"\n{count} hosts, ranks on each: {arguments.ranks}, {mbit:g} Mbit/s; "
                f"on the wire {megabytes(wire)} MB, through the interfaces in all {megabytes(moved)} MB"
            )
            print("\n".join(aligned([header, *rows], (0, 1, 2))), flush=True)
    print("\n" + ("\n".join(failed) if failed else "as required"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
