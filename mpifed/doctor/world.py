"""What takes all ranks: that they see each other, how they share the cores, what waiting costs, and their clocks."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpifed.comm.communicator import Communicator
from mpifed.comm.mpi import world
from mpifed.doctor.finding import Finding, error, from_json, ok, to_json, warning
from mpifed.doctor.mpi import cores
from mpifed.errors import MpifedError

WAITED_S = 1.0


def everyone(out: Path) -> Iterator[Finding]:
    """On every rank, with what was found on its node as standard input: all findings at rank 0."""
    mine = from_json(sys.stdin.read())
    try:
        comm = world()
    except MpifedError as failed:
        yield from mine
        yield error("ranks", str(failed))
        return
    said = comm.gather_json({"host": socket.gethostname(), "cores": cores(), "found": to_json(mine), **_versions()})
    waited = waiting(comm)
    clock = clocks(comm, said)
    rest = [*wire(comm), *deaths(comm)]
    found: list[Finding] = []
    if said is not None:
        hosts = [one["host"] for one in said]
        found = merged(hosts, [from_json(one["found"]) for one in said])
        found += [*ranks(hosts), *sharing(hosts, [one["cores"] for one in said], os.cpu_count() or 1)]
        found += [*same_versions(said), *waited, *clock, *rest]
    comm.barrier()
    yield from found


def _versions() -> dict[str, str]:
    from mpifed.storage.record import software_versions

    return {f"version {name}": version for name, version in software_versions().items()}


# --- what rank 0 makes of it ------------------------------------------------------------------------------------------
def merged(hosts: Sequence[str], found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """What every node found, check by check: what is well once, for all nodes; the rest with the node's name."""
    by_host = {host: list(own) for host, own in zip(hosts, found, strict=True) if own}
    several = len(by_host) > 1
    lines: list[Finding] = []
    well: dict[str, list[str]] = {}
    for name in dict.fromkeys(finding.name for own in by_host.values() for finding in own):
        for host, own in by_host.items():
            for finding in (finding for finding in own if finding.name == name):
                if finding.level != "ok":
                    lines.append(replace(finding, host=host) if several else finding)
                elif name not in well:
                    well[name] = []
                    lines.append(finding)
                else:
                    well[name].append(host)
    return [
        replace(line, what=f"{line.what} (and so on {len(set(well[line.name]))} more nodes)")
        if line.level == "ok" and several and set(well.get(line.name, ()))
        else line
        for line in lines
    ]


def ranks(hosts: Sequence[str]) -> Iterator[Finding]:
    by_host = [f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts)]
    shown = ", ".join(by_host[:4]) + (f" and {len(by_host) - 4} more nodes" if len(by_host) > 4 else "")
    yield ok("ranks", f"{len(hosts)} that see each other: {shown}" if len(hosts) > 1 else f"one, on {hosts[0]}")


def sharing(hosts: Sequence[str], allowed: Sequence[Sequence[int]], on_the_node: int) -> Iterator[Finding]:
    """Binding, and more ranks than cores; `allowed` by rank, the cores on which it may run."""
    for host in dict.fromkeys(hosts):
        sets = [set(own) for name, own in zip(hosts, allowed, strict=True) if name == host]
        together, count = set().union(*sets), len(sets)
        where = "" if len(set(hosts)) == 1 else host
        if count > len(together) and len(together) < on_the_node:
            yield replace(
                warning("cores", f"the launcher binds {count} ranks to {len(together)} of {on_the_node} cores",
                        "mpirun --bind-to none, or srun --cpus-per-task"),
                host=where,
            )  # fmt: skip
        elif count > len(together):
            yield replace(
                warning("cores", f"{count} ranks on {len(together)} cores: they take turns, by which no result changes",
                        "for speed start a rank a core at most"),
                host=where,
            )  # fmt: skip
        elif count > 1 and any(one & other for i, one in enumerate(sets) for other in sets[:i] if one != together):
            yield replace(
                warning("cores", f"some of the {count} ranks are bound to the same cores, and others are free",
                        "mpirun --bind-to none, or srun --cpus-per-task"),
                host=where,
            )  # fmt: skip
        elif host == hosts[0]:
            bound = "each bound to its own" if count > 1 and not any(own == together for own in sets) else "not bound"
            yield ok("cores", f"{count} rank{'s' * (count > 1)} on {len(together)} cores, {bound}")


