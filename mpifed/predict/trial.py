"""What one rank's work costs here: a short run of the job on this rank alone, with a few of its clients.

The engine itself runs, on the job's own models, samples and codecs, so that nothing is estimated that can be measured:
a few clients of different size (and one of each of the job's architectures) for two rounds, then one of them, and again
while there is time. A client's seconds are fitted to its steps and to the samples that it visits in a round; the
server's are a line over the replies, of which it is given more than there were, the same ones again.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mpifed.comm.collection import Received
from mpifed.comm.inprocess import InProcess
from mpifed.engine import Engine
from mpifed.federation.federation import Federation
from mpifed.federation.roster import Assignment, Roster
from mpifed.federation.store import ClientStore
from mpifed.guard import StopSignal
from mpifed.job import Job
from mpifed.predict.compute import ClientCost, Compute, of_clients, of_two, work_of
from mpifed.records import ACTIVITIES
from mpifed.storage.checkpoint import Checkpoints
from mpifed.types import nbytes

LEAST_ROUNDS, MOST_ROUNDS = 4, 16
MOST_REPLIES, MOST_REPLY_BYTES = 64, 1 << 28
"""With how many replies the server's step is tried out at most."""

SECONDS = 10.0
"""How long a trial goes on, once it has its rounds."""


class _Chosen(Roster):
    """Another roster's clients, of whom some alone are ever asked, all on one rank."""

    def __init__(self, of: Roster, chosen: Sequence[int], stop: StopSignal, seconds: float) -> None:
        vars(self).update(vars(of))
        self._chosen, self._stop = tuple(sorted(chosen)), stop
        self._first = chosen[0]
        self._until = time.perf_counter() + seconds

    def sample(self, round_: int) -> tuple[int, ...]:
        over = time.perf_counter() > self._until
        self._stop.asked = round_ >= MOST_ROUNDS or (round_ >= LEAST_ROUNDS and over)
        return (self._first,) if round_ > 2 and round_ % 2 else self._chosen

    def deal(self, clients: Iterable[int]) -> Assignment:
        asked = set(clients)
        return Assignment((tuple(client for client in self._chosen if client in asked),))

    @property
    def usual_rank(self) -> Mapping[int, int]:
        return dict.fromkeys(range(self.clients), 0)


