"""How much of a core a waiting rank uses while another one computes.

usage:  python -m benchmarks.idle [--ranks 4] [--seconds 20]

Two waits of a round: the clients' ranks for the server's download, as rank 0 computes, and the server (with the other
ranks) for the replies, as rank 1 computes. For comparison the same wait in MPI's own blocking barrier. Required of a
waiting rank: less than 5 % of a core. On a machine with fewer cores than ranks the last column shows what the waiting
ranks leave to the one that computes.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Literal

from mpifed.comm.mpi import Mpi
from tests.launch import run_ranks

REQUIRED = 0.05
"""Largest share of a core that a waiting rank may use."""

Wait = Literal["clients for the server", "server for the clients", "MPI's blocking barrier"]
BUSY_RANK: dict[Wait, int] = {"clients for the server": 0, "server for the clients": 1, "MPI's blocking barrier": 1}


def wait(wait: Wait, seconds: float) -> float:
    """On every rank: share of a core (CPU seconds, of all threads, per second) used while one rank computes."""
    comm = Mpi()
    comm.barrier()
    began, used = time.monotonic(), time.process_time()
    if comm.rank == BUSY_RANK[wait]:
        while time.monotonic() - began < seconds:
            sum(range(1000))
    if wait == "clients for the server":
        comm.broadcast_bytes(b"model")
    elif wait == "server for the clients":
        comm.gather_bytes(b"reply")
    else:
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()
    return (time.process_time() - used) / (time.monotonic() - began)


def shares(wait: Wait, ranks: int, seconds: float) -> tuple[float, float]:
    """The largest share of a core among the ranks that waited, and that of the one that computed."""
    arguments = {"wait": wait, "seconds": seconds}
    used = run_ranks("benchmarks.idle:wait", ranks, timeout=seconds + 120, arguments=arguments)
    computing = used.pop(BUSY_RANK[wait])
    return max(used), computing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    print(f"{arguments.ranks} ranks, {arguments.seconds:g} s; share of a core")
    print(f"{'who waits':<28s} {'waiting rank':>14s} {'computing rank':>16s}")
    kept = True
    for wait in BUSY_RANK:
        waiting, computing = shares(wait, arguments.ranks, arguments.seconds)
        kept = kept and (waiting < REQUIRED or wait == "MPI's blocking barrier")
        print(f"{wait:<28s} {waiting:>14.1%} {computing:>16.1%}", flush=True)
    print(f"required of a waiting rank: below {REQUIRED:.0%}: {'met' if kept else 'NOT MET'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
