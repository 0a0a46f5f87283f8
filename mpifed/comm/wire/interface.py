"""Counters of network interfaces and InfiniBand ports: everything that a node sent and received, by whomever.

One rank of each node reads them. They hold the headers of all layers and the traffic of all other programs on the node.
`/proc/self/net/dev` shows the interfaces of this process's network namespace, which `/sys/class/net` does not always.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpifed.comm.wire.source import Count, Counts, Flows, Unreadable

_WORD = 4
"""Bytes of the unit in which InfiniBand ports count their data."""


class _OfNodes:
    """What interfaces and ports have in common: counts belong to a node's first rank, and to no pair of ranks."""

    def join(self, known: Sequence[Sequence[str]], counts: Sequence[Counts]) -> tuple[list[Count], Flows]:
        totals = []
        for own in counts:
            total = Count()
            for count in own.values():
                total = total.plus(count)
            totals.append(total)
        return totals, {}


class Interfaces(_OfNodes):
    """Counts by interface: the hardware's where there is any, else all but the loopback; nothing but at `leader`."""

    name = "interface"

    def __init__(self, leader: bool, proc: Path = Path("/proc/self/net/dev"), sys: Path = Path("/sys/class/net")):
        self._leader, self._proc = leader, proc
        present = sorted(self._all())
        hardware = [name for name in present if (sys / name / "device").exists()]
        self._names = hardware or [name for name in present if name != "lo"]
        if not self._names:
            raise Unreadable("this node has no network interface")

    def _all(self) -> dict[str, Count]:
        try:
            return parse(self._proc.read_text(encoding="ascii"))
        except (OSError, ValueError, IndexError) as error:
            raise Unreadable(f"{self._proc} cannot be read") from error

    def read(self) -> Counts:
        if not self._leader:
            return {}
        present = self._all()
        return {name: present[name] for name in self._names if name in present}


def parse(text: str) -> dict[str, Count]:
    """The bytes in the format of `/proc/net/dev`: two lines of headings, then received and sent in fields 0 and 8."""
    counts = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        fields = rest.split()
        counts[name.strip()] = Count(sent=int(fields[8]), received=int(fields[0]))
    return counts


class InfiniBand(_OfNodes):
    """Counts by active port, called "device/port"; nothing but at `leader`."""

    name = "infiniband"

    def __init__(self, leader: bool, sys: Path = Path("/sys/class/infiniband")) -> None:
        self._leader = leader
        self._ports = [port for port in sorted(sys.glob("*/ports/*")) if _active(port)]
        if not self._ports:
            raise Unreadable("this node has no active InfiniBand port")
        for port in self._ports:
            _count(port)

    def read(self) -> Counts:
        return {f"{port.parts[-3]}/{port.name}": _count(port) for port in self._ports} if self._leader else {}


def _active(port: Path) -> bool:
    try:
        return "ACTIVE" in (port / "state").read_text(encoding="ascii")
    except OSError:
        return False


def _count(port: Path) -> Count:
    try:
        sent, received = (
            int((port / "counters" / f"port_{way}_data").read_text(encoding="ascii")) for way in ("xmit", "rcv")
        )
    except (OSError, ValueError) as error:
        raise Unreadable(f"{port}/counters cannot be read") from error
    return Count(_WORD * sent, _WORD * received)
