"""What test_wire.py runs on the ranks of an mpirun: known messages between two readings of the wire counters."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpifed.comm.communicator import Communicator
from mpifed.comm.mpi import Mpi
from mpifed.comm.wire.meter import Meter, choose
from mpifed.comm.wire.mpi_t import enable


def hosts_of(comm: Communicator) -> list[str]:
    said = comm.gather_bytes(socket.gethostname().encode())
    hosts: list[str] = comm.broadcast_json([name.decode() for name in said] if said is not None else None)
    return hosts


def measured(wanted: str, nbytes: int, monitoring: bool = False) -> dict[str, Any]:
    """By kind of message, of `nbytes` a rank: (bytes sent and received by rank, flows); and the meter's own words.

    Before each message all ranks meet, and the meter is told to skip that.
    """
    if monitoring:
        enable()
    comm = Mpi()
    meter = choose(comm, wanted, hosts_of(comm))
    one, counts = np.ones(nbytes, np.uint8), [nbytes] * comm.size
    numbers = np.ones(nbytes // 8)
    messages: dict[str, Callable[[], object]] = {
        "broadcast": lambda: comm.broadcast(one, {}),
        "gather": lambda: comm.gather(one, counts, {}),
        "reduce": lambda: comm.reduce(numbers, {}),
    }
    found: dict[str, Any] = {"source": meter.source.name if meter.source else None, "reason": meter.reason}
    for name, send in messages.items():
        send()  # connections are made
        settle(comm, meter)
        send()
        settle_after(comm)
        meter.count(name, "down")
        for part in meter.collect():
            found[name] = [[list(count) for count in part.by_rank], [[*pair, n] for pair, n in part.flows.items()]]
    found["microseconds"] = cost(meter)
    return found


def settle(comm: Communicator, meter: Meter) -> None:
    comm.barrier()
    time.sleep(0.05)
    meter.skip()
    time.sleep(0.05)


def settle_after(comm: Communicator) -> None:
    """What is on the way has arrived before anybody reads; nobody talks until all have read."""
    time.sleep(0.1)


def cost(meter: Meter) -> float:
    """Median time of one reading in microseconds."""
    times = []
    for _ in range(200):
        started = time.perf_counter()
        meter.skip()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)
