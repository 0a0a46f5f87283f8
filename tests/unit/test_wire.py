"""The counters of wire bytes, on recorded contents of /proc and /sys, on a fake MPI_T, and on real sockets."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks
from mpifed.comm.wire.interface import InfiniBand, Interfaces
from mpifed.comm.wire.meter import Measured, Meter, choose
from mpifed.comm.wire.mpi_t import VARIABLE, MpiT
from mpifed.comm.wire.source import Count, Counts, Flows, Unreadable
from mpifed.comm.wire.tcp_info import TcpInfo, parse

NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 4953290   35411    0    0    0     0          0         0  4953290   35411    0    0    0     0       0          0
  eth0: 104857600   74227    0    0    0     0          0         0  2112233   31007    0    0    0     0       0          0
 bond0:104857600   74227    0    0    0     0          0         0  2112233   31007    0    0    0     0       0          0
"""  # noqa: E501


# --- interfaces and ports ---------------------------------------------------------------------------------------------
def interfaces(folder: Path, *hardware: str, leader: bool = True, text: str = NET_DEV) -> Interfaces:
    (folder / "dev").write_text(text)
    for name in hardware:
        (folder / "net" / name / "device").mkdir(parents=True)
    return Interfaces(leader, folder / "dev", folder / "net")


def test_interfaces_of_the_hardware_are_counted_once(tmp_path: Path) -> None:
    """bond0 is eth0 once more; the loopback leaves no node; a name may stand right before its first number."""
    assert interfaces(tmp_path, "eth0").read() == {"eth0": Count(sent=2112233, received=104857600)}


def test_a_network_namespace_has_no_hardware(tmp_path: Path) -> None:
    assert set(interfaces(tmp_path).read()) == {"eth0", "bond0"}
    only_loopback = "\n".join(NET_DEV.splitlines()[:3])
    with pytest.raises(Unreadable, match="no network interface"):
        interfaces(tmp_path, text=only_loopback)
    with pytest.raises(Unreadable, match="cannot be read"):
        interfaces(tmp_path, text=NET_DEV.replace("2112233", "x"))


def test_one_rank_of_a_node_reads(tmp_path: Path) -> None:
    other = interfaces(tmp_path, "eth0", leader=False)
    assert other.read() == {}
    assert other.join([], [{"eth0": Count(3, 5), "eth1": Count(1, 0)}, {}]) == ([Count(4, 5), Count()], {})


def test_infiniband_counts_words_of_four_bytes(tmp_path: Path) -> None:
    for port, state, sent in (("1", "4: ACTIVE\n", 1000), ("2", "1: DOWN\n", 77)):
        counters = tmp_path / "mlx5_0/ports" / port / "counters"
        counters.mkdir(parents=True)
        (counters.parent / "state").write_text(state)
        (counters / "port_xmit_data").write_text(f"{sent}\n")
        (counters / "port_rcv_data").write_text("250000000000\n")
    assert InfiniBand(True, tmp_path).read() == {"mlx5_0/1": Count(4000, 10**12)}
    assert InfiniBand(False, tmp_path).read() == {}
    with pytest.raises(Unreadable, match="no active InfiniBand port"):
        InfiniBand(True, tmp_path / "absent")


