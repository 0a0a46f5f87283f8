"""What a run will do, before it does it: who is hosted where, and the logical bytes of all its rounds."""

from __future__ import annotations

from mpifed.algorithms.base import Field, takes_weights
from mpifed.comm.ledger import WEIGHT
from mpifed.federation.federation import Federation


def planned_bytes(federation: Federation) -> tuple[dict[str, int], list[str]]:
    """Logical bytes of the whole run by "direction.kind", if every client answers; and the kinds not known before."""
    job, env = federation.job, federation.env
    phases = federation.algorithm.phases(env)
    totals: dict[str, int] = {}
    open_kinds: list[str] = []
    for round_ in range(1, job.rounds + 1):
        sampled = len(federation.roster.sample(round_))
        for phase in (phase for phase in phases if phase.rounds(round_)):
            asked = (sampled if phase.clients == "round" else federation.clients) * phase.repeat
            for direction, fields in (("down", phase.down(round_)), ("up", phase.up(round_))):
                for name, declared in fields.items():
                    size = _size(federation, direction, name, declared)
                    receivers = federation.clients * phase.repeat if declared.to == "everybody" else asked
                    if size is None:
                        open_kinds.append(f"{direction}.{name}")
                    else:
                        key = f"{direction}.{name}"
                        totals[key] = totals.get(key, 0) + size * receivers
            if takes_weights(phase.up(round_)):
                totals[f"up.{WEIGHT}"] = totals.get(f"up.{WEIGHT}", 0) + 8 * asked
    return totals, sorted(set(open_kinds))


def _size(federation: Federation, direction: str, name: str, declared: Field) -> int | None:
    shape = tuple(size for size in declared.shape if size is not None)
    if len(shape) < len(declared.shape):
        return None
    return federation.codec(direction, name).nbytes(shape, declared.dtype, declared.layout)


def describe(federation: Federation) -> str:
    """The plan as text: roster and bytes."""
    totals, open_kinds = planned_bytes(federation)
    lines = ["", "# who is hosted where", *hosting(federation), "", "# logical bytes of the run"]
    for key in sorted(totals):
        lines.append(f"{key:<24s} {totals[key]:>20,d}")
    for way in ("down", "up"):
        amount = sum(size for key, size in totals.items() if key.startswith(way))
        lines.append(f"{'all ' + way:<24s} {amount:>20,d}")
    lines += [f"{key:<24s} {'depends on the values':>20s}" for key in open_kinds]
    return "\n".join(lines)


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