def same_versions(said: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    for name in (name for name in said[0] if name.startswith("version ")):
        found = dict.fromkeys(one[name] for one in said)
        if len(found) > 1:
            other = next(one for one in said if one[name] != said[0][name])
            yield error("versions", f"{name.removeprefix('version ')} is {said[0][name]} on {said[0]['host']}, but "
                        f"{other[name]} on {other['host']}", "use one environment on all nodes")  # fmt: skip


# --- what all ranks do together ---------------------------------------------------------------------------------------
def waiting(comm: Communicator) -> list[Finding]:
    """How much of a core a rank takes that waits: rank 0 sleeps, and the others wait for it."""
    if comm.size == 1:
        return []
    comm.barrier()
    wall, used = time.monotonic(), time.process_time()
    if comm.rank == 0:
        time.sleep(WAITED_S)
    comm.barrier()
    share = (time.process_time() - used) / (time.monotonic() - wall)
    shares = comm.gather_json(share)
    worst = max(shares[1:]) if shares else 0.0
    if worst > 0.25:
        return [warning("waiting", f"a waiting rank takes {worst:.0%} of a core from those that train",
                        "docs/mpi.md, Waiting: are the MPI library's own variables set to spin?")]  # fmt: skip
    return [ok("waiting", f"a waiting rank takes {worst:.0%} of a core")]


def clocks(comm: Communicator, said: Sequence[dict[str, Any]] | None) -> list[Finding]:
    """How far the nodes' clocks are apart, as seen after a barrier, and whether this one runs evenly."""
    seen = []
    wall, even = time.time(), time.monotonic()
    for _ in range(5):
        comm.barrier()
        seen.append(time.time())
    uneven = abs((time.time() - wall) - (time.monotonic() - even))
    times = comm.gather_json({"seen": seen, "uneven": uneven})
    if times is None or said is None:
        return []
    found = [
        warning(
            "clocks", f"{one['host']}: the clock was set by {time_['uneven']:.1f} s meanwhile", "run an NTP service"
        )
        for one, time_ in zip(said, times, strict=True)
        if time_["uneven"] > 0.1
    ]
    first = times[0]["seen"]
    apart = {
        one["host"]: sorted(a - b for a, b in zip(time_["seen"], first, strict=True))[len(first) // 2]
        for one, time_ in zip(said, times, strict=True)
    }
    host = max(apart, key=lambda name: abs(apart[name]))
    if abs(apart[host]) > 1:
        found.append(warning("clocks", f"{host} is {apart[host]:+.1f} s off {said[0]['host']}", "run an NTP service"))
    elif not found:
        nodes = f"{len(apart)} nodes agree to {max(abs(apart[host]), 0.001):.3f} s" if len(apart) > 1 else "one node"
        found.append(ok("clocks", f"{nodes}; monotonic, to {time.get_clock_info('monotonic').resolution:.0e} s"))
    return found


def wire(comm: Communicator) -> list[Finding]:
    """Which counters of bytes on the wire can be read."""
    from mpifed.comm.wire.meter import choose

    meter = choose(comm, "auto", comm.find_nodes())
    if meter.source is None:
        reason = meter.reason if len(meter.reason) < 200 else meter.reason[:197] + "..."
        return [ok("wire", f"bytes on the wire would not be measured: {reason}")]
    return [ok("wire", f"bytes on the wire are measured, by {meter.name}")]


def deaths(comm: Communicator) -> list[Finding]:
    """Whether the library can go on without a dead rank (ULFM)."""
    from mpifed.comm.mpi import revokes

    if revokes():
        return [ok("deaths", "the MPI library can go on without a dead rank (ULFM), under mpirun --with-ft ulfm")]
    return [ok("deaths", "a rank that dies ends the job, which is resumed from its checkpoint (no ULFM)")]
