"""TCP_INFO: what Linux counts of this process's own connections. Any MPI library over TCP; needs no privilege.

`bytes_sent` (Linux 4.19) is every byte that left a socket, with those that were sent again, but without the headers of
TCP, IP and Ethernet; to it comes what waits in the socket, so that a message counts where it was sent and not where the
network got round to it. A connection's other end is found by its pair of addresses, which both ends name alike: what
has no other end among the ranks (the launcher's own connections) is left out.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Sequence

from mpifed.comm.wire.source import Count, Counts, Flows, Unreadable, joined

_TCP_INFO = 11
_LENGTH = 256
_NOT_SENT, _SENT, _RETRANSMITTED = 144, 200, 208
"""Offsets in `struct tcp_info` (linux/tcp.h): tcpi_notsent_bytes (32 bits), tcpi_bytes_sent, tcpi_bytes_retrans."""
_OF_LINUX_4_19 = 216
"""Bytes of the structure with all of these."""


class TcpInfo:
    """Counts by connection, called "own-address own-port other-address other-port"."""

    name = "tcp_info"

    def __init__(self) -> None:
        if not os.path.isdir("/proc/self/fd"):
            raise Unreadable("there is no /proc")
        self._kinds: dict[int, tuple[int, int | None]] = {}  # descriptor -> inode, family (None: of no interest)
        self._names: dict[int, str] = {}  # inode -> connection
        self._counts: dict[str, Count] = {}  # closed connections too

    def read(self) -> Counts:
        for text in os.listdir("/proc/self/fd"):
            try:
                self._read_one(int(text))
            except OSError:  # closed meanwhile, as the listing's own descriptor is
                continue
        return dict(self._counts)

    def _read_one(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        inode, family = self._kinds.get(descriptor, (-1, None))
        if inode != status.st_ino:
            family = _family(descriptor) if stat.S_ISSOCK(status.st_mode) else None
            self._kinds[descriptor] = status.st_ino, family
        if family is None:
            return
        with _borrowed(descriptor, family) as own:
            name = self._names.get(status.st_ino)
            if name is None:
                name = _name(own.getsockname(), own.getpeername())  # OSError: listens, or is not connected yet
                self._names[status.st_ino] = name
            info = own.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LENGTH)
        self._counts[name] = parse(info)

    def join(self, known: Sequence[Sequence[str]], counts: Sequence[Counts]) -> tuple[list[Count], Flows]:
        owner = {name: rank for rank, names in enumerate(known) for name in names}
        ends = [
            (rank, _from_the_other_end(name), count) for rank, own in enumerate(counts) for name, count in own.items()
        ]
        return joined(((rank, owner[end], count) for rank, end, count in ends if end in owner), len(counts))


class _borrowed:
    """A socket object on a descriptor of somebody else's, which stays open."""

    def __init__(self, descriptor: int, family: int) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, descriptor)

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *exception: object) -> None:
        self._socket.detach()


def parse(info: bytes) -> Count:
    """The counts in a `struct tcp_info`. Raises Unreadable where the kernel is too old to have them."""
    if len(info) < _OF_LINUX_4_19:
        raise Unreadable("this kernel's TCP_INFO has no byte counts (they came with Linux 4.19)")
    sent, retransmitted = (struct.unpack_from("=Q", info, offset)[0] for offset in (_SENT, _RETRANSMITTED))
    waiting = struct.unpack_from("=I", info, _NOT_SENT)[0]
    return Count(sent + waiting, retransmitted=retransmitted)


def _family(descriptor: int) -> int | None:
    """AF_INET or AF_INET6 of a TCP socket; None for any other."""
    own = socket.socket(fileno=descriptor)
    try:
        internet = own.family in (socket.AF_INET, socket.AF_INET6)
        return own.family if internet and own.type == socket.SOCK_STREAM else None
    finally:
        own.detach()


def _name(*ends: Sequence[object]) -> str:
    return " ".join(f"{str(end[0]).removeprefix('::ffff:')} {end[1]}" for end in ends)


def _from_the_other_end(name: str) -> str:
    address, port, other_address, other_port = name.split(" ")
    return f"{other_address} {other_port} {address} {port}"