@dataclass
class _Timed:
    """Seconds of what a phase's functions took: (round, phase, client or replies, seconds)."""

    replies: int  # of a round of the job
    device: torch.device
    client: list[tuple[int, str, int, float]] = field(default_factory=list)
    server: list[tuple[int, str, int, float]] = field(default_factory=list)

    def wrap(self, phase: Any) -> Any:
        def client(state: Any, down: Any, ctx: Any) -> Any:
            started = time.perf_counter()
            answer = phase.client(state, down, ctx)
            self._finish()
            self.client.append((ctx.round, phase.name, ctx.id, time.perf_counter() - started))
            return answer

        def server(state: Any, uploads: Any, round_: int) -> Any:
            started = time.perf_counter()
            after = phase.server(state, uploads, round_)
            self._finish()
            self.server.append((round_, phase.name, len(uploads.clients), time.perf_counter() - started))
            if round_ > 1 and len(uploads.clients) > 1 and self.replies > len(uploads.clients):
                self._with_more(phase, state, uploads, round_)
            return after

        return replace(phase, client=client, server=server)

    def _finish(self) -> None:
        """A GPU works on when a function returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _with_more(self, phase: Any, state: Any, uploads: Received, round_: int) -> None:
        """The server's step once more, with as many replies as a round brings; what it makes of them is dropped."""
        count = len(uploads.clients)
        held = sum(tensor.nbytes for entries in uploads.entries.values() for tensor in entries) // count
        replies = min(self.replies, MOST_REPLIES, max(count, MOST_REPLY_BYTES // max(1, held)))
        again = [number % count for number in range(replies)]
        entries = {name: [several[i] for i in again] for name, several in uploads.entries.items()}
        more = replace(uploads, clients=tuple(range(replies)), weights=uploads.weights[again], entries=entries)
        started = time.perf_counter()
        try:
            phase.server(state, more, round_)
            self._finish()
        except Exception:  # what no client ever sent may be refused; then the replies that there were have to do
            return
        self.server.append((round_, phase.name, replies, time.perf_counter() - started))


def try_out(job: Job, seconds: float = SECONDS) -> Compute:
    """Measure the job's work on this rank, in a folder that is gone afterwards."""
    document = json.loads(job.canonical())
    document |= {"rounds": max(job.rounds, MOST_ROUNDS), "measure_wire": "off", "min_replies": 1}
    document["evaluate"] |= {"every_rounds": 1}
    document["checkpoint"] |= {"every_rounds": 0, "every_seconds": 0.0}
    alone = Federation.build(Job.from_canonical(json.dumps(document)), InProcess.alone())
    chosen, stop = choose(alone.roster.examples, max(1, len(job.client_models))), StopSignal()
    timed = _Timed(len(alone.roster.sample(1)), alone.env.device)
    alone.roster = _Chosen(alone.roster, chosen, stop, seconds)
    before = resident()
    with tempfile.TemporaryDirectory(prefix="mpifed-trial-") as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", 2, alone.comm, alone.job.resume_sha256)
        store = ClientStore(1 << 40, Path(folder) / "scratch")
        engine = Engine(alone, checkpoints, store, stop)
        engine.phases = tuple(map(timed.wrap, engine.phases))
        engine.begin()
        engine.run()
        grown = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
        return _compute(engine, timed, chosen, len(job.client_models), grown)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def choose(examples: Sequence[int], architectures: int) -> list[int]:
    """Clients of four sizes, and of each further architecture (client id modulo their number) a usual one."""
    chosen = []
    for number in range(min(architectures, len(examples))):
        alike = sorted(range(number, len(examples), architectures), key=lambda client: (examples[client], client))
        chosen += [alike[int(len(alike) * share)] for share in ((0.25, 0.1, 0.7, 0.95) if number == 0 else (0.5,))]
    return list(dict.fromkeys(chosen))


def _compute(engine: Engine, timed: _Timed, chosen: Sequence[int], models: int, grown: int) -> Compute:
    federation, records = engine.federation, engine.records
    architectures = max(1, models)
    rows = {row["round"]: row for row in records.rows}
    activities = {times[0]: dict(zip(ACTIVITIES, times[2:], strict=True)) for times in records.rank_times}
    rounds = sorted(activities)
    phases = [phase.name for phase in engine.phases]
    work = {client: work_of(federation.job.local, federation.roster.examples[client]) for client in chosen}

    def best(phase: str, client: int, later: bool) -> float | None:
        """The median of a client's seconds in a phase of a round; of rounds after its first, where there are some."""
        of_rounds: dict[int, float] = {}
        for round_, name, who, seconds in timed.client:
            if (name, who) == (phase, client):
                of_rounds[round_] = of_rounds.get(round_, 0.0) + seconds
        if later and len(of_rounds) > 1:
            of_rounds.pop(min(of_rounds))
        return (statistics.median(of_rounds.values()) if later else of_rounds[min(of_rounds)]) if of_rounds else None

    # what the engine does around a client's function: states, codecs, checks
    asked = {r: len({(name, who) for round_, name, who, _ in timed.client if round_ == r}) for r in rounds}
    inside = {r: sum(seconds for round_, _, _, seconds in timed.client if round_ == r) for r in rounds}
    around = statistics.median(max(0.0, activities[r]["train"] - inside[r]) / max(1, asked[r]) for r in rounds[1:])

    def costs(later: bool) -> dict[str, list[ClientCost]]:
        found: dict[str, list[ClientCost]] = {}
        for name in dict.fromkeys(phases):
            measured = {client: seconds for client in chosen if (seconds := best(name, client, later)) is not None}
            if not measured:
                continue
            first = [(work[c], measured[c]) for c in chosen if c % architectures == 0 and c in measured]
            base = of_clients(first)
            found[name] = [base.plus(around)]
            for number in range(1, architectures):
                alike = [c for c in chosen if c % architectures == number and c in measured]
                factor = measured[alike[0]] / max(1e-9, base.at(work[alike[0]])) if alike else 1.0
                found[name].append(base.times(factor).plus(around))
        return found

    later = {name for round_, name, _, _ in timed.server if round_ > 1}
    replies: dict[str, dict[int, list[float]]] = {}
    for round_, name, count, seconds in timed.server:
        if round_ > 1 or name not in later:
            replies.setdefault(name, {}).setdefault(count, []).append(seconds)
    clients_of = {r: len({who for round_, _, who, _ in timed.client if round_ == r}) for r in rounds}
    communicate: dict[int, float] = {}
    for r in rounds[1:]:
        count, seconds = clients_of[r], activities[r]["communicate"]
        communicate[count] = min(communicate.get(count, seconds), seconds)

    # row r: the server's model of round r, tested in round r + 1; the ranks' times of a round hold both kinds of tests
    both = engine.algorithm.evaluates != "clients"
    server_test = min((rows[r]["seconds"]["evaluate"] for r in rounds[1:-1]), default=0.0) if both else 0.0
    tests = []
    for r in rounds[1:]:
        previous = rows[r - 1]["seconds"]["evaluate"] if both else 0.0
        tested = len(chosen) if engine.job.evaluate.own else clients_of[r]
        tests.append(max(0.0, activities[r]["evaluate"] - previous) / max(1, tested))
    quiet = min(rows[r]["seconds"]["total"] - sum(activities[r].values()) for r in rounds[1:])
    kept = [nbytes(state) for _, state in engine.store.items()]
    return Compute(
        client=costs(later=True),
        first=costs(later=False),
        server={
            name: of_two([(count, statistics.median(known)) for count, known in of.items()])
            for name, of in replies.items()
        },
        communicate=of_two(sorted(communicate.items())),
        server_test=server_test,
        client_test=min(tests) if engine.algorithm.evaluates != "server" or engine.job.evaluate.own else 0.0,
        other=max(0.0, quiet),
        checkpoint=float(rows[rounds[-1]]["seconds"]["checkpoint"]),
        server_state=0 if engine.server is None else nbytes(engine.server),
        client_state=max(kept, default=0),
        workspace=grown,
        sizes=_sizes(engine, clients_of),
    )


def _sizes(engine: Engine, clients_of: Mapping[int, int]) -> dict[str, float]:
    """Mean logical bytes of one client by "direction.kind" over the trial's rounds after the first."""
    totals: dict[str, list[float]] = {}
    for entry in engine.records.ledger.entries:
        if entry.logical and entry.round > 1 and entry.direction == "up":
            totals.setdefault(f"{entry.direction}.{entry.kind}", []).append(entry.logical / clients_of[entry.round])
        elif entry.logical and entry.round > 1 and entry.direction == "down":
            totals.setdefault(f"{entry.direction}.{entry.kind}", []).append(entry.mpi_sent)
    return {kind: sum(values) / len(values) for kind, values in totals.items()}