# --- TCP_INFO ---------------------------------------------------------------------------------------------------------
def test_what_is_taken_from_the_structure() -> None:
    """Sent is what left the socket, with what was sent again, and what still waits in it."""
    info = bytearray(232)
    struct.pack_into("=I", info, 144, 5)  # tcpi_notsent_bytes
    struct.pack_into("=QQ", info, 200, 1000, 40)  # tcpi_bytes_sent, tcpi_bytes_retrans
    assert parse(bytes(info)) == Count(1005, 0, 40)
    with pytest.raises(Unreadable, match=r"Linux 4\.19"):
        parse(bytes(info[:192]))


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def connection(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    address = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}[request.param]
    with socket.socket(request.param) as listening:
        listening.bind((address, 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()[:2]) as one, listening.accept()[0] as other:
            yield one, other


def called(one: socket.socket) -> str:
    """The connection's name at this end."""
    return " ".join(f"{address} {port}" for address, port in (one.getsockname()[:2], one.getpeername()[:2]))


def test_own_sockets(connection: tuple[socket.socket, socket.socket]) -> None:
    """100 kB one way, 7 bytes back; connections that were there before moved nothing meanwhile."""
    one, other = connection
    source = TcpInfo()
    before = source.read()
    for data, sender, receiver in ((b"x" * 100_000, one, other), (b"y" * 7, other, one)):
        sender.sendall(data)
        left = len(data)
        while left:
            left -= len(receiver.recv(left))
    moved = {name: count.since(before[name]) for name, count in source.read().items()}
    assert {name: count for name, count in moved.items() if any(count)} == {
        called(one): Count(100_000),
        called(other): Count(7),
    }
    one.sendall(b"still open")  # a reading closes nothing
    assert other.recv(100) == b"still open"


def test_a_closed_connection_keeps_its_count(connection: tuple[socket.socket, socket.socket]) -> None:
    one, other = connection
    one.sendall(b"abc")
    assert other.recv(3) == b"abc"
    source, name = TcpInfo(), called(one)
    assert source.read()[name] == Count(3)
    one.close()
    assert source.read()[name] == Count(3)


def test_connections_are_joined_by_their_two_ends() -> None:
    """Rank 0 sent 1,000 bytes to rank 1, 30 of them twice: rank 1 received 1,000. What is said to the launcher is
    between no ranks."""
    a_b, b_a, launcher = "10.0.0.1 41 10.0.0.2 42", "10.0.0.2 42 10.0.0.1 41", "10.0.0.1 43 10.0.0.9 22"
    known = [[a_b, launcher], [b_a]]
    counts = [{a_b: Count(1030, 0, 30), launcher: Count(500)}, {b_a: Count(8)}]
    by_rank, flows = TcpInfo().join(known, counts)
    assert by_rank == [Count(1030, 8, 30), Count(8, 1000)]
    assert flows == {(0, 1): 1030, (1, 0): 8}


# --- MPI_T ------------------------------------------------------------------------------------------------------------
class FakeMpi:
    """The functions of MPI_T that are called, on counters `values`; each returns an error code."""

    def __init__(self, values: Sequence[int], monitoring: bool = True) -> None:
        self.values, self.monitoring, self.started = list(values), monitoring, False

    def MPI_T_init_thread(self, required: int, provided: Any) -> int:
        return 0

    def MPI_T_pvar_session_create(self, session: Any) -> int:
        return 0

    def MPI_T_pvar_get_index(self, name: bytes, kind: int, index: Any) -> int:
        index._obj.value = 17
        return 0 if self.monitoring and name == VARIABLE and kind == 2 else 73

    def MPI_T_pvar_handle_alloc(self, session: Any, index: Any, communicator: Any, handle: Any, length: Any) -> int:
        assert index.value == 17 and communicator.value == 4096
        length._obj.value = len(self.values)
        return 0

    def MPI_T_pvar_start(self, session: Any, handle: Any) -> int:
        self.started = True
        return 0

    def MPI_T_pvar_read(self, session: Any, handle: Any, values: Any) -> int:
        assert self.started
        for place, value in enumerate(self.values):
            values[place] = ctypes.c_ulonglong(value)
        return 0


def test_what_a_rank_says_to_itself_is_not_sent() -> None:
    library = FakeMpi([2**40, 999, 0])
    source = MpiT(4096, 3, library)
    assert source.read() == {"0": Count(2**40), "1": Count(999), "2": Count()}
    library.values[2] = 8
    by_rank, flows = source.join([], [{}, source.read(), {}])
    assert by_rank == [Count(0, 2**40), Count(2**40 + 8), Count(0, 8)]
    assert flows == {(1, 0): 2**40, (1, 2): 8}


def test_a_library_that_does_not_count() -> None:
    with pytest.raises(Unreadable, match="OMPI_MCA_pml_monitoring_enable=1"):
        MpiT(4096, 2, FakeMpi([0, 0], monitoring=False))
    with pytest.raises(Unreadable, match="no MPI_T"):
        MpiT(4096, 2, object())
    with pytest.raises(Unreadable, match="for 2 ranks, not 3"):
        MpiT(4096, 3, FakeMpi([0, 0]))


def test_received_is_what_the_others_sent() -> None:
    """A chain 0 -> 1 -> 2 of 100 bytes, as a broadcast may be: rank 1 both sends and receives."""
    source = MpiT(4096, 3, FakeMpi([0, 0, 0]))
    by_rank, flows = source.join([], [{"1": Count(100)}, {"2": Count(100)}, {}])
    assert by_rank == [Count(100, 0), Count(100, 100), Count(0, 100)]
    assert flows == {(0, 1): 100, (1, 2): 100}


# --- the meter --------------------------------------------------------------------------------------------------------
class Scripted:
    """A source that gives one reading after the other, and joins as interfaces do."""

    name = "scripted"

    def __init__(self, *readings: Counts) -> None:
        self._readings = iter(readings)

    def read(self) -> Counts:
        reading = next(self._readings, None)
        if reading is None:
            raise Unreadable("the counter is gone")
        return reading

    def join(self, known: Sequence[Sequence[str]], counts: Sequence[Counts]) -> tuple[list[Count], Flows]:
        assert list(known) == [["a", "b"]] * len(counts)
        return [sum_of(own) for own in counts], {}


def sum_of(counts: Counts) -> Count:
    total = Count()
    for count in counts.values():
        total = total.plus(count)
    return total


def test_differences_belong_to_the_part_of_the_round_before_them() -> None:
    """Readings 5, 9, 9, 12, 20 and a second counter from 3 on: 5 before the round, 4 down, 0 control, 3 + 3 up, 8 more
    up, as in a second phase of the same name. A counter that begins anew, at 2, has counted 2."""
    reading = [
        {"a": Count(5)},
        {"a": Count(9, 1)},
        {"a": Count(9, 1)},
        {"a": Count(12, 1), "b": Count(3)},
        {"a": Count(20, 1), "b": Count(3)},
        {"a": Count(2), "b": Count(3)},
    ]

    def main(comm: Communicator) -> tuple[list[Measured], list[Measured], str]:
        meter = Meter(comm, Scripted(*reading))
        meter.skip()
        for phase, direction in (("p", "down"), ("", "control"), ("p", "up"), ("p", "up")):
            meter.count(phase, direction)
        first = meter.collect()
        meter.count("p", "down")
        second = meter.collect()
        meter.count("p", "down")
        assert meter.collect() == []  # the counter is gone, the run goes on
        return first, second, meter.reason

    (first, second, reason), others = run_ranks(2, main)
    twice = [Count(14), Count(14)]
    assert first == [
        Measured("p", "down", [Count(4, 1)] * 2, {}),
        Measured("", "control", [Count()] * 2, {}),
        Measured("p", "up", twice, {}),
    ]
    assert second == [Measured("p", "down", [Count(2)] * 2, {})]
    assert reason == "the counter is gone" and others[:2] == ([], [])


def test_what_moves_belongs_to_what_was_carried() -> None:
    """Read after each collective: 3 of a broadcast of two kinds, 5 of a sum, 9 of a gather, twice; what the meter says
    itself, and what is said before the next round begins, is not in it."""
    totals = [0, 3, 8, 17, 26, 1000, 1001, 2000, 2001, 2001]
    readings = [{"a": Count(total), "b": Count()} for total in totals]

    def main(comm: Communicator) -> list[Measured]:
        meter = Meter(comm, Scripted(*readings))
        comm.moved = meter.moved
        meter.skip()
        comm.broadcast(np.zeros(2), {"p/down/model": 8, "p/down/generator": 8})
        comm.sum_everywhere(np.zeros(1))
        for _ in range(2):
            comm.gather(np.zeros(2, np.uint8), [2, 2], {"p/up/update": 2}, {"p/up/update": 4})
        first = meter.collect()
        comm.agree(None)
        meter.skip()
        assert meter.collect() == []
        return first

    first, _ = run_ranks(2, main)
    assert first == [
        Measured("p", "down", [Count(3)] * 2, {}, "generator+model"),
        Measured("", "control", [Count(5)] * 2, {}, "control"),
        Measured("p", "up", [Count(18)] * 2, {}, "update"),
    ]


def test_threads_of_one_process_have_no_wire() -> None:
    def main(comm: Communicator) -> tuple[object, str, str]:
        meter, off = choose(comm, "auto", ["a", "a"]), choose(comm, "off", ["a", "a"])
        meter.skip()
        meter.count("p", "down")
        assert meter.collect() == []
        return meter.source, meter.reason, off.reason

    assert run_ranks(2, main) == [(None, "everything is in one process", "measure_wire is off")] * 2
