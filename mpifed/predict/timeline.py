"""Seconds of a round: what the engine does, in its order, on every rank at once.

    download -> training beside the test of the last round's model -> announcement -> upload -> server's step, and for
    each phase again; then the reports.

An exchange waits for the last rank, so that the slowest decides: with the clients that the roster really samples and
deals, and with ranks that share cores, in turns where the engine takes turns.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mpifed.comm.mpi import AT_FIRST, LONGEST_SLEEP, LONGEST_SLEEP_AT_FIRST
from mpifed.federation.turns import in_turns, worthwhile
from mpifed.predict.bytes import Call, Exchange, Planner, declared_elements
from mpifed.predict.compute import Compute, work_of
from mpifed.predict.cost import ADD, Places

REPORT_BYTES = 400
"""A rank's report of a round, about."""


class Network(Protocol):
    """What collectives take."""

    def seconds(self, call: Call, places: Places) -> float: ...


@dataclass(frozen=True)
class Cores:
    """What the ranks compute on.

    `processors`: by rank, the machine whose cores it shares (a node, as a rule). `contention`: how many times as long
    one rank's work takes while all `count` cores of its machine are at work (1: they do not disturb each other).
    """

    processors: Sequence[str]
    count: int
    contention: float = 1.0
    turns: bool = True

    def slowdown(self, active: int) -> float:
        """Of `active` ranks that compute at the same time, but for the cores that they have to share."""
        if self.count < 2 or active < 2:
            return 1.0
        return 1.0 + (self.contention - 1.0) * (min(active, self.count) - 1) / (self.count - 1)


@dataclass
class Seconds:
    """Of a round, or of several; the parts are of the rank that decides, and add up to the total."""

    train: float = 0.0
    communicate: float = 0.0  # collectives, and what codecs, buffers and sums take
    server: float = 0.0
    other: float = 0.0
    checkpoint: float = 0.0  # not in the total of a round, as in a run's metrics

    @property
    def total(self) -> float:
        return self.train + self.communicate + self.server + self.other

    def add(self, more: Seconds, times: float = 1.0) -> None:
        for name in vars(more):
            setattr(self, name, getattr(self, name) + times * getattr(more, name))


