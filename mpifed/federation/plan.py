"""What a run will do, before it does it: its exchanges, who is hosted where, the logical bytes of all its rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpifed.algorithms.base import Field, Phase, takes_weights
from mpifed.codecs import bounds
from mpifed.comm.ledger import WEIGHT
from mpifed.federation.federation import Federation


class Size(NamedTuple):
    """Bytes of one tensor after its codec: the same twice where the declarations decide them."""

    least: int
    most: int | None  # None: nothing bounds them

    @property
    def exact(self) -> bool:
        return self.least == self.most


@dataclass(frozen=True)
class Step:
    """One exchange of a run in which every client that is asked answers."""

    round: int
    phase: Phase
    first: bool  # of its round
    asked: Sequence[int]  # client ids, ascending
    down: Mapping[str, Field]
    up: Mapping[str, Field]
    sizes: Mapping[tuple[str, str], Size]  # by direction and field: what one client is sent, or sends
    everybody: int  # clients of the federation

    def receivers(self, name: str) -> int:
        """How many clients are sent a field of the download."""
        return self.everybody if self.down[name].to == "everybody" else len(self.asked)

    def logical(self) -> Iterator[tuple[str, str, Size, int]]:
        """Direction, kind, bytes of one client, and how many clients they are counted for."""
        for name in self.down:
            yield "down", name, self.sizes["down", name], self.receivers(name)
        for name in self.up:
            yield "up", name, self.sizes["up", name], len(self.asked)
        if takes_weights(self.up):
            yield "up", WEIGHT, Size(8, 8), len(self.asked)


def steps(federation: Federation, rounds: Sequence[int] | None = None) -> Iterator[Step]:
    """The exchanges of these rounds (all for None), as the engine makes them."""
    phases = federation.algorithm.phases(federation.env)
    everybody = tuple(range(federation.clients))
    for round_ in range(1, federation.job.rounds + 1) if rounds is None else rounds:
        sampled = federation.roster.sample(round_)
        first = True
        for phase in (phase for phase in phases if phase.rounds(round_)):
            down, up = phase.down(round_), phase.up(round_)
            sizes = {
                (direction, name): size_of(federation, direction, name, declared)
                for direction, fields in (("down", down), ("up", up))
                for name, declared in fields.items()
            }
            asked = sampled if phase.clients == "round" else everybody
            for _ in range(phase.repeat):
                yield Step(round_, phase, first, asked, down, up, sizes, len(everybody))
                first = False


def size_of(federation: Federation, direction: str, name: str, declared: Field) -> Size:
    """Bytes of one encoded field."""
    codec, shape = federation.codec(direction, name), tuple(size or 0 for size in declared.shape)
    if None not in declared.shape:
        return Size(*bounds(codec, shape, declared.dtype, declared.layout))
    return Size(bounds(codec, shape, declared.dtype, None)[0] if codec.plain else 0, None)


def planned_bytes(federation: Federation) -> tuple[dict[str, int], dict[str, Size]]:
    """Logical bytes of the whole run by "direction.kind", if every client answers; and those of the kinds whose sizes
    the values decide."""
    totals: dict[str, int] = {}
    unknown: dict[str, Size] = {}
    for step in steps(federation):
        for direction, kind, size, clients in step.logical():
            key = f"{direction}.{kind}"
            if size.exact and key not in unknown:
                totals[key] = totals.get(key, 0) + size.least * clients
            else:
                before = unknown.get(key, Size(totals.get(key, 0), totals.pop(key, 0)))
                most = None if before.most is None or size.most is None else before.most + size.most * clients
                unknown[key] = Size(before.least + size.least * clients, most)
    return totals, unknown


def describe(federation: Federation) -> str:
    """The plan as text: roster and bytes."""
    totals, unknown = planned_bytes(federation)
    lines = ["", "# who is hosted where", *hosting(federation), "", "# logical bytes of the run"]
    for key in sorted(totals):
        lines.append(f"{key:<24s} {totals[key]:>20,d}")
    for way in ("down", "up"):
        amount = sum(size for key, size in totals.items() if key.startswith(way))
        lines.append(f"{'all ' + way:<24s} {amount:>20,d}")
    lines += [f"{key:<24s} {_between(unknown[key]):>20s}" for key in sorted(unknown)]
    return "\n".join(lines)


def _between(size: Size) -> str:
    if size.most is None:
        return "depends on the values"
    return f"depends on the values: {size.least:,d} to {size.most:,d}"


def hosting(federation: Federation) -> list[str]:
    """Who is hosted where in a round with all clients, a line a rank."""
    dealt = federation.roster.deal(range(federation.clients))
    lines = []
    for rank, clients in enumerate(dealt.by_rank):
        role = "server" if rank == 0 else "clients"
        role = "server and clients" if federation.comm.size == 1 else role
        samples = sum(federation.roster.examples[client] for client in clients)
        what = f"{spans(clients)} ({samples:,} samples)" if clients else "-"
        lines.append(f"rank {rank:<4d} {federation.hosts[rank]:<16s} {role:<18s} {what}")
    return lines


def spans(numbers: tuple[int, ...]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    parts: list[str] = []
    start = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            parts.append(f"{numbers[start]}" if start == i else f"{numbers[start]}-{number}")
            start = i + 1
    return ", ".join(parts)
