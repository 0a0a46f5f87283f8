"""A run's cost put together, and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpifed.federation.federation import Federation
from mpifed.predict.bytes import Amount, Bytes, Planner
from mpifed.predict.units import size
from mpifed.report.layout import aligned

EXACT = (
    "Bytes are exact, if every client answers; where values decide, least and most. mpifed's own messages (control) "
    "come without the ranks' reports, some hundred bytes a rank and round."
)


@dataclass(frozen=True)
class Prediction:
    """What is known of a run before it runs."""

    heading: str
    rounds: int
    in_all: Bytes
    a_round: tuple[Amount, Amount | None]  # of the round with the least bytes, and of the one with the most
    rounds_alike: bool

    def to_json(self) -> str:
        """Numbers: bytes; null where nothing bounds them."""

        def amount(value: Amount | None) -> dict[str, int] | None:
            return None if value is None else {"logical": value.logical, "sent": value.sent, "received": value.received}

        kinds: dict[str, Any] = {
            f"{direction}.{kind}": {
                "least": amount(self.in_all.least[direction, kind]),
                "most": amount(self.in_all.most[direction, kind]),
            }
            for direction, kind in self.in_all.least
        }
        total = dict(zip(("least", "most"), map(amount, self.in_all.total()), strict=True))
        a_round = dict(zip(("least", "most"), map(amount, self.a_round), strict=True))
        return json.dumps({"bytes": {"kinds": kinds, "total": total, "a_round": a_round}}, indent=2) + "\n"

    def text(self) -> str:
        """As aligned tables."""
        rows = [("bytes of all rounds", "logical", "MPI sent", "MPI filled"), *self._byte_rows()]
        return "\n".join([self.heading, "", *aligned(rows, (0,)), "", EXACT]) + "\n"

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


def predict(federation: Federation) -> Prediction:
    """The cost of a run of this federation."""
    planner = Planner(federation)
    usual = planner.usual_clients()
    in_all, of_rounds = Bytes(), []
    agreement = planner.report(0)
    current: tuple[int, Bytes] | None = None
    for exchange in planner.exchanges():
        if current is None or current[0] != exchange.step.round:
            current = exchange.step.round, Bytes()
            current[1].add_calls(agreement)
            in_all.add_calls(agreement)
            of_rounds.append(current[1])
        current[1].add(exchange, usual)
        in_all.add(exchange, usual)
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
    return Prediction(heading, job.rounds, in_all, (least, most), all(total == totals[0] for total in totals))
