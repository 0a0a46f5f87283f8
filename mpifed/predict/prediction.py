"""A run's cost put together, shown, and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpifed.federation.federation import Federation
from mpifed.predict.bytes import Amount, Bytes, Exchange, Planner
from mpifed.predict.compute import Compute
from mpifed.predict.memory import Memory, memory
from mpifed.predict.timeline import Cores, Network, Seconds, Timeline
from mpifed.predict.units import size
from mpifed.progress import duration
from mpifed.report.layout import aligned

NO_SECONDS = "seconds are not predicted: give --bandwidth and --latency of the network, or --probe FILE, and no --bytes"

TIMED_ROUNDS = 64
"""Of longer runs so many rounds, evenly spread, are followed in time, and stand for the others."""

PARTS = ("train", "communicate", "server", "other", "checkpoint")

EXACT = (
    "Bytes are exact, if every client answers; where values decide, least and most. mpifed's own messages (control)\n"
    "come without the ranks' reports, some hundred bytes a rank and round."
)


@dataclass(frozen=True)
class Prediction:
    """What is known of a run before it runs."""

    heading: str
    rounds: int
    nodes: int
    in_all: Bytes
    a_round: tuple[Amount, Amount | None]  # of the round with the least bytes, and of the one with the most
    rounds_alike: bool
    memory: Memory
    seconds: Seconds | None  # of all rounds
    first_round: float = 0.0
    later_rounds: float = 0.0  # seconds, the mean of all but the first
    job_sha256: str = ""

    @property
    def node_hours(self) -> float | None:
        """Nodes times the hours of all rounds and checkpoints."""
        if self.seconds is None:
            return None
        return self.nodes * (self.seconds.total + self.seconds.checkpoint) / 3600

    def values(self) -> dict[str, Any]:
        """Numbers: bytes and seconds; null where nothing bounds them, or seconds were not predicted."""

        def amount(value: Amount | None) -> dict[str, int] | None:
            return None if value is None else value._asdict()

        kinds: dict[str, Any] = {
            f"{direction}.{kind}": {
                "least": amount(self.in_all.least[direction, kind]),
                "most": amount(self.in_all.most[direction, kind]),
            }
            for direction, kind in self.in_all.least
        }
        seconds: dict[str, float] | None = None
        if self.seconds is not None:
            seconds = {name: getattr(self.seconds, name) for name in PARTS} | {
                "total": self.seconds.total,
                "first_round": self.first_round,
                "later_rounds": self.later_rounds,
            }
        return {
            "job_sha256": self.job_sha256,
            "rounds": self.rounds,
            "bytes": {
                "kinds": kinds,
                "total": dict(zip(("least", "most"), map(amount, self.in_all.total()), strict=True)),
                "a_round": dict(zip(("least", "most"), map(amount, self.a_round), strict=True)),
            },
            "seconds": seconds,
            "node_hours": self.node_hours,
            "memory": {"rank 0": dict(self.memory.root), "a rank": dict(self.memory.rank)},
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.values(), indent=2) + "\n"

    def text(self) -> str:
        """As aligned tables."""
        rows = [("bytes of all rounds", "logical", "MPI sent", "MPI filled"), *self._byte_rows()]
        lines = [self.heading, "", *aligned(rows, (0,)), "", EXACT, ""]
        both = self.memory.root, self.memory.rank
        holders = dict.fromkeys([*both[0], *both[1]])
        held = [(name, *(size(of.get(name, 0)) for of in both)) for name in holders]
        held.append(("all", *(size(sum(of.values())) for of in both)))
        lines += aligned([("memory", "rank 0", "most of the others"), *held], (0,))
        if self.seconds is None:
            return "\n".join([*lines, "", NO_SECONDS]) + "\n"
        parts = {name: getattr(self.seconds, name) for name in PARTS}
        times = [(name, f"{spent:,.3f}", f"{spent / self.rounds:,.4f}") for name, spent in parts.items()]
        lines += ["", *aligned([("seconds", "all rounds", "a round"), *times], (0,)), ""]
        lines.append(
            f"a round: {self.later_rounds:.4g} s (the first {self.first_round:.4g} s); "
            f"in all {duration(self.seconds.total + self.seconds.checkpoint)}, {self.node_hours:.3g} node-hours"
        )
        return "\n".join(lines) + "\n"

    def _byte_rows(self) -> Iterator[tuple[str, ...]]:
        for direction in ("down", "up", "control"):
            for way, kind in self.in_all.least:
                if way == direction:
                    name = direction if direction == "control" else f"{direction}.{kind}"
                    yield name, *_columns(self.in_all.least[way, kind], self.in_all.most[way, kind])
        yield "all", *_columns(*self.in_all.total())
        least, most = self.a_round
        if self.rounds_alike:
            yield "a round", *_columns(least, most)
        else:
            yield "a round, from", *_columns(least, least)
            yield "a round, to", *(("-",) * 3 if most is None else _columns(most, most))


def _columns(least: Amount, most: Amount | None) -> tuple[str, ...]:
    if most is None:
        return tuple(f"at least {low:,d}" for low in least)
    return tuple(
        f"{low:,d}" if low == high else f"{size(low)} to {size(high)}" for low, high in zip(least, most, strict=True)
    )


def predict(
    federation: Federation,
    compute: Compute | None = None,
    network: Network | None = None,
    cores: Cores | None = None,
    process: int = 0,
) -> Prediction:
    """The cost of a run of this federation; seconds where compute, network and cores are given.

    `process`: bytes that a rank holds before it has any data or model.
    """
    planner = Planner(federation)
    in_all, of_rounds, largest = _bytes(planner)
    totals = [one.total() for one in of_rounds]
    least = min((low for low, _ in totals), key=lambda amount: amount.logical)
    highs = [high for _, high in totals if high is not None]
    most = max(highs, key=lambda amount: amount.logical) if len(highs) == len(totals) else None
    job, nodes = federation.job, len(set(federation.hosts))
    heading = (
        f"{job.algorithm.name} on {job.data.name}: {federation.clients} clients, {planner.ranks} "
        f"rank{'s' * (planner.ranks > 1)} on {nodes} node{'s' * (nodes > 1)}, {job.rounds} rounds, "
        f"{job.model.name} with {federation.env.model().layout.size:,} parameters"
    )
    seconds, first, later = None, 0.0, 0.0
    if compute is not None and network is not None and cores is not None:
        seconds, first, later = _seconds(Timeline(planner, compute, network, cores), job.rounds)
    return Prediction(
        heading,
        job.rounds,
        nodes,
        in_all,
        (least, most),
        all(total == totals[0] for total in totals),
        memory(planner, list(largest.values()), compute, process),
        seconds,
        first,
        later,
        job.sha256,
    )


def _bytes(planner: Planner) -> tuple[Bytes, list[Bytes], Mapping[str, Exchange]]:
    """Of all rounds, of each, and the exchange with the most clients on a rank of each phase."""
    usual, agreement = planner.usual_clients(), planner.report(0)
    in_all, of_rounds = Bytes(), []
    largest: dict[str, Exchange] = {}
    current = 0
    for exchange in planner.exchanges():
        name = exchange.step.phase.name
        if name not in largest or exchange.clients.max() > largest[name].clients.max():
            largest[name] = exchange
        if current != exchange.step.round:
            current = exchange.step.round
            of_rounds.append(Bytes())
            for totals in (of_rounds[-1], in_all):
                totals.add_calls(agreement)
        for totals in (of_rounds[-1], in_all):
            totals.add(exchange, usual)
    return in_all, of_rounds, largest


def _seconds(timeline: Timeline, rounds: int) -> tuple[Seconds, float, float]:
    """Of all rounds, and of the first and a later one in the mean."""
    if rounds <= TIMED_ROUNDS:
        chosen = list(range(1, rounds + 1))
    else:
        chosen = sorted({1, *(2 + i * (rounds - 2) // (TIMED_ROUNDS - 2) for i in range(TIMED_ROUNDS - 1))})
    total, first, later = Seconds(), 0.0, []
    share = (rounds - 1) / max(1, len(chosen) - 1)
    for round_, spent in timeline.rounds(chosen):
        if round_ == 1:
            first = spent.total
            total.add(spent)
        else:
            later.append(spent.total)
            total.add(spent, share)
    return total, first, sum(later) / len(later) if later else first