@dataclass
class Timeline:
    """The rounds of a plan in time."""

    planner: Planner
    compute: Compute
    network: Network
    cores: Cores
    places: Places = field(init=False)
    _seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.places = Places(self.planner.federation.hosts)

    def rounds(self, rounds: Sequence[int] | None = None) -> Iterator[tuple[int, Seconds]]:
        """Each of these rounds, which have to ascend."""
        steps: list[Exchange] = []
        for exchange in self.planner.exchanges(rounds):
            if steps and steps[0].step.round != exchange.step.round:
                yield steps[0].step.round, self._round(steps)
                steps = []
            steps.append(exchange)
        if steps:
            yield steps[0].step.round, self._round(steps)

    def _round(self, steps: Sequence[Exchange]) -> Seconds:
        job = self.planner.federation.job
        round_, spent = steps[0].step.round, Seconds()
        for number, exchange in enumerate(steps, start=1):
            first, last = number == 1, number == len(steps)
            spent.communicate += self._calls(exchange)
            training = self._train(exchange, round_, first, last)
            spent.train += training
            server = self.compute.server.get(exchange.step.phase.name)
            if server is not None:
                serving = server.at(len(exchange.step.asked))
                spent.server += serving
                spent.other += self._poll(serving)
            spent.other += self._poll(training)
        spent.communicate += self._local(steps) + sum(
            self.network.seconds(call, self.places) for call in self.planner.report(REPORT_BYTES)
        )
        spent.other += self.compute.other
        self._seen.update(client for exchange in steps for client in exchange.dealt.clients)
        if job.saves_after(round_):
            spent.checkpoint = self.compute.checkpoint
        return spent

    def _calls(self, exchange: Exchange) -> float:
        """Of a step's collectives; between their least and their most bytes where the trial has seen neither."""
        least = sum(self.network.seconds(call, self.places) for call in exchange.least)
        if exchange.least is exchange.most:
            return least
        most = sum(self.network.seconds(call, self.places) for call in exchange.most)
        low = high = seen = 0.0
        for (direction, name), size in exchange.step.sizes.items():
            if size.most is not None and not size.exact:
                low, high = low + size.least, high + size.most
                seen += self.compute.sizes.get(f"{direction}.{name}", (size.least + size.most) / 2)
        return least + (most - least) * ((seen - low) / (high - low) if high > low else 0.5)

    def _local(self, steps: Sequence[Exchange]) -> float:
        """Codecs, buffers and sums of a round: what is added on each rank, and what rank 0 does for every client."""
        largest = max(steps, key=lambda exchange: len(exchange.step.asked))
        replies, busiest = len(largest.step.asked), int(largest.clients.max())
        on_ranks = at_root = gathered = 0.0
        for exchange in steps:
            for name, declared in exchange.step.up.items():
                size = exchange.step.sizes["up", name].least * len(exchange.step.asked)
                if self.planner.adds_on_ranks(exchange.step, name):
                    on_ranks += size
                    gathered += self.planner.sums_at_root(exchange, name) * 8 * declared_elements(declared)
                else:
                    at_root += size
        share = on_ranks / (on_ranks + at_root) if on_ranks + at_root else 0.0
        own = self.compute.communicate.at(share * busiest + (1 - share) * replies)
        return own + gathered * ADD * (self.planner.ranks > 1)

    # --- training ----------------------------------------------------------------------------------------------------
    def _train(self, exchange: Exchange, round_: int, first: bool, last: bool) -> float:
        """Until the last rank has trained its clients, and rank 0 has tested the last round's model."""
        federation, job = self.planner.federation, self.planner.federation.job
        evaluates = federation.algorithm.evaluates
        due, before = job.tests_after(round_), round_ > 1 and job.tests_after(round_ - 1)
        loads: dict[int, list[float]] = {}
        for rank, clients in enumerate(exchange.dealt.by_rank):
            costs = [self._client(exchange, client, round_) for client in clients]
            if last and due and evaluates != "server":
                costs = [cost + self.compute.client_test for cost in costs]
            if costs:
                loads[rank] = costs
        beside = self.compute.server_test if first and before and evaluates != "clients" else 0.0
        if first and due and job.evaluate.own:
            for rank, count in enumerate(self.planner.usual_clients()):
                loads[rank] = [*loads.get(rank, []), self.compute.client_test * int(count)]
        return max((self._machine(of, loads, beside) for of in dict.fromkeys(self.cores.processors)), default=0.0)

    def _client(self, exchange: Exchange, client: int, round_: int) -> float:
        federation = self.planner.federation
        first = round_ == 1 or (federation.job.transfer is not None and client not in self._seen)
        work = work_of(federation.job.local, federation.roster.examples[client])
        return self.compute.client_seconds(exchange.step.phase.name, client, work, first)

    def _machine(self, machine: str, loads: Mapping[int, Sequence[float]], beside: float) -> float:
        """Until the ranks of one machine are done; rank 0's test of `beside` seconds is on its own rank."""
        here = [rank for rank, processor in enumerate(self.cores.processors) if processor == machine]
        mine = {rank: loads[rank] for rank in here if loads.get(rank)}
        alone = beside if 0 in here else 0.0
        if self.cores.turns and worthwhile(mine, self.cores.count):
            slow = self.cores.slowdown(self.cores.count)
            return max(slow * in_turns(list(mine.values()), self.cores.count), alone)
        totals = {rank: sum(costs) for rank, costs in mine.items()}
        totals[0] = totals.get(0, 0.0) + alone
        return sharing([total for total in totals.values() if total > 0], self.cores)

    def _poll(self, waited: float) -> float:
        """Until a rank that waited so long looks again, on average; the last of several ranks looks later."""
        if self.planner.ranks < 2:
            return 0.0
        longest = LONGEST_SLEEP_AT_FIRST if waited < AT_FIRST else LONGEST_SLEEP
        return 0.5 * min(waited / 20, longest)


def sharing(loads: Sequence[float], cores: Cores) -> float:
    """When the last of some processes is done that share the cores evenly, each with seconds of work of its own."""
    left = sorted(loads)
    heapq.heapify(left)
    passed = done = 0.0
    while left:
        active = len(left)
        next_ = heapq.heappop(left)
        rate = min(1.0, cores.count / active) / cores.slowdown(active)
        passed += (next_ - done) / rate
        done = next_
    return passed
