"""What rank 0 writes down of a run: metrics rows, the ledger, and where each rank's time went."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mpifed.comm.collection import Sizes
from mpifed.comm.ledger import Entry, Ledger, WireLedger, unlabel
from mpifed.comm.wire.meter import NOT_MEASURED, Measured
from mpifed.errors import CheckpointError
from mpifed.federation.roster import Assignment

ACTIVITIES = ("train", "wait", "communicate", "evaluate", "server")
"""What a rank's seconds of a round are counted for."""


@dataclass
class Report:
    """What one rank says of a round."""

    logged: dict[int, dict[str, float]]  # by client: the numbers that it logged
    absent: dict[int, str]  # by client: why its reply does not count
    own_tests: list[int]  # right answers and samples of the clients' own tests
    sent: dict[str, int]  # MPI bytes by traffic label
    received: dict[str, int]
    seconds: dict[str, float]  # by activity

    def to_bytes(self) -> bytes:
        """JSON; seconds in one width, so that the ledger of mpifed's own messages is the same in every run."""
        seconds = {name: f"{value:013.6f}" for name, value in self.seconds.items()}
        return json.dumps([self.logged, self.absent, self.own_tests, self.sent, self.received, seconds]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """The inverse of `to_bytes`."""
        logged, absent, own_tests, sent, received, seconds = json.loads(data)
        return cls(
            {int(client): numbers for client, numbers in logged.items()},
            {int(client): reason for client, reason in absent.items()},
            own_tests,
            sent,
            received,
            {name: float(text) for name, text in seconds.items()},
        )


@dataclass
class Records:
    """The records of all rounds so far. A row is open (`"open"` is one of its keys) until its model has been tested."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # metrics, a row a round
    ledger: Ledger = field(default_factory=Ledger)
    wire: WireLedger = field(default_factory=WireLedger)
    rank_times: list[list[Any]] = field(default_factory=list)  # round, rank, and seconds as in `ACTIVITIES`
    resumed: int = 0
    deaths: list[dict[str, Any]] = field(default_factory=list)  # of ranks that the others outlived

    def to_bytes(self) -> dict[str, bytes]:
        """JSON by name, for a checkpoint."""
        values = {
            "rows": self.rows,
            "ledger": self.ledger.rows(),
            "wire": self.wire.rows(),
            "rank_times": self.rank_times,
            "resumed": self.resumed,
            "deaths": self.deaths,
        }
        return {name: json.dumps(value).encode() for name, value in values.items()}

    @classmethod
    def resume(cls, read: Callable[[str], bytes]) -> Records:
        """The records of a checkpoint, of a run that is resumed once more; `read(name)` gives what `to_bytes` gave."""
        names = ("rows", "ledger", "wire", "rank_times", "resumed")
        rows, ledger, wire, times, resumed = (json.loads(read(name)) for name in names)
        deaths = []
        with suppress(CheckpointError):  # one of an earlier version has none
            deaths = json.loads(read("deaths"))
        return cls(rows, Ledger.from_rows(ledger), WireLedger.from_rows(wire), times, resumed + 1, deaths)

    def add_round(
        self,
        round_: int,
        reports: Sequence[Report],
        exchanged: Sequence[tuple[str, Sizes, Assignment]],
        usual_rank: Mapping[int, int],
        sampled: int,
        replies: int,
        seconds: float,
        tested_later: bool,
        wire: Sequence[Measured] = (),
        wire_source: str = NOT_MEASURED,
    ) -> dict[str, Any]:
        """Write down a round; returns its metrics row.

        Args:
            reports: by rank.
            exchanged: phase, logical bytes and assignment of every exchange of the round.
            usual_rank: client -> the rank that trains it when all are asked.
            sampled, replies: clients of the round, and how many of them answered in every phase.
            seconds: of the whole round.
            tested_later: the row's accuracy is not known yet, but will be.
            wire: wire bytes of the parts of the round, counted by `wire_source`.
        """
        self._add_to_ledger(round_, reports, exchanged, usual_rank)
        for part in wire:
            self.wire.add(round_, part.phase, part.direction, part.by_rank, part.flows, part.kind)
        self.rank_times += [
            [round_, rank, *(report.seconds.get(name, 0.0) for name in ACTIVITIES)]
            for rank, report in enumerate(reports)
        ]
        most = {name: max(report.seconds.get(name, 0.0) for report in reports) for name in ACTIVITIES}
        gone = {client: reason for report in reports for client, reason in report.absent.items()}
        row: dict[str, Any] = {
            "round": round_,
            "accuracy": None,
            "loss": None,
            **_means({client: numbers for report in reports for client, numbers in report.logged.items()}),
            **_own_accuracy(reports),
            "clients": sampled,
            "replies": replies,
            "absent": [{"client": client, "reason": gone[client]} for client in sorted(gone)],
            "bytes": self.ledger.totals(round_) | {"wire": self._wire_totals(round_, wire_source)},
            "seconds": {
                "total": seconds,
                "train": most["train"],
                "communicate": most["communicate"],
                # rank 0 tests the last round's model meanwhile, which is counted in that round's row
                "evaluate": 0.0 if tested_later else most["evaluate"],
                "server": most["server"],
                "checkpoint": 0.0,
            },
            "open": tested_later,
        }
        self.rows.append(row)
        return row

    def _wire_totals(self, round_: int, source: str) -> dict[str, Any]:
        totals: Mapping[str, int | None] = self.wire.totals(round_)
        return {"source": source} | (dict.fromkeys(totals) if source == NOT_MEASURED else dict(totals))

    def _add_to_ledger(
        self,
        round_: int,
        reports: Sequence[Report],
        exchanged: Sequence[tuple[str, Sizes, Assignment]],
        usual_rank: Mapping[int, int],
    ) -> None:
        """Entries of a round, in a fixed order; a client's logical bytes stand at the rank that trains it, or would."""
        logical: dict[tuple[str, str, str], list[int]] = {}
        for phase, sizes, dealt in exchanged:
            for (direction, kind), by_client in sizes.items():
                of_ranks = logical.setdefault((phase, direction, kind), [0] * len(reports))
                for client, size in by_client.items():
                    of_ranks[dealt.rank_of.get(client, usual_rank[client])] += size
        for rank, report in enumerate(reports):
            totals: dict[tuple[str, str, str], list[int]] = {}
            for column, labels in ((1, report.sent), (2, report.received)):
                for text, size in labels.items():
                    totals.setdefault(unlabel(text), [0, 0, 0])[column] += size
            for key, of_ranks in logical.items():
                totals.setdefault(key, [0, 0, 0])[0] += of_ranks[rank]
            self.ledger.entries += [
                Entry(round_, *key, rank, *totals[key]) for key in sorted(totals) if any(totals[key])
            ]


def _own_accuracy(reports: Sequence[Report]) -> dict[str, float]:
    """Right answers over samples, of all clients' own tests together; nothing where there were none."""
    correct, samples = (sum(report.own_tests[part] for report in reports) for part in (0, 1))
    return {"accuracy_own": correct / samples} if samples else {}


def _means(numbers: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Means over the clients, in the order of their ids, of what they logged.

    For accuracy least and most as well; of all that are called accuracies each client's own, `[[client, value], ...]`.
    """
    means: dict[str, Any] = {}
    for name in dict.fromkeys(name for client in sorted(numbers) for name in numbers[client]):
        logged = [[client, numbers[client][name]] for client in sorted(numbers) if name in numbers[client]]
        values = [value for _, value in logged]
        means[name] = sum(values) / len(values)
        if len(values) > 1 and name == "accuracy":
            means |= {"accuracy_min": min(values), "accuracy_max": max(values)}
        if len(values) > 1 and name.endswith("accuracy"):
            means[f"{name}_of_clients"] = logged
    return means
